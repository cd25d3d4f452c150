"""Models by any name: what backbone.formats reads, and the working directory of a training run.

    load('smollm2-135m')      # catalogue key, file or directory: backbone.formats.load
    load('out/enwik8')        # a working directory: its newest sound checkpoint
    load('out/enwik8@1200')   # the checkpoint of that step
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from backbone import formats, tokenizer
from backbone.errors import FormatError, NoValidCheckpoint
from backbone.formats.tensors import Loaded, check_leaves, flatten, unflatten

CONFIG, TOKENIZER, CHECKPOINTS = 'config.json', 'tokenizer', 'checkpoints'
FORMAT = 1  # of config.json


def load(spec: str | Path, dtype: Any = np.float32, cache: bool = True) -> Loaded:
    """A model by catalogue key, path, or working directory with or without @STEP. params: numpy arrays in `dtype`.

    Of a working directory: the averaged parameters where the run keeps an average (ema_decay > 0); what was frozen
    comes from the task again. A task whose model is more than its params['base'] (adapters) has
    `merged(params) -> base parameters`. base_hash is taken before rounding to `dtype`.
    Errors: those of backbone.formats.load; NoValidCheckpoint (none yet, or not that step), FormatError.
    """
    folder, step = split(str(spec))
    if is_workdir(folder):
        return _from_workdir(folder, step, dtype)
    if step is not None:
        raise FormatError(f'{folder} is not the working directory of a training run: @{step} means nothing there')
    return formats.load(spec, dtype, cache)


def split(spec: str) -> tuple[Path, int | None]:
    """'out/x@1200' -> (out/x, 1200), unless a path is really called so or there is no such directory."""
    name, _, step = spec.rpartition('@')
    if name and step.isdigit() and not Path(spec).exists() and Path(name).is_dir():
        return Path(name), int(step)
    return Path(spec), None


def is_workdir(path: str | Path) -> bool:
    """True for what headway-train made. A Hugging Face directory has a config.json too, but of other keys."""
    path = Path(path) / CONFIG
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return (path.parent / CHECKPOINTS).is_dir()  # then `read_config` says what is wrong with it
    config = found.get('config') if isinstance(found, dict) else None
    return isinstance(config, Mapping) and {'task', 'data', 'optimizer'} <= set(config)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a working directory: {'format', 'config', 'fingerprint', ...}. Errors: FormatError."""
    path = Path(folder) / CONFIG
    try:
        found = json.loads(path.read_text())
        version = found['format']
        if not {'task', 'data', 'optimizer'} <= set(found['config']) or 'fingerprint' not in found:
            raise FormatError(f'{path} is not the config of a training run')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f'{path} cannot be read ({error!r})') from error
    if version != FORMAT:
        raise FormatError(f'{path}: version {version} is not read, only {FORMAT}')
    return found


def read_run(folder: Path, step: int | None) -> tuple[Any, dict[str, Any], int]:
    """(task, whole parameter tree of numpy arrays, step) of a working directory. Errors: as `load`."""
    from harness import checkpoint, train_step  # after it is known to be a run: they bring orbax and optax

    config = ml_collections.ConfigDict(read_config(folder)['config'])
    there = checkpoint.steps_in(folder / CHECKPOINTS)
    if not there:
        raise NoValidCheckpoint(f'{folder} has no checkpoint yet')
    if step is not None and step not in there:
        raise NoValidCheckpoint(f'{folder} has no checkpoint of step {step}, only of {", ".join(map(str, there))}')
    task = train_step.build_task(config)
    part = 'ema' if config.ema_decay > 0 else 'params'
    step, leaves = checkpoint.read_part(folder / CHECKPOINTS, part, step)
    return task, unflatten(_frozen(task, config.seed, leaves) | leaves), step


def _from_workdir(folder: Path, step: int | None, dtype: Any) -> Loaded:
    task, params, step = read_run(folder, step)
    base = task.merged(params) if hasattr(task, 'merged') else params['base']
    base = jax.tree.map(np.asarray, base)
    where = f'{folder}@{step}'
    check_leaves(task.cfg, {path: leaf.shape for path, leaf in flatten(base).items()}, where)
    found = tokenizer.from_hf_directory(folder / TOKENIZER)
    found.check_model(task.cfg.vocab_size)
    digest = formats.params_hash(base)
    return Loaded(task.cfg, jax.tree.map(lambda a: a.astype(dtype, copy=False), base), found,
                  f'{folder.resolve().name}@{step}', digest)


def _frozen(task: Any, seed: int, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves a checkpoint leaves out, as the run had them: from the task's files, else from its init."""
    expected = jax.eval_shape(lambda: flatten(task.init(jax.random.key(seed))))
    missing = [path for path in expected if path not in trained]
    if not missing:
        return {}
    loaded = flatten(task.load()) if hasattr(task, 'load') else {}
    if not all(path in loaded for path in missing):
        made = jax.jit(lambda: {path: a for path, a in flatten(task.init(jax.random.key(seed))).items()
                                if path in missing and path not in loaded})()
        loaded = {**jax.tree.map(np.asarray, made), **loaded}
    return {path: np.asarray(loaded[path]) for path in missing}
