"""Batches of rows: which rows a training batch holds follows from (seed, step) alone.

Rows are numbered through all epochs: batch `step` of B rows is numbers step * B ... step * B + B - 1, and every epoch
is a permutation of its own. So a run resumed at a step, on any number of hosts, goes on with the same global batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from backbone.errors import ConfigError, DataError, HeadwayError
from harness.data.rows import Rows

Batch = dict[str, np.ndarray]
_THREADS, _AHEAD = 2, 8  # batches are made on so many threads, so many steps ahead


class _Steps:
    """A random-access source of batches, for grain."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, take: slice):
        # grain numbers the epochs from the seed on; spread out, seed 1 is not seed 0 an epoch later.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(rows)).shuffle(seed=spread).repeat()
        self._order[0]  # grain sets up its statistics at the first look, and not safely on two threads
        self._rows, self._batch_size, self._take = rows, batch_size, np.arange(batch_size)[take]

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def numbers(self, step: int) -> list[int]:
        return [int(self._order[step * self._batch_size + int(i)]) for i in self._take]

    def __getitem__(self, step: int) -> Batch:
        try:
            return self._rows.batch(self.numbers(step))
        except HeadwayError:
            raise
        except Exception as error:  # on a thread of grain's: a named error instead of a bare one from afar
            raise DataError(f'batch {step} of {self._rows.folder} cannot be made: {error!r}') from error


class Batches(Iterator[Batch]):
    """An endless iterator; `close()` ends its threads without waiting for batches nobody wants."""

    def __init__(self, steps: _Steps, start_step: int):
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
        self._iterator.set_state({'next_index': start_step})

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def batches(rows: Rows, *, batch_size: int, seed: int, start_step: int = 0, take: slice = slice(None)) -> Batches:
    """Batches start_step, start_step + 1, ... for ever, made ahead on threads.

    take: which of a batch's rows this host wants, e.g. slice(8, 16). Each array is [rows taken, seq_len].
    Errors: ConfigError for a value out of range; DataError for fewer rows than a batch, and from `next` for a damaged
    record.
    """
    if batch_size < 1 or start_step < 0 or seed < 0:
        raise ConfigError(f'batch_size {batch_size}, start_step {start_step}, seed {seed}: at least 1, 0 and 0')
    if len(rows) < batch_size:
        raise DataError(f'{rows.folder} has {len(rows)} rows, fewer than a batch of {batch_size}')
    if not len(np.arange(batch_size)[take]):
        raise ConfigError(f'take {take} leaves nothing of a batch of {batch_size}')
    return Batches(_Steps(rows, batch_size, seed, take), start_step)


class EvalBatches(Sequence[Batch]):
    """Batches in the order of the rows, the last one filled up with rows that weigh nothing."""

    def __init__(self, rows: Rows, batch_size: int, numbers: np.ndarray):
        self._rows, self._batch_size, self._numbers = rows, batch_size, numbers

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def __getitem__(self, i: int) -> Batch:
        if not -len(self) <= i < len(self):
            raise IndexError(f'batch {i} of {len(self)}')
        first = i % len(self) * self._batch_size
        batch = self._rows.batch(self._numbers[first:first + self._batch_size])
        spare = self._batch_size - len(batch['tokens'])
        return {name: np.pad(array, ((0, spare),) + ((0, 0),) * (array.ndim - 1)) for name, array in batch.items()}


def eval_batches(rows: Rows, *, batch_size: int, count: int) -> EvalBatches:
    """At most `count` batches (0: all there are). Where they are not all, their rows are spread evenly over the split.

    Errors: ConfigError for a value out of range.
    """
    if batch_size < 1 or count < 0:
        raise ConfigError(f'batch_size {batch_size}, count {count}: at least 1 and 0')
    wanted = min(len(rows), batch_size * count) if count else len(rows)
    return EvalBatches(rows, batch_size, np.arange(wanted) * len(rows) // wanted)
