"""Files of one JSON object a line: plain, .gz or .zst, read as a stream."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from backbone.errors import DataError

_ENDINGS = ('', '.gz', '.zst')
_BUFFER = 1 << 20


def find(folder: Path, pattern: str) -> list[Path]:
    """The files anywhere below `folder` that match, packed or not, in order of their names."""
    found = {path for ending in _ENDINGS for path in folder.rglob(pattern + ending)
             if path.is_file() and not path.name.startswith('.')}
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object). Empty lines are passed over.

    Errors: DataError names the file and line that is no JSON object, and a file that is damaged or ends too soon.
    """
    number = 0
    try:
        with contextlib.closing(_open(path)) as source:
            for number, line in enumerate(source, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise DataError(f'{path} line {number}: no JSON ({error})') from error
                    if not isinstance(row, dict):
                        raise DataError(f'{path} line {number}: not a JSON object')
                    yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: damaged after line {number} ({error})') from error


def to_bytes(text: str) -> bytes:
    """UTF-8; JSON may hold half of a surrogate pair, which has none."""
    return text.encode('utf-8', errors='replace')


def _open(path: Path) -> BinaryIO:
    if path.suffix == '.gz':
        return gzip.open(path)
    if path.suffix == '.zst':
        import pyarrow  # comes with tensorflow-datasets; Python 3.11 has no zstd of its own
        return io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'), _BUFFER)
    return path.open('rb', buffering=_BUFFER)
