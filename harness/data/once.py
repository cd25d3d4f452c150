"""Folders that are made once: whole or not there, by one process at a time, and made again when found damaged.

A folder is built under a temporary name beside its place, its files are listed with their sizes in `headway.json`, and
it is renamed. What a killed process left is removed by the next one. Records inside carry their own checksums
(array_record), so sizes are all that has to be compared at every start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.errors import DataError

MANIFEST = 'headway.json'
_CHUNK = 1 << 20


def made_once(folder: Path, what: str, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `make(temporary)` said of the folder, which afterwards is at `folder`; made only if it is not there whole.

    what: for the message, e.g. 'packing enwik8'. make: creates the path it is given as a folder, returns JSON.
    Errors: DataError where the disk refuses; what `make` raises. Then nothing is left behind.
    """
    said, problem = _look(folder)
    if not problem:
        return said
    with _explained(folder), _locked(folder):
        said, problem = _look(folder)  # another process may have made it while this one waited
        if not problem:
            return said
        if problem != 'missing':
            _tell(f'{folder} is damaged ({problem}); making it again')
        _tell(what)
        for left in folder.parent.glob(f'.{folder.name}.partial-*'):
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder.parent / f'.{folder.name}.partial-{os.getpid()}'
        try:
            said = dict(make(temporary))
            _seal(temporary, said)
            if folder.exists():
                # Readers of the old one keep their open files.
                folder.rename(folder.parent / f'.{folder.name}.partial-old')
            temporary.rename(folder)
        finally:
            for left in folder.parent.glob(f'.{folder.name}.partial-*'):
                shutil.rmtree(left, ignore_errors=True)
    return said


def content_hash(files: Sequence[Path], root: Path, memo: Path) -> str:
    """sha256 over the names below `root` and the bytes of `files`, in the order given.

    Remembered in `memo` by name, size and time of change, so that a start does not read everything again.
    Errors: DataError for a file that cannot be read.
    """
    try:
        stats = [path.stat() for path in files]
        names = [path.relative_to(root).as_posix() for path in files]
        listing = [str(root.resolve()), [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]]
        note = memo / digest(listing)
        with contextlib.suppress(OSError):
            known = note.read_text()
            if len(known) == 64:
                return known
        total = hashlib.sha256()
        for name, path in zip(names, files, strict=True):
            with path.open('rb') as source:
                total.update(f'{name}\0{hashlib.file_digest(source, "sha256").hexdigest()}\n'.encode())
    except OSError as error:
        raise DataError(f'{error.filename or root}: cannot be read ({error.strerror})') from error
    found = total.hexdigest()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs only time
        memo.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f'.{note.name}.{os.getpid()}')
        temporary.write_text(found)
        temporary.replace(note)
    return found


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _look(folder: Path) -> tuple[dict[str, Any], str]:
    """(what was said of the folder, '') or ({}, what is wrong with it)."""
    if not folder.exists():
        return {}, 'missing'
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, said = manifest['files'], manifest['said']
        for name, size in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return {}, f'{name} has {found} of {size} bytes'
        return said, ''
    except FileNotFoundError as error:
        return {}, f'{Path(error.filename).name} is missing'
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f'{MANIFEST} cannot be read'


def _seal(folder: Path, said: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    for path in files:
        with path.open('rb') as done:
            os.fsync(done.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    with (folder / MANIFEST).open('w') as sink:
        json.dump({'files': sizes, 'said': said}, sink, indent=1)
        sink.flush()
        os.fsync(sink.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f'.{folder.name}.lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f'waiting for another process that makes {folder}')
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f'disk full while writing {folder}') from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f'cannot write {folder} ({error.strerror}); set data.data_dir to a writable '
                            'directory') from error
        raise DataError(f'{folder}: {error}') from error


def _tell(message: str) -> None:
    print(f'headway: {message}', file=sys.stderr, flush=True)
