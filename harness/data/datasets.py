"""Which texts there are: what files each is made of, and how they fall into splits and documents.

A `Dataset` is plain data and functions; `builders.py` makes the `tensorflow-datasets` builder of one. Another dataset
is another `Dataset`, named in the config by its dotted path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbone import catalogue
from backbone.errors import ConfigError, DataError
from harness import components
from harness.data import jsonl

Example = dict[str, Any]
Splits = Mapping[str, Callable[[], Iterator[Example]]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document. content: text (bytes), or token ids (integer array) where they are known exactly.

    answer: what a model that answers should have written. markup: text in which special tokens are spelled.
    """

    content: bytes | np.ndarray
    answer: bool = False
    markup: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A text to train on.

    version: of what the functions here do; another one makes everything anew.
    splits: the splits there can be. fields: {name: 'text', 'texts', 'ids' or 'flag'} of an example.
    expects: what its folder must hold, in words. find: those files. read: their examples, in a fixed order.
    pieces: an example as one document, given the tokenizer. source: catalogue key of its files, or None.
    has_answers: whether some pieces are answers.
    """

    name: str
    version: str
    splits: tuple[str, ...]
    fields: Mapping[str, str]
    expects: str
    find: Callable[[Path], Sequence[Path]]
    read: Callable[[Path, Sequence[Path]], Splits]
    pieces: Callable[[Example, Any], list[Piece]]
    source: str | None = None
    has_answers: bool = False

    def folder(self, manual_dir: str | os.PathLike | None) -> tuple[Path, list[Path]]:
        """Where its files lie, and which they are: in `manual_dir`, else as the catalogue has them.

        Errors: DataError for a folder that is missing, empty, or without the files; FetchError.
        """
        if manual_dir:
            folder = Path(manual_dir).expanduser()
            if not folder.is_dir():
                raise DataError(f'data.manual_dir {folder} is not a directory; it should hold {self.expects}')
        elif self.source is None:
            raise DataError(f'{self.name} cannot be fetched: set data.manual_dir to a directory with {self.expects}')
        else:
            path = catalogue.fetch(self.source)
            folder = path if path.is_dir() else path.parent
        files = list(self.find(folder))
        if not files:
            empty = ' is empty; it' if not any(folder.iterdir()) else ''
            raise DataError(f'{folder}{empty} should hold {self.expects}')
        return folder, files


def get(name: str) -> Dataset:
    """By name, or by dotted path. Errors: ConfigError."""
    from harness.data import conversations  # they are Datasets too
    known = {dataset.name: dataset for dataset in (*TEXTS, *conversations.DATASETS)}
    if name in known:
        return known[name]
    if '.' not in name:
        raise ConfigError(f'data.dataset: unknown {name!r}, one of {", ".join(known)}, or a dotted path')
    found = components.resolve(name, 'data.dataset')
    if not isinstance(found, Dataset):
        raise ConfigError(f'data.dataset: {name} is not a Dataset')
    return found


def plain_text(example: Example, tokenizer) -> list[Piece]:
    return [Piece(example['text'])]


def by_hash(keys: Sequence[str], held_out: float = 0.05) -> np.ndarray:
    """Which split each key falls into: 0 train, 1 validation, 2 test. Equal keys fall together; the order is no matter.

    `held_out` of the distinct keys go to each of the latter, at least one where there are three or more.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(f'headway/{key}'.encode()).digest()[:8], 'big') for key in keys],
                      np.uint64)
    distinct = np.unique(hashes)
    count = max(1, round(held_out * len(distinct))) if len(distinct) >= 3 else 0
    first = np.append(distinct, np.uint64(2 ** 64 - 1))[[count, 2 * count]]
    return np.where(hashes < first[0], 1, np.where(hashes < first[1], 2, 0)) if count else np.zeros(len(keys), int)


def _by_file(keep_for_test: Sequence[str] = ()) -> Callable[[Path, Sequence[Path]], Splits]:
    """Whole files to one split each. keep_for_test: names of files that evaluations read, so none may train on them."""
    def read(folder: Path, files: Sequence[Path]) -> Splits:
        names = [path.relative_to(folder).as_posix() for path in files]
        others = [name for name in names if name not in keep_for_test]
        chosen = dict.fromkeys(keep_for_test, 2) | dict(zip(others, by_hash(others), strict=True))

        def examples(split: int) -> Iterator[Example]:
            for name, path in zip(names, files, strict=True):
                if chosen[name] == split and (text := path.read_bytes()):
                    yield {'id': name, 'text': text}
        return {name: lambda split=i: examples(split) for i, name in enumerate(('train', 'validation', 'test'))}
    return read


_PAGE = b'\n  <page>\n'


def _read_enwik8(folder: Path, files: Sequence[Path]) -> Splits:
    """The usual split by bytes: 90 %, 5 %, 5 %. A document is a page, cut where a split ends."""
    path = files[0]
    size = path.stat().st_size

    def examples(start: int, stop: int) -> Iterator[Example]:
        if stop == start:
            return
        with path.open('rb') as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as text:
            while start < stop:
                page = text.find(_PAGE, start, stop)
                end = stop if page < 0 else page + 1
                yield {'id': f'byte {start}', 'text': text[start:end]}
                start = end

    cuts = [0, size * 90 // 100, size * 95 // 100, size]
    return {name: lambda i=i: examples(cuts[i], cuts[i + 1]) for i, name in enumerate(('train', 'validation', 'test'))}


def _read_lines(where: Callable[[str], str], fields: Mapping[str, Callable[[Example], Any]]
                ) -> Callable[[Path, Sequence[Path]], Splits]:
    """JSON lines of {'text': ...}, each file in the split that `where(its name)` says."""
    def read(folder: Path, files: Sequence[Path]) -> Splits:
        names = {path: path.relative_to(folder).as_posix() for path in files}

        def examples(split: str) -> Iterator[Example]:
            for path in files:
                if where(names[path]) == split:
                    for number, row in jsonl.rows(path):
                        place = f'{names[path]} line {number}'
                        if not isinstance(row.get('text'), str):
                            raise DataError(f'{path} line {number}: no "text"')
                        yield ({'id': place, 'text': jsonl.to_bytes(row['text'])}
                               | {name: jsonl.to_bytes(take(row)) for name, take in fields.items()})
        return {split: lambda split=split: examples(split) for split in sorted({where(n) for n in names.values()})}
    return read


def _pile_split(name: str) -> str:
    stem = name.rpartition('/')[2]
    return 'validation' if stem.startswith('val') else 'test' if stem.startswith('test') else 'train'


def _c4_split(name: str) -> str:
    return 'validation' if 'validation' in name.rpartition('/')[2] else 'train'


def _meta(row: Example) -> str:
    meta = row.get('meta')
    return str(meta.get('pile_set_name', '')) if isinstance(meta, Mapping) else json.dumps(meta)


def _python_files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ('site-packages', 'dist-packages', '__pycache__')]
        found += [Path(here, name) for name in names if name.endswith('.py')]
    return sorted(path for path in found if path.is_file())  # a link may lead nowhere


_THREE = ('train', 'validation', 'test')
_TEXT = {'id': 'text', 'text': 'text'}

TEXTS = (
    Dataset('enwik8', '1.0.0', _THREE, _TEXT, 'the file enwik8',
            lambda folder: [path for path in (folder / 'enwik8',) if path.is_file()],
            _read_enwik8, plain_text, 'enwik8'),
    Dataset('stdlib', '1.0.0', _THREE, _TEXT, 'Python files (*.py)', _python_files,
            _by_file(('heapq.py', 'difflib.py')), plain_text, 'stdlib'),
    Dataset('gutenberg', '1.0.0', _THREE, _TEXT, 'books (*.txt)', lambda folder: sorted(folder.rglob('*.txt')),
            _by_file(('carroll-alice.txt',)), plain_text, 'gutenberg'),
    Dataset('pile', '1.0.0', _THREE, _TEXT | {'subset': 'text'},
            'the shards of The Pile (train/*.jsonl.zst, val.jsonl.zst, test.jsonl.zst; also .jsonl.gz, .jsonl)',
            lambda folder: jsonl.find(folder, '*.jsonl'),
            _read_lines(_pile_split, {'subset': _meta}), plain_text),
    Dataset('c4', '1.0.0', ('train', 'validation'), _TEXT | {'url': 'text', 'timestamp': 'text'},
            'shards of C4 (c4-train.*.json.gz, c4-validation.*.json.gz; also .zst, .json)',
            lambda folder: jsonl.find(folder, 'c4-*.json'),
            _read_lines(_c4_split, {'url': lambda row: str(row.get('url', '')),
                                    'timestamp': lambda row: str(row.get('timestamp', ''))}), plain_text),
)
