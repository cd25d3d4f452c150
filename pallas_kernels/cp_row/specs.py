"""Shapes: small ones for interpretation; for devices one draft by eight components over two vocabularies."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(batch: int, components: int, words: int, dtype: str = 'float32', bench: bool = False) -> Spec:
    def make(draw: Draw) -> tuple:
        return draw.normal((batch, components), 'float32'), draw.normal((batch, components, words), dtype, 3.0)

    return Spec(f'{batch}x{components}x{words}_{dtype}', dtype, make, bench, 1e-5)


_SMALL = (spec(2, 3, 1280), spec(1, 8, 128), spec(3, 2, 77, 'bfloat16'))
_BENCH = tuple(spec(batch, 8, words, bench=True) for words in (49152, 128256) for batch in (1, 4, 16))
SPECS = _SMALL + _BENCH

UNSUPPORTED = {'tpu': {}, 'gpu': {'3x2x77_bfloat16': 'must be float32'}}
