"""The measured floor: how long this machine needs just to read the weights one token needs.

A small n-thread C matrix-vector product (`native/gemv.c`) runs over a buffer as large as the weights, between the
decodes of the same run, because a shared machine's bandwidth drifts by a factor of two within minutes.
Without a C compiler the floor comes from numpy's own matrix-vector product and says so; on an accelerator from
one XLA reduction over a buffer in device memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from backbone.native import build

ITEM_BYTES = {'float32': 4, 'bfloat16': 2}
# A pass over a buffer the caches can hold would measure the caches. The largest common L3 slice a process sees
# is well below this.
MIN_BUFFER_BYTES = 256 << 20
COLS = 1024
_SOURCE = pathlib.Path(__file__).parent / 'native' / 'gemv.c'


def cpu_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


@functools.cache
def native_gemv():
    """The compiled function, built on first use. Errors: backbone.native.build.NoCompiler."""
    function = build.load(_SOURCE).headway_gemv
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2
    return function


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over a buffer of `bytes` bytes."""

    dtype: str
    bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds


class Meter:
    """Times passes over one buffer of the size of the weights.

    weight_bytes: {'float32': bytes a token, 'bfloat16': bytes a token}. `source` names what is timed:
    'c_gemv', 'numpy_gemv' (no C compiler; `note` says why) or 'xla_sum' (accelerators).
    """

    def __init__(self, weight_bytes: dict[str, int], *, threads: int | None = None,
                 min_buffer_bytes: int = MIN_BUFFER_BYTES, platform_name: str | None = None):
        unknown = sorted(set(weight_bytes) - set(ITEM_BYTES))
        if unknown:
            raise ValueError(f'no floor for dtype {", ".join(unknown)}')
        self.weight_bytes = dict(weight_bytes)
        self.threads = threads or cpu_threads()
        self.source, self.note, self._native = 'c_gemv', '', None
        self._rows = {}
        for dtype, size in weight_bytes.items():
            row_bytes = COLS * ITEM_BYTES[dtype]
            self._rows[dtype] = -(-max(size, min_buffer_bytes) // row_bytes)
        if (platform_name or jax.default_backend()) != 'cpu':
            self.source = 'xla_sum'
            self._device = {d: jnp.ones((n, COLS), d) for d, n in self._rows.items()}
            self._sum = jax.jit(lambda w: jnp.sum(w, dtype=jnp.float32))
        else:
            try:
                self._native = native_gemv()
            except build.NoCompiler as error:
                self.source, self.note = 'numpy_gemv', f'{error}; the floor is numpy\'s matrix-vector product instead'
            total = max(n * COLS * ITEM_BYTES[d] for d, n in self._rows.items())
            # Touched once, so that no page fault is timed. bfloat16 reads the first part of the same bytes.
            self._buffer = np.full(total // 4, 0.5, np.float32)
            self._x = np.ones(COLS, np.float32)
            self._y = np.zeros(max(self._rows.values()), np.float32)
        for dtype in self._rows:
            self.measure(dtype)

    def measure(self, dtype: str) -> Pass:
        """One pass over at least as many bytes as a token's weights."""
        rows = self._rows[dtype]
        size = rows * COLS * ITEM_BYTES[dtype]
        if self.source == 'xla_sum':
            start = time.perf_counter()
            self._sum(self._device[dtype]).block_until_ready()
            seconds = time.perf_counter() - start
        elif self._native is not None:
            seconds = self._native(self._buffer.ctypes.data, self._x.ctypes.data, self._y.ctypes.data, rows, COLS,
                                   ITEM_BYTES[dtype], self.threads)
            if seconds < 0:
                raise RuntimeError(f'gemv returned {seconds}: rows {rows}, cols {COLS}, threads {self.threads}')
        else:  # numpy knows no bfloat16: the same bytes, read as float32
            matrix = self._buffer[:size // 4].reshape(-1, COLS)
            start = time.perf_counter()
            np.dot(matrix, self._x, out=self._y[:len(matrix)])
            seconds = time.perf_counter() - start
        return Pass(dtype, size, seconds)

    def floor_ms(self, dtype: str, bytes_per_s: float) -> float:
        """Milliseconds a token at that bandwidth."""
        return 1e3 * self.weight_bytes[dtype] / bytes_per_s

    def product(self, dtype: str, rows: int, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        """y [rows] = weights [rows, cols] @ x [cols] by the compiled function: what the tests check it with."""
        y = np.zeros(rows, np.float32)
        seconds = self._native(weights.ctypes.data, x.ctypes.data, y.ctypes.data, rows, weights.shape[1],
                               ITEM_BYTES[dtype], self.threads)
        if seconds < 0:
            raise ValueError(f'gemv takes cols in multiples of 32, got {weights.shape}')
        return y
