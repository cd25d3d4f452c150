"""Shapes: small ones for interpretation, caches of three models for devices."""

from __future__ import annotations

import numpy as np

from pallas_kernels.op import Draw, Spec


def spec(name: str, pos: tuple, size: int, heads: int, groups: int, hd: int, slots: int, dtype: str, lag: int = 0,
         window: int | None = None, ring: bool = False, bench: bool = False) -> Spec:
    batch = len(pos)

    def make(draw: Draw) -> tuple:
        return (draw.normal((batch, size, heads, hd), dtype), draw.normal((batch, groups, slots, hd), dtype),
                draw.normal((batch, groups, slots, hd), dtype), draw.given(np.asarray(pos)), lag, window, ring)

    return Spec(name, dtype, make, bench, 2e-2 if dtype == 'bfloat16' else 1e-5)


_TWICE = tuple((p, p + 1, p, p + 1) for p in (0, 70))  # two streams, two tokens each
_SMALL = (
    spec('causal_bfloat16', (0, 126), 2, 6, 2, 64, 128, 'bfloat16'),
    spec('strict_empty_bfloat16', (0, 64, 100), 1, 4, 2, 64, 128, 'bfloat16', lag=1),
    spec('window_ring_bfloat16', (3, 200), 1, 3, 1, 64, 64, 'bfloat16', lag=1, window=40, ring=True),
    spec('streams_window_bfloat16', _TWICE, 4, 2, 1, 128, 128, 'bfloat16', window=33),
    spec('causal_ragged_float32', (0, 5, 643), 3, 4, 2, 16, 650, 'float32'),
    spec('window_ring_float32', (0, 7, 50), 2, 2, 2, 32, 20, 'float32', lag=1, window=9, ring=True),
)
_MODELS = {'smollm2_135m': (9, 3, 64), 'llama32_1b': (32, 8, 64), 'llama31_8b': (32, 8, 128)}
_BENCH = tuple(spec(f'{model}_batch_{batch}_block_{size}_of_{slots}', (slots - 64,) * batch, size, *shape, slots,
                    'bfloat16', bench=True)
               for model, shape in _MODELS.items()
               for batch, size, slots in ((1, 1, 2048), (1, 8, 2048), (4, 1, 2048), (16, 1, 2048), (1, 1, 16384)))
SPECS = _SMALL + _BENCH

UNSUPPORTED = {
    'tpu': {},
    'gpu': {name: 'must be bfloat16' for name in ('causal_ragged_float32', 'window_ring_float32')},
}
