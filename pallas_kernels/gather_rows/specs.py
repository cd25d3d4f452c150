"""Shapes: small ones with every edge, and the queries and outputs of a half of three models' KV groups."""

from __future__ import annotations

from pallas_kernels.op import Draw, Spec


def spec(out: bool, name: str, rows: int, k: int, n: int, block: int, ids: list[int], active: int, dtype: str,
         bench: bool = False) -> Spec:
    """A product with rows, or the sum over them: x is [rows, k], or `out` of them [rows, K block]."""
    def make(draw: Draw) -> tuple:
        return (draw.normal((rows, len(ids) * block if out else k), dtype), draw.normal((2, n, k), dtype, k ** -0.5),
                draw.given(ids), draw.given(active), draw.given(1), block)

    return Spec(name, dtype, make, bench, 1e-2 if dtype == 'bfloat16' else 1e-5)


_SMALL = (('unsorted_padded', 3, 128, 256, 16, [15, 2, 11, 4, 0, 9, 9], 6, 'bfloat16'),
          ('groups_of_three_tiles', 1, 192, 384, 192, [1], 1, 'bfloat16'),
          ('all_float32', 16, 128, 64, 8, [0, 1, 2, 3, 4, 5, 6, 7], 8, 'float32'),
          ('none_active', 2, 64, 128, 64, [0, 0], 0, 'bfloat16'),
          ('single_rows', 1, 64, 16, 1, [3, 1], 2, 'bfloat16'))
# (width, rows of all query heads, rows of a KV group, KV groups)
_MODELS = {'smollm2_135m': (576, 576, 192, 3), 'llama32_1b': (2048, 2048, 256, 8), 'llama31_8b': (4096, 4096, 512, 8)}
_BENCH = tuple((f'{model}_half_the_groups_batch_{rows}', rows, k, n, block, list(range(0, groups, 2)),
                len(range(0, groups, 2)), 'bfloat16', True)
               for model, (k, n, block, groups) in _MODELS.items() for rows in (1, 4, 16))
IN = tuple(spec(False, *row) for row in _SMALL + _BENCH)
OUT = tuple(spec(True, *row) for row in _SMALL + _BENCH)
UNSUPPORTED = {'tpu': {'single_rows': 'a block of 1 rows'},
               'gpu': {'single_rows': 'blocks of 1 rows', 'all_float32': 'must be bfloat16'}}
