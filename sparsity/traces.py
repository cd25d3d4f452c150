"""Contexts and the scores that belong to them, kept: one record an example, in array_record files.

    folder/traces.json                        what it is of (`key`), the fields of a record, how many, how many a file
    folder/traces-00000.array_record ...      `per_file` records each

A file is written under another name and renamed when it is whole, so a run that was killed goes on with the first file
that is missing, and makes the same bytes as one that was not: what is in file i follows from i alone.

Scores are stored in 16 bits with the largest of each layer beside them in 32: below 6e-8 of that they are 0. Without it
squared gradients of a real model are 0 altogether in that format.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from backbone.errors import ConfigError, DataError
from sparsity.config import PARTS

MANIFEST = 'traces.json'
FORMAT = 1
_OPTIONS = 'group_size:1,uncompressed'
Example = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a record holds: context [shape], scores of every layer {'heads': [L, H'], 'neurons': [L, NB]}.

    dtype: 'float16' or 'float32', of contexts and scores.
    """

    context: tuple[int, ...]
    heads: tuple[int, int]
    neurons: tuple[int, int]
    dtype: str = 'float16'

    def __post_init__(self):
        if self.dtype not in ('float16', 'float32'):
            raise ConfigError(f'traces: dtype must be float16 or float32, got {self.dtype!r}')

    def fields(self) -> list[tuple[str, tuple[int, ...], np.dtype]]:
        kept, wide = np.dtype(self.dtype), np.dtype(np.float32)
        found: list[tuple[str, tuple[int, ...], np.dtype]] = [('context', self.context, kept)]
        for part in PARTS:
            shape = getattr(self, part)
            found += [(f'{part}_largest', shape[:1], wide), (part, shape, kept)]
        return found

    def to_bytes(self, example: Example) -> bytes:
        """Errors: DataError for another shape, and for what is not finite."""
        stored = {'context': np.asarray(example['context'], np.float32)}
        for part in PARTS:
            scores = np.asarray(example[part], np.float32)
            largest = np.abs(scores).max(-1)
            stored |= {f'{part}_largest': largest, part: scores / np.where(largest > 0, largest, 1)[..., None]}
        parts = []
        for name, shape, dtype in self.fields():
            with np.errstate(over='ignore'):
                array = stored[name].astype(dtype)
            if array.shape != shape or not np.isfinite(array).all():
                raise DataError(f'traces: {name} of {array.shape} is not finite, or not of {shape}, in {dtype}')
            parts.append(array.tobytes())
        return b''.join(parts)

    def from_bytes(self, record: bytes) -> dict[str, np.ndarray]:
        """{'context', 'heads', 'neurons'} float32. Errors: DataError for a record of another length."""
        found, at = {}, 0
        for name, shape, dtype in self.fields():
            count = int(np.prod(shape))
            if at + count * dtype.itemsize > len(record):
                raise DataError(f'traces: a record has {len(record)} bytes, too few')
            found[name] = np.frombuffer(record, dtype, count, at).reshape(shape).astype(np.float32)
            at += count * dtype.itemsize
        if at != len(record):
            raise DataError(f'traces: a record has {len(record)} bytes instead of {at}')
        scores = {part: found[part] * found[f'{part}_largest'][..., None] for part in PARTS}
        return {'context': found['context'], **scores}


def write(folder: Path, key: Mapping[str, Any], layout: Layout, count: int, per_file: int,
          examples: Callable[[int, int], Sequence[Example]]) -> int:
    """Writes what is missing of `count` examples; how many that were. examples(first, last): numbers first..last - 1.

    key: JSON, whatever the traces depend on (base, rows, criterion, spans). Errors: ConfigError names what of the key a
    folder that is there has otherwise; DataError where the disk refuses.
    """
    if count < 1 or per_file < 1:
        raise ConfigError(f'traces: count and per_file must be at least 1, got {count} and {per_file}')
    wanted = json.loads(json.dumps({'format': FORMAT, 'key': dict(key), 'layout': dataclasses.asdict(layout),
                                    'count': count, 'per_file': per_file}))
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _same(folder, _manifest(folder), wanted)
    else:
        _replace(folder / MANIFEST, lambda path: path.write_text(json.dumps(wanted, indent=1, sort_keys=True)))
    made = 0
    for number in range(-(-count // per_file)):
        path = folder / file_name(number)
        if path.exists():
            continue
        first = number * per_file
        last = min(first + per_file, count)
        records = [layout.to_bytes(example) for example in examples(first, last)]
        if len(records) != last - first:
            raise DataError(f'{path}: {len(records)} examples instead of {last - first}')
        _replace(path, lambda path, records=records: _write_file(path, records))
        made += len(records)
    return made


class Traces:
    """What `write` wrote. Errors: DataError where it is not whole; ConfigError where `key` is given and is another."""

    def __init__(self, folder: Path, key: Mapping[str, Any] | None = None):
        said = _manifest(folder)
        if key is not None:
            _same(folder, said, said | {'key': json.loads(json.dumps(dict(key)))})
        self.key, self._count, self._per_file = said['key'], said['count'], said['per_file']
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in said['layout'].items()}
        self.layout = Layout(**fields)
        self._folder = folder
        paths = [folder / file_name(i) for i in range(-(-self._count // self._per_file))]
        if missing := [path.name for path in paths if not path.exists()]:
            raise DataError(f'{folder}: {len(missing)} of {len(paths)} files are missing ({missing[0]}); run what '
                            'makes it again, it goes on from there')
        self._readers = [ArrayRecordReader(str(path), options='readahead_buffer_size:0',
                                           file_reader_buffer_size=1 << 12) for path in paths]

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """{'context': [N, ...], 'heads': [N, L, H'], 'neurons': [N, L, NB]} float32. Errors: DataError."""
        found = []
        for number in numbers:
            if not 0 <= number < self._count:
                raise DataError(f'{self._folder}: trace {number} of {self._count}')
            file, inside = divmod(int(number), self._per_file)
            try:
                record = self._readers[file].read([inside])[0]
            except (RuntimeError, IndexError) as error:
                raise DataError(f'{self._folder / file_name(file)}: record {inside} is damaged; delete the file to '
                                f'have it made again ({str(error).splitlines()[0][:200]})') from error
            found.append(self.layout.from_bytes(record))
        return {field: np.stack([example[field] for example in found]) for field in found[0]}

    def mean(self) -> dict[str, np.ndarray]:
        """{'heads': [L, H'], 'neurons': [L, NB]}: the mean score over all examples, summed in double."""
        total = {part: np.zeros(getattr(self.layout, part)) for part in PARTS}
        for number in range(self._count):
            example = self.read([number])
            for part in PARTS:
                total[part] += example[part][0]
        return {part: (a / self._count).astype(np.float32) for part, a in total.items()}


def file_name(number: int) -> str:
    return f'traces-{number:05}.array_record'


def _write_file(path: Path, records: Sequence[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), _OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    """`make` writes the file beside its place; then it is there whole. Errors: DataError."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        make(temporary)
        with temporary.open('rb') as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise DataError(f'{path}: cannot be written ({str(error).splitlines()[0][:200]})') from error
    finally:
        temporary.unlink(missing_ok=True)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f'{folder}: no traces ({error})') from None


def _same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    flat = lambda tree: {**{f'key.{k}': v for k, v in tree['key'].items()},
                         **{k: v for k, v in tree.items() if k != 'key'}}
    found, wanted = flat(found), flat(wanted)
    if differ := sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)):
        raise ConfigError(f'{folder} holds other traces: {", ".join(differ)} differ ('
                          + '; '.join(f'{k}: {found.get(k)!r}, wanted {wanted.get(k)!r}' for k in differ)[:300] + ')')
