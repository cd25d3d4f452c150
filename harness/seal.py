"""The seal of a finished checkpoint: `headway.json`, with the size and checksum of every file beside it.

It is written into the temporary folder before that is renamed, so a step's folder has it from the first moment on;
one without it was damaged. A torn, truncated, missing or changed file is found before a byte of it is used.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.errors import FormatError

FORMAT = 1
SEAL = 'headway.json'
CHUNK = 1 << 22  # bytes read at once
# Names in the step's folder itself that are not sealed: orbax writes them later, and nothing here reads them.
UNSEALED = {SEAL, '_CHECKPOINT_METADATA', 'commit_success.txt'}


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Seals what is in `folder` together with `content` (JSON), and makes all of it durable. Errors: OSError."""
    found = files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda name: measure(folder / name, durable=True), found))
    body = {'format': FORMAT, 'files': dict(zip(found, sums, strict=True)), **content}
    with (folder / SEAL).open('w') as sink:
        sink.write(_text(body))
        sink.flush()
        os.fsync(sink.fileno())
    for place in {folder, *(path for path in folder.rglob('*') if path.is_dir())}:
        fsync_folder(place)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """(what the seal holds, ''), or ({}, what is wrong with it). Errors: FormatError for a later version's."""
    try:
        text = (folder / SEAL).read_text()
        body = json.loads(text)['sealed']
        if text != _text(body):
            return {}, f'{SEAL} does not match its own checksum'
    except FileNotFoundError:
        return {}, f'{SEAL} is missing'
    except OSError as error:
        return {}, f'{SEAL} cannot be read ({error.strerror})'
    except (ValueError, KeyError, TypeError):
        return {}, f'{SEAL} is damaged'
    if body.get('format') != FORMAT:
        raise FormatError(f'{folder / SEAL}: format {body.get("format")} is not read, only {FORMAT}')
    return body, ''


def fault(folder: Path, sealed: Mapping[str, Sequence[int]]) -> str:
    """The first file that is not as it was sealed, in words; '' where all are. sealed: {name: (bytes, crc32)}."""
    for name, (size, _) in sealed.items():  # the cheap check of all, before the first whole read
        try:
            now = (folder / name).stat().st_size
        except FileNotFoundError:
            return f'{name} is missing'
        except OSError as error:
            return f'{name} cannot be read ({error.strerror})'
        if now != size:
            return f'{name} has {now} of {size} bytes'

    def changed(name: str) -> str:
        try:
            return '' if measure(folder / name) == list(sealed[name]) else f'{name} does not match its checksum'
        except OSError as error:
            return f'{name} cannot be read ({error.strerror})'

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(changed, sealed)), '')


def files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    return sorted(name for name in names if name not in UNSEALED)


def measure(path: Path, durable: bool = False) -> list[int]:
    """[bytes, crc32]. durable: also waits until the file is on the disk, not only in its cache."""
    size, crc = 0, 0
    with path.open('rb') as source:
        while chunk := source.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        if durable:
            os.fsync(source.fileno())
    return [size, crc]


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(body: Mapping[str, Any]) -> str:
    """One spelling for one content, so that comparing the text finds any changed byte."""
    inner = json.dumps(body, sort_keys=True, separators=(',', ':'))
    return f'{{"crc32":{zlib.crc32(inner.encode())},"sealed":{inner}}}\n'
