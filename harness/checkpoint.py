"""Checkpoints of a training run: one folder a step, written by orbax in the background, sealed (harness/seal.py).

    folder/ 300/ params/ rest/ headway.json     a finished step, renamed into place together with its seal
            400.orbax-checkpoint-tmp/           being written     (what a kill leaves of these two
            100.old/                            being deleted      is cleaned at the next start)
            350.invalid/                        found damaged: kept for a look, never read again

A part (`params`, `ema`, `rest`) is any tree of arrays. It is stored flat, {'opt_state/1/mu/...': array}, so that a
leaf has one name in files and errors, whatever classes held it. Every process writes the shards it holds into the one
folder that all of them see; process 0 seals, renames and deletes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from backbone.errors import CheckpointMismatch, ConfigError, NoValidCheckpoint, SaveError
from harness import agree, seal

WRITING, DELETING, INVALID = '.orbax-checkpoint-tmp', '.old', '.invalid'
LISTED = 5  # how many differing leaves an error names of each kind


class Checkpoints:
    """The checkpoints of one run; every process makes one and calls the same methods at the same steps.

    folder: made where it is missing, on a file system with atomic renames that all processes see.
    max_to_keep: so many of the newest stay; keep_every: multiples of it stay for good (0: none).
    asynchronous: False returns from `save` only when the step is on the disk.
    Errors: ConfigError, SaveError.
    """

    def __init__(self, folder: str | Path, *, max_to_keep: int = 3, keep_every: int = 0, asynchronous: bool = True):
        if max_to_keep < 1 or keep_every < 0:
            raise ConfigError(f'checkpoint: max_to_keep must be at least 1 and keep_every at least 0, got '
                              f'{max_to_keep} and {keep_every}')
        _quiet()
        self.folder = Path(folder).resolve()
        self._max_to_keep, self._keep_every, self._asynchronous = max_to_keep, keep_every, asynchronous
        self._handler: _Sealing | None = None
        self._writer: ocp.AsyncCheckpointer | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._settled: concurrent.futures.Future | None = None
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SaveError(f'{self.folder} cannot be made: {error.strerror}') from error
            for path in self.folder.iterdir():
                if WRITING in path.name or path.name.endswith(DELETING):
                    shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Finished steps, oldest first; whether they are still sound is not looked at."""
        return steps_in(self.folder)

    def save(self, step: int, parts: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Takes the arrays' values and returns; the arrays may then be donated or changed at once.

        metadata: JSON, returned on restoring. A step that is there already is not saved again.
        Errors: SaveError, of this save or (here or in `wait`) of the one before.
        """
        self.wait()
        if agree.from_first((self.folder / str(step)).exists()):
            return
        flat = {part: flatten(tree) for part, tree in parts.items()}
        if self._writer is None:
            self._handler = _Sealing.of(flat)
            self._writer = ocp.AsyncCheckpointer(self._handler)
        self._handler.content = {'step': step, 'metadata': metadata,
                                 'leaves': {part: describe(leaves) for part, leaves in flat.items()}}
        with self._faults_of(step):
            self._writer.save(self.folder / str(step), args=_Parts(
                **{part: ocp.args.PyTreeSave(leaves) for part, leaves in flat.items() if leaves}))
        self._settled = self._thread.submit(self._settle, step)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk. Errors: SaveError."""
        settled, self._settled = self._settled, None
        if settled is not None:
            settled.result()

    def close(self) -> None:
        """Waits, and frees the threads. Errors: SaveError."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.close()

    def restore_latest_valid(self, abstract: Mapping[str, Any], report: Callable[[str], Any] = print,
                             ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, parts, metadata) of the newest sound checkpoint; None only where there never was one.

        abstract: {part: tree of jax.ShapeDtypeStruct}. A leaf with a sharding is placed so, whatever mesh it was saved
        from; one without becomes a numpy array. report: takes one line for each newer step that is damaged; that step
        is set aside as `<step>.invalid`.
        Errors: NoValidCheckpoint, CheckpointMismatch (names the leaves), FormatError (written by a later version).
        """
        self.wait()
        found = newest_sound(self.folder)
        if found is None:
            return None
        step, sealed, faults = found
        check_leaves(self.folder / str(step), sealed['leaves'],
                     {part: describe(flatten(tree)) for part, tree in abstract.items()})
        for damaged, reason in faults.items():
            report(f'checkpoint {self.folder / str(damaged)} is damaged: {reason}; it is set aside as '
                   f'{damaged}{INVALID} and step {step} is used')
            if jax.process_index() == 0:
                aside = self.folder / f'{damaged}{INVALID}'
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(damaged)).rename(aside)
        return step, {part: _load(self.folder / str(step) / part, tree) for part, tree in abstract.items()}, sealed[
            'metadata']

    def _settle(self, step: int) -> None:
        """In the background: waits for the new step, and only then deletes older ones."""
        with self._faults_of(step):
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                seal.fsync_folder(self.folder)  # a power cut must not undo the rename and keep the deletions
        if jax.process_index() == 0:
            for old in self.steps()[:-self._max_to_keep]:
                if not self._keep_every or old % self._keep_every:
                    # Renamed first: a half-deleted folder must not look like a step.
                    doomed = self.folder / f'{old}{DELETING}'
                    (self.folder / str(old)).rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)

    @contextlib.contextmanager
    def _faults_of(self, step: int) -> Iterator[None]:
        """Whatever fails in a save becomes one SaveError, and its half-written folder does not stay on a full disk."""
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:
                shutil.rmtree(self.folder / f'{step}{WRITING}', ignore_errors=True)
            kept = ', '.join(map(str, self.steps())) or 'none'
            where = self.folder / str(step)
            raise SaveError(f'{where} cannot be saved: {_reason(error)}; steps kept: {kept}') from error


def steps_in(folder: str | Path) -> list[int]:
    """Steps with a finished folder, oldest first."""
    try:
        return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdigit() and path.is_dir())
    except FileNotFoundError:
        return []


def newest_sound(folder: Path) -> tuple[int, dict[str, Any], dict[int, str]] | None:
    """(step, its seal, {newer step: what is wrong with it}), the same on every process; None where there is none.

    Reads every file of the step once; several processes share that. Errors: NoValidCheckpoint.
    """
    there, faults = agree.from_first(steps_in(folder)), {}
    for step in reversed(there):
        sealed, reason = _examine(folder / str(step))
        if not reason:
            return step, sealed, faults
        faults[step] = reason
    aside = sorted(path.name for path in folder.glob(f'*{INVALID}'))
    if not agree.from_first(faults or aside):
        return None
    why = '; '.join([f'{step}: {reason}' for step, reason in faults.items()] + [f'{name}: set aside' for name in aside])
    raise NoValidCheckpoint(f'{folder}: no checkpoint can be used ({why}). Bring one back from a copy, use another '
                            f'working directory, or move this folder away to start over')


def read_part(folder: str | Path, part: str, step: int | None = None) -> tuple[int, dict[str, np.ndarray]]:
    """(step, {'/'-joined path: array on the host}) of one part, saved from any mesh; the newest sound step by default.

    Errors: NoValidCheckpoint (there is none, or `step` is missing or damaged), CheckpointMismatch (no such part).
    """
    _quiet()
    folder = Path(folder).resolve()
    if step is None:
        found = newest_sound(folder)
        if found is None:
            raise NoValidCheckpoint(f'{folder} holds no checkpoint')
        step, sealed, _ = found
    else:
        sealed, reason = _examine(folder / str(step))
        if reason:
            raise NoValidCheckpoint(f'{folder / str(step)} cannot be used: {reason}; steps here: '
                                    f'{", ".join(map(str, steps_in(folder))) or "none"}')
    if part not in sealed['leaves']:
        raise CheckpointMismatch(f'{folder / str(step)} has no part {part!r}, only {", ".join(sealed["leaves"])}')
    return step, _load(folder / str(step) / part, {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (dtype, shape) in sealed['leaves'][part].items()})


def flatten(tree: Any) -> dict[str, Any]:
    """{'/'-joined path: leaf}. Keys may themselves hold a '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError('two leaves of one part have the same path')
    return {name: leaf if hasattr(leaf, 'dtype') else np.asarray(leaf) for name, leaf in flat.items()}


def describe(leaves: Mapping[str, Any]) -> dict[str, list]:
    """{path: [dtype, shape]} of flat leaves."""
    return {name: [np.dtype(leaf.dtype).name, list(leaf.shape)] for name, leaf in leaves.items()}


def check_leaves(where: Path, saved: Mapping[str, dict], wanted: Mapping[str, dict]) -> None:
    """Errors: CheckpointMismatch counts and names what differs: {part: {path: [dtype, shape]}} of both."""
    saved, wanted = ({f'{part}/{name}': leaf for part, leaves in tree.items() for name, leaf in leaves.items()}
                     for tree in (saved, wanted))
    both = [name for name in wanted if name in saved]
    kinds = {
        'missing': [name for name in wanted if name not in saved],
        'left over': [name for name in saved if name not in wanted],
        'of another shape': [f'{name} is {saved[name][1]}, the model has {wanted[name][1]}' for name in both
                             if saved[name][1] != wanted[name][1]],
        'of another type': [f'{name} is {saved[name][0]}, the model has {wanted[name][0]}' for name in both
                            if saved[name][0] != wanted[name][0]]}
    said = [f'{len(names)} {kind}: {", ".join(names[:LISTED])}{", ..." * (len(names) > LISTED)}'
            for kind, names in kinds.items() if names]
    if said:
        raise CheckpointMismatch(f'checkpoint {where} is of another model: {"; ".join(said)}')


class _Sealing(ocp.CompositeCheckpointHandler):
    """Seals the temporary folder when every part in it is final, just before orbax renames it."""

    content: dict[str, Any]

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> _Sealing:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for part in parts:
            # Weights and moments hardly compress, and compressing them takes the processor from the training.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            registry.add(part, ocp.args.PyTreeSave, handler)
        return cls(handler_registry=registry)

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        seal.write(Path(directory), self.content)


@ocp.args.register_with_handler(_Sealing, for_save=True, for_restore=True)
class _Parts(ocp.args.Composite):
    """Orbax finds arguments by the exact class of their handler."""


def _load(folder: Path, abstract: Any) -> Any:
    """One part in the form of `abstract`, from files that were verified."""
    flat = flatten(abstract)
    found = {}
    if flat:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(folder, args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(flat, 0), restore_args={name: _how(leaf) for name, leaf in flat.items()}))
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in flat])


def _how(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if getattr(leaf, 'sharding', None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)


def _examine(folder: Path) -> tuple[dict[str, Any], str]:
    """(the seal, what is wrong or ''), the same on every process: each reads its share of the files."""
    sealed, reason = seal.read(folder)
    mine = itertools.islice(sealed.get('files', {}).items(), jax.process_index(), None, jax.process_count())
    reason = reason or seal.fault(folder, dict(mine))
    return sealed, next(filter(None, agree.everyone(reason)), '')


def _reason(error: Exception) -> str:
    """The operating system's words where it was the one to refuse; its number is inside the storage layer's text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else ' '.join((str(error) or repr(error)).split())[:200]


def _quiet() -> None:
    """Orbax tells every file, and a failing save's whole traceback, over absl's log; what fails is raised here."""
    logging.getLogger('absl').addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f'{Path(ocp.__file__).parent}' not in record.pathname
