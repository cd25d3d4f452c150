"""From a config to rows: the dataset is prepared, tokenised and packed once, and then read at random.

    data_dir/prepared/<dataset>-<hash>/        the tensorflow-datasets directory
    data_dir/rows/<dataset>-<split>-<hash>/    the packed rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbone import catalogue
from backbone.errors import ConfigError, DataError
from backbone.tokenizer import Tokenizer
from harness.data import datasets, encoding, once, packing
from harness.data.records import Records, write

FORMAT = 1  # of packed rows; another one makes them anew
ROWS_PER_FILE = 1 << 20
LOSS_ON = ('all', 'answer')


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset, the files it is made of, and where what is made from them is kept."""

    dataset: datasets.Dataset
    folder: Path
    identity: str  # sha256 of the files and of the version of the dataset
    data_dir: Path

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Source:
        """From the `data` part of a config. Errors: ConfigError, DataError, FetchError."""
        dataset = datasets.get(data['dataset'])
        folder, files = dataset.folder(data.get('manual_dir'))
        data_dir = _data_dir(data.get('data_dir'))
        content = once.content_hash(files, folder, data_dir / 'hashes')
        return cls(dataset, folder, once.digest([dataset.name, dataset.version, content]), data_dir)

    def prepared(self) -> Path:
        """The tensorflow-datasets directory, made if it is not there."""
        folder = self.data_dir / 'prepared' / f'{self.dataset.name}-{self.identity[:16]}'

        def make(temporary: Path) -> dict[str, Any]:
            from harness.data import builders  # imports tensorflow-datasets, which a restart does without
            builders.build(self.dataset, self.folder, temporary)
            return {'dataset': self.dataset.name, 'version': self.dataset.version, 'identity': self.identity,
                    'splits': builders.splits(temporary)}

        said = once.made_once(folder, f'preparing {self.dataset.name} from {self.folder}', make)
        if not said['splits']:
            raise DataError(f'{self.folder} holds no text for {self.dataset.name}')
        return folder

    def examples(self, split: str) -> Iterator[datasets.Example]:
        """Errors: DataError for a split that is empty."""
        from harness.data import builders
        folder = self.prepared()
        if split not in (there := builders.splits(folder)):
            raise DataError(f'{self.dataset.name} from {self.folder}: split {split!r} is empty; there are '
                            + ', '.join(f'{name} ({count})' for name, count in there.items()))
        return builders.examples(folder, split)


def _data_dir(given: str | None) -> Path:
    if not given:
        return catalogue.cache_dir() / 'datasets'
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        raise DataError(f'data.data_dir {path} is not a directory')
    if not path.absolute().parent.is_dir():
        raise DataError(f'data.data_dir {path} does not exist, and neither does the directory it would be made in')
    return path


class Rows:
    """Packed rows. `rows[i]` is a dict of [seq_len] arrays, `rows.batch([i, ...])` of [B, seq_len] arrays.

    fingerprint: names the numbers in it, whatever machine made them. info: what was packed (rows, documents, tokens,
    targets that count, bytes).
    """

    def __init__(self, folder: Path, info: Mapping[str, Any]):
        self.folder, self.info = folder, dict(info)
        self.fingerprint: str = info['fingerprint']
        self.seq_len: int = info['seq_len']
        self._dtype = np.dtype(info['dtype'])
        self._records = Records(folder, info['rows'], info['rows_per_file'])

    def __len__(self) -> int:
        return self.info['rows']

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f'row {i} of {len(self)}')
        return {name: array[0] for name, array in self.batch([i % len(self)]).items()}

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows with these numbers, stacked. Errors: DataError names a record that is damaged."""
        found = []
        for number, record in zip(numbers, self._records.read(numbers), strict=True):
            try:
                found.append(packing.arrays(packing.from_bytes(record, self._dtype), self.seq_len))
            except (ValueError, IndexError) as error:
                raise self._records.damaged(int(number), str(error)) from error
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


def open_rows(data: Mapping[str, Any], split: str, tokenizer: Tokenizer) -> Rows:
    """The packed rows of a split. data: the `data` part of a config (docs/data.md).

    Errors: ConfigError for a value out of range, DataError for what is missing, empty or damaged, FetchError.
    """
    seq_len, loss_on = data['seq_len'], data.get('loss_on') or None
    if not isinstance(seq_len, int) or seq_len < 1:
        raise ConfigError(f'data.seq_len must be a whole number of at least 1, got {seq_len!r}')
    source = Source.of(data)
    dataset = source.dataset
    if split not in dataset.splits:
        raise DataError(f'{dataset.name} has no split {split!r}, it has {", ".join(dataset.splits)}')
    loss_on = loss_on or ('answer' if dataset.has_answers else 'all')
    if loss_on not in LOSS_ON:
        raise ConfigError(f'data.loss_on: {loss_on!r} is not one of {", ".join(LOSS_ON)}')
    if loss_on == 'answer' and not dataset.has_answers:
        raise ConfigError(f'data.loss_on is answer, but {dataset.name} is running text')
    key = {'format': FORMAT, 'dataset': dataset.name, 'identity': source.identity, 'split': split, 'loss_on': loss_on,
           'tokenizer': tokenizer_hash(tokenizer), 'seq_len': seq_len}
    fingerprint = once.digest(key)
    folder = source.data_dir / 'rows' / f'{dataset.name}-{split}-{fingerprint[:16]}'
    what = f'packing {dataset.name}/{split} into rows of {seq_len} tokens'
    return Rows(folder, once.made_once(folder, what, lambda temporary: _pack(
        temporary, source, split, tokenizer, loss_on == 'answer', seq_len) | key | {'fingerprint': fingerprint}))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides which ids a text becomes."""
    parts = [tokenizer.backend.to_str(), tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos,
             tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pack(folder: Path, source: Source, split: str, tokenizer: Tokenizer, answers_only: bool, seq_len: int
          ) -> dict[str, Any]:
    folder.mkdir()
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    tally = {'documents': 0, 'tokens': 0, 'targets': 0}

    def pieces() -> Iterator[tuple[str, list[datasets.Piece]]]:
        for example in source.examples(split):
            tally['documents'] += 1
            yield f'{source.folder}: {example["id"].decode()}', source.dataset.pieces(example, tokenizer)

    def counted(documents: Iterator[encoding.Document]) -> Iterator[encoding.Document]:
        for document in documents:
            tally['tokens'] += len(document.ids)
            tally['targets'] += len(document.ids) - 1 if document.counts is None else int(document.counts[1:].sum())
            yield document

    documents = counted(encoding.encode(pieces(), tokenizer, answers_only))
    rows = write(folder, map(packing.to_bytes, packing.pack(documents, seq_len, dtype)), ROWS_PER_FILE)
    if not rows:
        raise DataError(f'{source.dataset.name} from {source.folder}: split {split!r} has no text to predict')
    return {'rows': rows, 'rows_per_file': ROWS_PER_FILE, 'dtype': dtype.str} | tally
