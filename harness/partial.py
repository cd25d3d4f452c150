"""Rows that are made over many starts: kept in numbered parts beside the output, which appears whole at the end.

    answers.partial/ selfgen.json 00000.json 00001.json ... lock     while it grows
    answers                                                         at the end, in one rename

A part is written under another name, brought to the disk and renamed, so a kill or a power cut at any moment costs the
rows of one part at most. `selfgen.json` holds the settings that decide the rows: under others nothing is added.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.errors import FingerprintMismatch, RequestError
from harness import fingerprint as fingerprints
from harness import seal

RECORD = 'selfgen.json'


class Partial:
    """The rows made so far for one output. Use as a context; one process at a time.

    rows: every row there is, as JSON objects, in no particular order.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], report: Callable[[str], Any]):
        self.out, self.folder = Path(out), _folder(out)
        self.settings, self.report = dict(settings), report
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Partial:
        """Errors: RequestError (cannot be written, in use), FingerprintMismatch names the settings that differ."""
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / 'lock', 'w')
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise RequestError(f'{self.out} is being made by another process') from None
            try:
                if self.out.exists():  # the other process has just finished
                    clear(self.out)
                    raise RequestError(f'{self.out} exists already')
                self._open()
            except BaseException:
                self._lock.close()
                raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def _open(self) -> None:
        record = self.folder / RECORD
        if record.exists():
            check(record, self.settings, self.out)
        else:
            write_whole(record, json.dumps({'settings': self.settings}, indent=2))
        for path in self._parts():
            try:
                self.rows += json.loads(path.read_text())['rows']
            except (ValueError, KeyError, TypeError):
                self.report(f'{path} is damaged: its rows are made again')
                path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.folder.glob('*.json') if path.stem.isdigit())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps them as the next part. Errors: RequestError; what was kept before stays."""
        with _told(self.folder):
            number = max((int(path.stem) for path in self._parts()), default=-1) + 1
            write_whole(self.folder / f'{number:05d}.json', json.dumps({'rows': list(rows)}))
        self.rows += map(dict, rows)

    def finish(self, build: Callable[[Path], None], record: Mapping[str, Any] | None = None) -> None:
        """`build(path)` writes the output at a path that is then renamed; `record`: written beside a file, if given."""
        made = self.folder / 'made'
        with _told(self.out):
            _remove(made)
            build(made)
            for path in [*made.rglob('*'), made]:
                seal.fsync_folder(path)
            if record is not None:
                write_whole(beside(self.out), json.dumps(record, indent=2))
            os.replace(made, self.out)
            seal.fsync_folder(self.out.parent)
        clear(self.out)


def _folder(out: str | Path) -> Path:
    return Path(f'{out}.partial')


def clear(out: str | Path) -> None:
    """Removes the parts of an output that is complete; a kill after the last rename leaves them."""
    shutil.rmtree(_folder(out), ignore_errors=True)


def beside(out: Path) -> Path:
    """The record of an output that is a file; one that is a directory has it inside."""
    return out / RECORD if out.is_dir() else Path(f'{out}.{RECORD}')


def check(record: Path, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The record of `out`. Errors: RequestError (damaged), FingerprintMismatch names each setting that differs."""
    try:
        found = json.loads(record.read_text())
        saved = found['settings']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f'{record} cannot be read ({error!r})') from error
    try:
        fingerprints.check(saved, settings)
    except FingerprintMismatch as error:
        raise FingerprintMismatch(f'{out}: {error}') from None
    return found


def write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one, also after a power cut."""
    temporary = path.with_name(f'.{path.name}.new')
    try:
        with open(temporary, 'w', encoding='utf-8') as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    seal.fsync_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f'cannot write {path}: {error.strerror or error}') from error
