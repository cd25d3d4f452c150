"""Mosaic TPU: tiles of one layer's matrices stream through VMEM while the few rows stay there.

Grid (stack, columns, depth): depth goes innermost and is summed in a float32 scratch. Which layer is a prefetched
scalar, read by the index map: no slice of the stacked weights is made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.op import tiled

Array = jax.Array
MAX_ROWS = 64  # more rows are a matrix product, which XLA does well
_TILE_BYTES = 1 << 20  # of weights; two are in flight, and VMEM holds 16 MiB or more


def refuses(x: Array, w: Array, layer: Array | int = 0) -> str | None:
    if x.dtype != w.dtype or w.dtype not in (jnp.float32, jnp.bfloat16):
        return f'x and w must both be float32 or bfloat16, got {x.dtype}, {w.dtype}'
    if x.shape[1] > MAX_ROWS:
        return f'{x.shape[1]} rows a stack are more than {MAX_ROWS}'
    if _tiles(w) is None:
        return f'a matrix of {w.shape[2]} x {w.shape[3]} has no tiles that fit: columns go by 128'
    return None


def _tiles(w: Array) -> tuple[int, int] | None:
    """(depth, columns) of a tile: as wide as fits, because a tile's rows lie together in memory. A depth that no
    multiple of 128 divides goes in one piece, which Mosaic pads."""
    k, n = w.shape[2:]
    columns = tiled(n, 128, 2048)
    if columns is None:
        return None
    depth = tiled(k, 128, max(128, _TILE_BYTES // (columns * w.dtype.itemsize)))
    if depth is not None:
        return depth, columns
    columns = tiled(n, 128, _TILE_BYTES // (k * w.dtype.itemsize))
    return None if columns is None else (k, columns)


def stacked_gemv(x: Array, w: Array, layer: Array | int = 0, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.stacked_gemv."""
    depth, columns = _tiles(w)
    stacks, rows, k = x.shape
    n = w.shape[3]
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def kernel(layer_ref, x_ref, w_ref, y_ref, sum_ref):
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[0], w_ref[0, 0], preferred_element_type=jnp.float32, precision=precision)

        @pl.when(step == k // depth - 1)
        def _():
            y_ref[0] = sum_ref[...].astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(stacks, n // columns, k // depth),
            in_specs=[pl.BlockSpec((1, rows, depth), lambda s, j, i, layer: (s, 0, i)),
                      pl.BlockSpec((1, 1, depth, columns), lambda s, j, i, layer: (layer[0], s, i, j))],
            out_specs=pl.BlockSpec((1, rows, columns), lambda s, j, i, layer: (s, 0, j)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)]),
        out_shape=jax.ShapeDtypeStruct((stacks, rows, n), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, w)
