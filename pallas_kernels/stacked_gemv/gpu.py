"""Mosaic GPU (Hopper): the few rows, padded to the 64 of a wgmma, by tiles of the matrices that TMA streams in.

A block of threads owns 128 columns of one stack and goes down its matrix, a few tiles in flight. Nearly all of what the
tensor cores multiply is padding: with so few rows the time is that of the weights' bytes, and they are idle anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
MAX_ROWS = 64
_COLUMNS, _DEPTH, _IN_FLIGHT = 128, 64, 4


def refuses(x: Array, w: Array, layer: Array | int = 0) -> str | None:
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f'x and w must be bfloat16, what its tensor cores multiply, got {x.dtype}, {w.dtype}'
    if x.shape[1] > MAX_ROWS:
        return f'{x.shape[1]} rows a stack are more than {MAX_ROWS}'
    if w.shape[2] % _DEPTH or w.shape[3] % _COLUMNS:
        return f'a matrix of {w.shape[2]} x {w.shape[3]} is not made of tiles of {_DEPTH} x {_COLUMNS}'
    return None


def stacked_gemv(x: Array, w: Array, layer: Array | int = 0, interpret=False) -> Array:
    """As ref.stacked_gemv."""
    stacks, rows, k = x.shape
    n = w.shape[3]
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def kernel(layer_ref, x_ref, w_ref, y_ref, out):
        stack, column = jax.lax.axis_index('stack'), jax.lax.axis_index('column')
        at = layer_ref[0]

        def product(acc):
            def step(_, x_tile, w_tile):
                plgpu.wgmma(acc, x_tile, w_tile)
                plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(
                step, grid=(k // _DEPTH,), max_concurrent_steps=_IN_FLIGHT,
                in_specs=[plgpu.BlockSpec((MAX_ROWS, _DEPTH), lambda i: (0, i), transforms=swizzle),
                          plgpu.BlockSpec((_DEPTH, _COLUMNS), lambda i: (i, column), transforms=swizzle)],
            )(x_ref.at[stack], w_ref.at[at, stack])
            return acc[...]

        out[...] = pl.run_scoped(product, plgpu.ACC((MAX_ROWS, _COLUMNS), jnp.float32)).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, y_ref.at[stack, :, pl.ds(column * _COLUMNS, _COLUMNS)])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((stacks, MAX_ROWS, n), x.dtype),
        scratch_types=[plgpu.SMEM((MAX_ROWS, _COLUMNS), x.dtype, transforms=swizzle)],
        grid=(stacks, n // _COLUMNS), grid_names=('stack', 'column'), interpret=interpret)
    padded = jnp.pad(x, ((0, 0), (0, MAX_ROWS - rows), (0, 0)))
    return run(jnp.asarray(layer, jnp.int32).reshape(1), padded, w)[:, :rows]
