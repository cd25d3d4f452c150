"""Shapes: small ones with every edge, and the experts of two mixtures."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(name: str, rows: int, d: int, f: int, slots: list[int], active: int, dtype: str, gated: bool = True,
         bench: bool = False) -> Spec:
    def make(draw: Draw) -> tuple:
        count = max(slots) + 1
        share = [[(m + k) % 3 / 2 for k in range(len(slots))] for m in range(rows)]  # some of them 0
        return (draw.normal((rows, d), dtype), draw.normal((count, d, f), dtype, d ** -0.5) if gated else None,
                draw.normal((count, d, f), dtype, d ** -0.5), draw.normal((count, f, d), dtype, f ** -0.5),
                draw.given(slots), draw.given(share, 'float32'), draw.given(active), 'silu' if gated else 'relu')

    return Spec(name, dtype, make, bench, 1e-2 if dtype == 'bfloat16' else 1e-5)


_SMALL = (spec('swiglu_unsorted_padded', 3, 128, 64, [4, 0, 2, 2], 3, 'bfloat16'),
          spec('relu_one_float32', 2, 64, 128, [1], 1, 'float32', False),
          spec('relu_all', 16, 64, 64, [0, 1, 2], 3, 'bfloat16', False),
          spec('none_active', 1, 64, 64, [0, 0], 0, 'bfloat16'),
          spec('odd', 2, 96, 96, [1, 0], 2, 'bfloat16'))
# (width, neurons of an expert, experts, experts a token)
_MODELS = {'olmoe_1b_7b': (2048, 1024, 64, 8), 'mixtral_8x7b': (4096, 14336, 8, 2)}
_BENCH = tuple(spec(f'{model}_batch_{rows}', rows, d, f, list(range(min(rows * k, count))), min(rows * k, count),
                    'bfloat16', bench=True)
               for model, (d, f, count, k) in _MODELS.items() for rows in (1, 4, 16))
SPECS = _SMALL + _BENCH
UNSUPPORTED = {'gpu': {'relu_one_float32': 'must all be bfloat16', 'odd': 'is not made of tiles'}}
