"""Shapes: small ones with every edge, and the MLPs of three models with a half and a tenth of their neurons."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(name: str, rows: int, d: int, neurons: int, block: int, ids: list[int] | int, active: int, dtype: str,
         gated: bool = True, extras: bool = False, bench: bool = False) -> Spec:
    """ids: given, or how many, evenly spread. extras: biases, and rows that go through some blocks only."""
    def make(draw: Draw) -> tuple:
        chosen = ids if isinstance(ids, list) else [i * (neurons // block) // ids for i in range(ids)]
        gates = 2 if gated else 1
        bias = draw.normal((2, gates * neurons), dtype) if extras else None
        own = draw.integers((rows, len(chosen)), 0, 2) if extras else None
        return (draw.normal((rows, d), dtype), draw.normal((2, gates * neurons, d), dtype, d ** -0.5),
                draw.normal((2, neurons, d), dtype, neurons ** -0.5), draw.given(chosen), draw.given(active),
                draw.given(1), bias, own, block, 'silu' if gated else 'relu')

    return Spec(name, dtype, make, bench, 1e-2 if dtype == 'bfloat16' else 1e-5)


_SMALL = (spec('swiglu_unsorted_padded', 3, 128, 256, 16, [15, 2, 11, 0, 7, 7], 5, 'bfloat16'),
          spec('relu_with_biases_and_own', 2, 192, 128, 16, [5, 7, 0, 0], 3, 'bfloat16', False, True),
          spec('swiglu_all_float32', 16, 128, 64, 8, [0, 1, 2, 3, 4, 5, 6, 7], 8, 'float32', extras=True),
          spec('relu_the_last_of_one', 1, 64, 64, 32, [1], 1, 'bfloat16', False),
          spec('none_active', 2, 128, 32, 16, [0, 0], 0, 'bfloat16'),
          spec('single_neurons', 1, 128, 16, 1, [3, 1], 2, 'bfloat16'))
_MODELS = {'smollm2_135m': (576, 1536), 'llama32_1b': (2048, 8192), 'llama31_8b': (4096, 14336)}
_BENCH = tuple(spec(f'{model}_{share}_percent_batch_{rows}', rows, d, n, 16, count, count, 'bfloat16', bench=True)
               for model, (d, n) in _MODELS.items() for share in (50, 10) for rows in (1, 4, 16)
               for count in (-(-n // 16 * share // 100),))
SPECS = _SMALL + _BENCH

UNSUPPORTED = {
    'tpu': {'single_neurons': 'a block of 1 rows'},
    'gpu': {'single_neurons': 'blocks of 1 rows', 'swiglu_all_float32': 'must all be bfloat16'},
}
