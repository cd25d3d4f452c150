"""Mosaic TPU: two passes over the components' logits, and nothing of their size is written.

Grid (row, pass, words): the first pass finds every component's log-sum-exp, the second mixes the words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
MAX_COMPONENTS = 64
_WORDS = 4096
_LOWEST = -1e30  # finite: exp(-inf - _LOWEST) is 0


def refuses(log_w: Array, z: Array) -> str | None:
    if z.dtype not in (jnp.float32, jnp.bfloat16):
        return f'z must be float32 or bfloat16, got {z.dtype}'
    if log_w.shape != z.shape[:2]:
        return f'log_w {list(log_w.shape)} does not fit z {list(z.shape)}'
    return None if z.shape[1] <= MAX_COMPONENTS else f'{z.shape[1]} components are more than {MAX_COMPONENTS}'


def cp_row(log_w: Array, z: Array, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.cp_row."""
    batch, components, words = z.shape
    block = min(words, _WORDS)

    def kernel(w_ref, z_ref, y_ref, top_ref, total_ref):
        mixing, j = pl.program_id(1), pl.program_id(2)
        z = z_ref[0].astype(jnp.float32)

        @pl.when((mixing == 0) & (j == 0))
        def _():
            top_ref[...] = jnp.full_like(top_ref, _LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)

        @pl.when(mixing == 0)
        def _():
            inside = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) < words - j * block
            own = jnp.where(inside, z, -jnp.inf)
            top = jnp.maximum(top_ref[...], own.max(1, keepdims=True))
            total_ref[...] = total_ref[...] * jnp.exp(top_ref[...] - top) + jnp.exp(own - top).sum(1, keepdims=True)
            top_ref[...] = top

        @pl.when(mixing == 1)
        def _():
            logp = z + (w_ref[0] - top_ref[...] - jnp.log(total_ref[...]))
            top = jnp.maximum(logp.max(0, keepdims=True), _LOWEST)
            y_ref[0] = top + jnp.log(jnp.exp(logp - top).sum(0, keepdims=True))

    y = pl.pallas_call(
        kernel,
        grid=(batch, 2, pl.cdiv(words, block)),
        in_specs=[pl.BlockSpec((1, components, 1), lambda b, mixing, j: (b, 0, 0)),
                  pl.BlockSpec((1, components, block), lambda b, mixing, j: (b, 0, j))],
        out_specs=pl.BlockSpec((1, 1, block), lambda b, mixing, j: (b, 0, j * mixing)),  # none leaves in the first pass
        out_shape=jax.ShapeDtypeStruct((batch, 1, words), jnp.float32),
        scratch_shapes=[pltpu.VMEM((components, 1), jnp.float32), pltpu.VMEM((components, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        interpret=interpret,
    )(log_w.astype(jnp.float32)[..., None], z)
    return y[:, 0]
