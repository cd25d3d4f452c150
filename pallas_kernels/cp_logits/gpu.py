"""Mosaic GPU (Hopper): a matrix product that keeps of its 128 x 128 tiles only each row's maximum and sum.

What the tiles found, 1/64 of the logits, is joined in XLA. The sums of words' vectors that the gradient needs do not
fit a multiprocessor's registers for any width of interest, so the backward pass goes over the vocabulary again, in XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cp_logits.gradient import differentiable

Array = jax.Array
_ROWS, _WORDS, _DEPTH, _IN_FLIGHT = 128, 128, 64, 4


def refuses(h: Array, U: Array, frozen: bool = False) -> str | None:
    if U.dtype != jnp.bfloat16:
        return f'U must be bfloat16, what its tensor cores multiply, got {U.dtype}'
    if U.shape[1] % _DEPTH or U.shape[0] % 8 or U.shape[0] < _WORDS:
        return f'U {list(U.shape)} must have a multiple of 8 words, at least {_WORDS}, of a multiple of {_DEPTH}'
    return None


def cp_logits(h: Array, U: Array, frozen: bool = False, interpret=False) -> Array:
    """As ref.cp_logits."""
    return differentiable(lambda h, U: _pass(h, U, interpret), None)(h, U, frozen)


def _pass(h: Array, U: Array, interpret) -> Array:
    (count, d), words = h.shape, U.shape[0]
    tiles, parts = pl.cdiv(count, _ROWS), pl.cdiv(words, _WORDS)
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    # The interpreter of JAX 0.10 knows neither layouts nor transposed operands.
    lay = (lambda a, layout: a) if interpret else plgpu.layout_cast

    def kernel(h_ref, u_ref, top_ref, total_ref, row, turned):
        tile, part = jax.lax.axis_index('tile'), jax.lax.axis_index('part')
        start = jnp.minimum(part * _WORDS, words - _WORDS)  # the last part reaches back over the one before it

        def product(acc):
            def step(_, h_tile, u_tile):
                plgpu.wgmma(acc, h_tile, transposed(u_tile, turned))
                plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(
                step, grid=(d // _DEPTH,), max_concurrent_steps=_IN_FLIGHT,
                in_specs=[plgpu.BlockSpec((_ROWS, _DEPTH), lambda i: (tile, i), transforms=swizzle),
                          plgpu.BlockSpec((_WORDS, _DEPTH), lambda i: (0, i), transforms=swizzle)],
            )(h_ref, u_ref.at[pl.ds(start, _WORDS)])
            return acc[...]

        def transposed(ref, spare):
            if not interpret:
                return plgpu.transpose_ref(ref, (1, 0))
            spare[...] = ref[...].T
            return spare

        z = pl.run_scoped(product, plgpu.ACC((_ROWS, _WORDS), jnp.float32))
        word = lay(jax.lax.broadcasted_iota(jnp.int32, z.shape, 1), plgpu.Layout.WGMMA) + start
        z = jnp.where(word >= part * _WORDS, z, -jnp.inf)
        top = z.max(axis=1)
        row[0, :] = top
        row[1, :] = jnp.exp(z - jax.lax.broadcast_in_dim(top, z.shape, (0,))).sum(axis=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row.at[0], top_ref.at[part, tile])
        plgpu.copy_smem_to_gmem(row.at[1], total_ref.at[part, tile])
        plgpu.wait_smem_to_gmem(0)

    found = jax.ShapeDtypeStruct((parts, tiles, _ROWS), jnp.float32)
    run = plgpu.kernel(
        kernel, out_type=(found, found),
        scratch_types=[plgpu.SMEM((2, _ROWS), jnp.float32),
                       plgpu.SMEM((_DEPTH, _WORDS) if interpret else (8, 64), U.dtype, transforms=swizzle)],
        grid=(tiles, parts), grid_names=('tile', 'part'), interpret=interpret)
    top, total = run(jnp.pad(h.astype(U.dtype), ((0, tiles * _ROWS - count), (0, 0))), U)
    return jax.nn.logsumexp(top + jnp.log(total), axis=0).reshape(-1)[:count]
