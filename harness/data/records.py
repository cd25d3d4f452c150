"""array_record files of byte strings: written in order, read at random; damage is named by file and record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from backbone.errors import DataError

# One record a chunk, so that a row is read without its neighbours; they are small and read often, so not packed.
_OPTIONS = 'group_size:1,uncompressed'


def reason(error: Exception) -> str:
    """The first part of what a library says."""
    return str(error).splitlines()[0].split('; ')[0][:200] if str(error) else type(error).__name__


def write(folder: Path, records: Iterable[bytes], per_file: int) -> int:
    """Writes rows-00000.array_record, ... of `per_file` records each; how many records there were."""
    count, writer = 0, None
    try:
        for record in records:
            if count % per_file == 0:
                if writer is not None:
                    writer.close()
                writer = ArrayRecordWriter(str(folder / name(count // per_file)), _OPTIONS)
            writer.write(record)
            count += 1
    except RuntimeError as error:
        raise DataError(f'{folder}: cannot be written ({reason(error)})') from error
    finally:
        if writer is not None:
            try:
                writer.close()
            except RuntimeError as error:
                raise DataError(f'{folder}: cannot be written ({reason(error)})') from error
    return count


def name(number: int) -> str:
    return f'rows-{number:05}.array_record'


class Records:
    """`count` records in files of `per_file`. Safe to read from several threads."""

    def __init__(self, folder: Path, count: int, per_file: int):
        self._folder, self._count, self._per_file = folder, count, per_file
        self._readers = [ArrayRecordReader(str(folder / name(i)), options='readahead_buffer_size:0',
                                           file_reader_buffer_size=1 << 12) for i in range(-(-count // per_file))]
        found = sum(reader.num_records() if reader.ok() else 0 for reader in self._readers)
        if found != count:
            bad = next((name(i) for i, reader in enumerate(self._readers) if not reader.ok()), '')
            raise DataError(f'{folder / bad}: {found} of {count} records can be read; delete {folder} to have it '
                            'made again')

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """The records with these numbers, in that order. Errors: DataError names file and record."""
        found: list[bytes] = [b''] * len(numbers)
        by_file: dict[int, list[tuple[int, int]]] = {}
        for place, number in enumerate(numbers):
            file, inside = divmod(int(number), self._per_file)
            by_file.setdefault(file, []).append((place, inside))
        for file, wanted in by_file.items():
            for (place, _), record in zip(wanted, self._of_file(file, [i for _, i in wanted]), strict=True):
                found[place] = record
        return found

    def _of_file(self, file: int, inside: list[int]) -> list[bytes]:
        try:
            return self._readers[file].read(inside)
        except RuntimeError as error:
            for number in inside:
                try:
                    self._readers[file].read([number])
                except RuntimeError as own:
                    raise self.damaged(file * self._per_file + number, reason(own)) from own
            raise DataError(f'{self._folder / name(file)}: cannot be read ({reason(error)})') from error

    def damaged(self, number: int, why: str) -> DataError:
        """The error for a record that is not what it should be."""
        file, inside = divmod(number, self._per_file)
        return DataError(f'{self._folder / name(file)}: record {inside} is damaged ({why}); delete {self._folder} to '
                         'have it made again')
