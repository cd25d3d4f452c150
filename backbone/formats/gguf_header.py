"""A GGUF header, read with every count, length, size and offset held against the file before it is used.

The layout is that of the GGUF specification, versions 2 and 3, little-endian: magic, version, counts,
metadata, tensor descriptions, padding, data.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import gguf
import numpy as np

from backbone.errors import FormatError
from backbone.formats.tensors import PLAIN, QUANTISED, Stored, block_size, encoded_bytes, map_file

MAGIC = b'GGUF'
_MAX_DIMS = 4
_MAX_NAME = 1024
_MAX_ALIGNMENT = 1 << 20
# Least bytes an entry can take: bounds the counts before a loop starts.
_MIN_PAIR = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8

_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: 'B', 10: 'Q', 11: 'q', 12: 'd'}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ENCODINGS = {gguf.GGMLQuantizationType[name].value: name for name in (*PLAIN, *QUANTISED)}


@dataclasses.dataclass(frozen=True)
class Header:
    """metadata: plain Python values; arrays of numbers stay numpy arrays, arrays of strings are lists."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class _Reader:
    """A cursor that cannot leave the file."""

    def __init__(self, data: Any, where: str):
        self.data, self.size, self.at, self.where = data, len(data), 0, where

    def fail(self, what: str) -> FormatError:
        return FormatError(f'{self.where}: {what}')

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f'{what} runs past the end of the file ({count} bytes at {self.at} of {self.size})')
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack('<' + code, self.take(struct.calcsize('<' + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A count of things that take at least `least` bytes each."""
        found = self.number('Q', what)
        if found > (self.size - self.at) // least:
            raise self.fail(f'{what} is {found}, more than the file can hold')
        return found

    def string(self, what: str, limit: int | None = None) -> str:
        """A text; with `limit` a name: not empty, of at most that many bytes, on one line."""
        size = self.count(1, f'length of {what}')
        if limit is not None and not 0 < size <= limit:
            raise self.fail(f'length of {what} is {size}')
        try:
            found = self.take(size, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f'{what} is not UTF-8') from None
        if limit is not None and not found.isprintable():
            raise self.fail(f'{what} {ascii(found[:80])} is not printable')
        return found

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(f'{what} has unknown type {kind}')
        found = self.number(_SCALARS[kind], what)
        if kind != _BOOL:
            return found
        if found > 1:
            raise self.fail(f'{what} is neither true nor false')
        return bool(found)

    def array(self, what: str) -> Any:
        kind = self.number('I', f'element type of {what}')
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(8, f'length of {what}'))]
        if kind not in _SCALARS:
            raise self.fail(f'{what} has unknown element type {kind}')
        dtype = np.dtype('?' if kind == _BOOL else '<' + _SCALARS[kind])
        count = self.count(dtype.itemsize, f'length of {what}')
        raw = self.take(count * dtype.itemsize, what)
        if kind == _BOOL and max(raw, default=0) > 1:
            raise self.fail(f'{what} is neither true nor false')
        return np.frombuffer(raw, dtype)


def read_header(path: Any) -> Header:
    """Metadata and tensor table of a GGUF file; the data itself stays on disk (memory-mapped).

    Errors: FormatError names the file and what is wrong with it. Memory stays within a small multiple of
    the header's own size, whatever the numbers in it claim.
    """
    reader = _Reader(map_file(path), str(path))
    if reader.take(4, 'magic') != MAGIC:
        raise reader.fail('not a GGUF file')
    version = reader.number('I', 'version')
    if version not in (2, 3):
        big = ' (big-endian files are not read)' if version & 0xffff == 0 else ''
        raise reader.fail(f'GGUF version {version} is not read{big}')
    num_tensors = reader.count(_MIN_TENSOR, 'tensor count')
    num_pairs = reader.count(_MIN_PAIR, 'metadata count')
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = reader.string('metadata key', _MAX_NAME)
        if key in metadata:
            raise reader.fail(f'metadata {key} is there twice')
        metadata[key] = reader.value(reader.number('I', f'type of {key}'), key)
    if metadata.get('split.count', 1) != 1:
        raise reader.fail('one part of a split model; join the parts first')
    described = [_describe(reader) for _ in range(num_tensors)]
    return Header(metadata, _place(reader, described, metadata.get('general.alignment', 32)))


def _describe(reader: _Reader) -> tuple[str, tuple[int, ...], str, int]:
    name = reader.string('tensor name', _MAX_NAME)
    dims = reader.number('I', f'dimensions of {name}')
    if not 1 <= dims <= _MAX_DIMS:
        raise reader.fail(f'tensor {name} has {dims} dimensions')
    shape = tuple(reader.number('Q', f'shape of {name}') for _ in range(dims))[::-1]
    kind = reader.number('I', f'type of {name}')
    if kind not in _ENCODINGS:
        known = {k.value: k.name for k in gguf.GGMLQuantizationType}
        raise reader.fail(f'tensor {name} is of type {known.get(kind, kind)}, '
                          f'read are {", ".join(_ENCODINGS.values())}')
    return name, shape, _ENCODINGS[kind], reader.number('Q', f'offset of {name}')


def _place(reader: _Reader, described: list, alignment: Any) -> dict[str, Stored]:
    """Checks where the tensors lie: inside the file, aligned, none on another."""
    power = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not power:
        raise reader.fail(f'alignment {alignment} is not a power of two')
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, shape, encoding, offset in described:
        if name in tensors:
            raise reader.fail(f'tensor {name} is there twice')
        if 0 in shape or shape[-1] % block_size(encoding)[0]:
            raise reader.fail(f'tensor {name} of type {encoding} cannot have shape {list(shape)}')
        size = encoded_bytes(encoding, shape)
        if offset % alignment or start + offset + size > reader.size:
            raise reader.fail(f'tensor {name} lies outside the file '
                              f'({size} bytes at {start + offset} of {reader.size})')
        tensors[name] = Stored(name, shape, encoding, reader.data, start + offset)
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise reader.fail(f'tensor {tensor.name} lies on another one')
        end = tensor.offset + tensor.nbytes
    return tensors
