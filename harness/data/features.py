"""What a frozen model makes of each row, computed once and kept: training a head then never runs its trunk.

    data_dir/features/<split's rows>-<hash>/<name>.npy     [rows, seq_len, ...] bfloat16, as uint16

A task that wants it has `cached = True` and `features(base, batch) -> {name: [B, S, ...]}`, a function of the frozen
base and the batch alone. Its batches then hold those arrays beside tokens and targets (docs/training.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from harness.data import once
from harness.data.rows import Rows

FORMAT = 1


class FeatureRows:
    """Rows with their features: the same interface, more arrays in each batch."""

    def __init__(self, rows: Rows, arrays: Mapping[str, np.ndarray], fingerprint: str):
        self._rows, self._arrays = rows, arrays
        self.folder, self.info, self.seq_len, self.fingerprint = rows.folder, rows.info, rows.seq_len, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """As `Rows.batch`, with the features of those rows."""
        numbers = list(numbers)
        kept = {name: array[numbers].view(ml_dtypes.bfloat16) for name, array in self._arrays.items()}
        return self._rows.batch(numbers) | kept


def cached(rows: Rows, features: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]], base: Any,
           base_hash: str, name: str, batch_size: int) -> FeatureRows:
    """`rows` with `features(base, batch)`, made the first time and read from then on.

    base_hash, name: what the features depend on beside the rows: the base, and what is computed from it. The layers'
    matrices are rounded to bfloat16, as the features are: on a CPU that is faster, and as the residual stays in float32
    the error is below that of rounding everything.
    Errors: DataError where the disk refuses.
    """
    key = {'format': FORMAT, 'rows': rows.fingerprint, 'base': base_hash, 'features': name}
    fingerprint = once.digest(key)
    folder = rows.folder.parent.parent / 'features' / f'{rows.folder.name.rpartition("-")[0]}-{fingerprint[:16]}'
    run = jax.jit(lambda base, batch: {k: v.astype(jnp.bfloat16) for k, v in features(base, batch).items()})
    matrices = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 2 else a, base['layers'])  # stacked
    base, size = {**base, 'layers': matrices}, max(1, batch_size // 2)

    def make(temporary: Path) -> dict[str, Any]:
        temporary.mkdir()
        like = jax.eval_shape(run, base, rows.batch(np.zeros(size, int)))
        out = {feature: np.lib.format.open_memmap(temporary / f'{feature}.npy', mode='w+', dtype=np.uint16,
                                                  shape=(len(rows), *a.shape[1:])) for feature, a in like.items()}

        def fill(first: int) -> None:
            numbers = np.minimum(np.arange(first, first + size), len(rows) - 1)
            for feature, values in run(base, rows.batch(numbers)).items():
                out[feature][first:first + size] = np.asarray(values).view(np.uint16)[:len(rows) - first]

        # Two calls at a time: where one runs on a single core (softmax, norms) the other has a product for the rest.
        with futures.ThreadPoolExecutor(2) as pool:
            for done in tqdm([pool.submit(fill, first) for first in range(0, len(rows), size)], desc='features',
                             unit='batch', disable=None):
                done.result()
        for array in out.values():
            array.flush()
        return key | {'names': sorted(out)}

    said = once.made_once(folder, f'running the frozen base over {len(rows)} rows of {rows.folder.name}', make)
    return FeatureRows(rows, {n: np.load(folder / f'{n}.npy', mmap_mode='r') for n in said['names']}, fingerprint)
