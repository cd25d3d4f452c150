"""`tensorflow-datasets` builders of the datasets, in array_record files, without TensorFlow.

    builder = builders.of(datasets.get('enwik8'))(data_dir='/data', file_format='array_record')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    builder.as_data_source('train')[0]['text']

Examples are written in the order in which they are read, one at a time. TFDS's own way to write collects a split in
memory, and one of over 1 GB in files that it opens with TensorFlow.
"""

from __future__ import annotations

import contextlib
import io
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from backbone.errors import DataError
from harness.data.datasets import Dataset
from harness.data.records import reason

EXAMPLES_PER_FILE = 100_000
_READ, _WRITE, _WRITE_BYTES = 64, 1024, 1 << 23  # examples at once; TFDS writes its metadata after each lot

_FEATURES = {'text': tfds.features.Text, 'texts': lambda: tfds.features.Tensor(shape=(None,), dtype=np.str_),
             'ids': lambda: tfds.features.Tensor(shape=(None,), dtype=np.int32),
             'flag': lambda: tfds.features.Scalar(np.bool_)}


class DocumentBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds `dataset` from the files in DownloadConfig.manual_dir. A split without examples is left out."""

    dataset: Dataset
    url_infos = None  # nothing is downloaded; TFDS would look for checksums, and for a package it does not require

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: _FEATURES[kind]() for name, kind in self.dataset.fields.items()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                     disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder, files = self.dataset.folder(dl_manager.manual_dir)
        return {split: self._generate_examples(read) for split, read in self.dataset.read(folder, files).items()}

    def _generate_examples(self, read) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(read())

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        info = self._info()  # of the temporary directory that TFDS renames afterwards, as `self.data_dir` is by now
        writer = tfds.core.SequentialWriter(info, EXAMPLES_PER_FILE, file_format='array_record')
        for split, generator in self._split_generators(dl_manager).items():
            for lot in _lots(example for _, example in generator):
                writer.initialize_splits([split], fail_if_exists=False)
                writer.add_examples({split: lot})
        writer.close_all()
        self.info.set_splits(info.splits)


def _lots(examples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    lot, size = [], 0
    for example in examples:
        lot.append(example)
        size += sum(len(value) for value in example.values() if isinstance(value, bytes))
        if len(lot) == _WRITE or size >= _WRITE_BYTES:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


def of(dataset: Dataset) -> type[DocumentBuilder]:
    """The builder class of a dataset. It is not registered with TFDS: nobody else's names can clash with it."""
    camel = re.sub(r'(?:^|_)(.)', lambda match: match[1].upper(), dataset.name)
    body = {'dataset': dataset, 'name': dataset.name, 'VERSION': tfds.core.Version(dataset.version),
            'MANUAL_DOWNLOAD_INSTRUCTIONS': f'Needs {dataset.expects}.', '__module__': __name__}
    return types.new_class(camel, (DocumentBuilder,), {'skip_registration': True}, lambda space: space.update(body))


def build(dataset: Dataset, manual_dir: Path, target: Path) -> None:
    """Makes the TFDS directory `target` from the files in `manual_dir`."""
    builder = of(dataset)(data_dir=str(target) + '.tfds', file_format='array_record')
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes; that is a temporary name
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    except RuntimeError as error:  # what array_record raises
        raise DataError(f'{target}: cannot be written ({reason(error)})') from error
    Path(builder.data_dir).rename(target)


def splits(folder: Path) -> dict[str, int]:
    """{split: number of examples} of a prepared TFDS directory. Errors: DataError where it is none."""
    return {name: info.num_examples for name, info in _open(folder).info.splits.items()}


def examples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split, in order. Errors: DataError names the file and the record that is damaged."""
    builder = _open(folder)
    source = builder.as_data_source(split)
    for start in range(0, len(source), _READ):
        numbers = range(start, min(start + _READ, len(source)))
        try:
            chunk = source.__getitems__(numbers)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(builder, split, source, numbers) or error from error
        yield from chunk


def _open(folder: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS has no error of its own for this
        raise DataError(f'{folder}: not a prepared tensorflow-datasets directory ({reason(error)})') from error


def _damaged(builder, split: str, source, numbers: range) -> DataError | None:
    info = builder.info.splits[split]
    for number in numbers:
        try:
            source[number]
        except Exception as error:
            shard, first = 0, 0
            while number >= first + info.shard_lengths[shard]:
                first += info.shard_lengths[shard]
                shard += 1
            return DataError(f'{info.filepaths[shard]}: record {number - first} is damaged ({reason(error)})')
    return None
