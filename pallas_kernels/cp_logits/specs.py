"""Shapes: small ones for interpretation; for devices the rows of one training batch by three vocabularies."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(name: str, rows: int, words: int, width: int, dtype: str, frozen: bool, bench: bool = False) -> Spec:
    def make(draw: Draw) -> tuple:
        return draw.normal((rows, width), dtype), draw.normal((words, width), dtype, 2 * width ** -0.5), frozen

    return Spec(name, dtype, make, bench, 1e-2 if dtype == 'bfloat16' else 1e-5)


_SMALL = (spec('40x328x128_frozen_bfloat16', 40, 328, 128, 'bfloat16', True),
          spec('130x256x64_bfloat16', 130, 256, 64, 'bfloat16', False),
          spec('300x1100x32_frozen_float32', 300, 1100, 32, 'float32', True),
          spec('5x77x24_float32', 5, 77, 24, 'float32', False))
_MODELS = {'smollm2_135m': (49152, 576), 'llama32_1b': (128256, 2048), 'llama31_8b': (128256, 4096)}
_BENCH = tuple(spec(f'{model}_rows_{rows}_frozen', rows, words, width, 'bfloat16', True, True)
               for model, (words, width) in _MODELS.items() for rows in (256, 4096))
SPECS = _SMALL + _BENCH

UNSUPPORTED = {
    'tpu': {},
    'gpu': {'300x1100x32_frozen_float32': 'must be bfloat16', '5x77x24_float32': 'must be bfloat16'},
}
