"""Shapes: small ones for interpretation, and the widest products of three models for devices."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(name: str, stacks: int, rows: int, k: int, n: int, dtype: str, layers: int = 2, bench: bool = False) -> Spec:
    def make(draw: Draw) -> tuple:
        return (draw.normal((stacks, rows, k), dtype), draw.normal((layers, stacks, k, n), dtype, k ** -0.5),
                draw.given(layers - 1))

    return Spec(name, dtype, make, bench, 1e-2 if dtype == 'bfloat16' else 1e-5)


_SMALL = tuple(spec(f'{stacks}x{rows}x{k}x{n}_{dtype}', stacks, rows, k, n, dtype, 3)
               for stacks, rows, k, n, dtype in ((2, 3, 128, 256, 'bfloat16'), (1, 1, 192, 128, 'float32'),
                                                 (3, 16, 64, 128, 'bfloat16'), (2, 5, 128, 130, 'float32')))
# Gate and up together.
_MODELS = {'smollm2_135m': (576, 3072), 'llama32_1b': (2048, 16384), 'llama31_8b': (4096, 28672)}
_BENCH = tuple(spec(f'{model}_{stacks}_stacks_batch_{rows}', stacks, rows, k, n, 'bfloat16', 2, True)
               for model, (k, n) in _MODELS.items() for stacks, rows in ((2, 1), (2, 4), (2, 16), (4, 1)))
SPECS = _SMALL + _BENCH

_ODD = '2x5x128x130_float32'
UNSUPPORTED = {
    'tpu': {_ODD: 'columns go by 128'},
    'gpu': {_ODD: 'must be bfloat16', '1x1x192x128_float32': 'must be bfloat16'},
}
