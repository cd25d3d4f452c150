"""Mosaic TPU: attention whose keys and values are the vocabulary. A block of rows stays in VMEM, words stream past it.

Grid (rows, words): words go innermost under a running maximum. For a frozen U the same pass sums the words' vectors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cp_logits.gradient import differentiable

Array = jax.Array
MAX_WIDTH = 4096
_ROWS = 256
_WORDS_BYTES = 2 << 20  # of U; two are in flight
_VMEM_BYTES = 48 << 20
_LOWEST = -1e30  # finite, so that exp(_LOWEST - max) is 0


def refuses(h: Array, U: Array, frozen: bool = False) -> str | None:
    if h.dtype not in (jnp.float32, jnp.bfloat16) or U.dtype not in (jnp.float32, jnp.bfloat16):
        return f'h and U must be float32 or bfloat16, got {h.dtype}, {U.dtype}'
    return None if h.shape[1] <= MAX_WIDTH else f'rows of {h.shape[1]} are wider than {MAX_WIDTH}'


def cp_logits(h: Array, U: Array, frozen: bool = False, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.cp_logits."""
    lse = lambda h, U: _pass(h, U, False, interpret)[0]
    return differentiable(lse, functools.partial(_pass, mean=True, interpret=interpret))(h, U, frozen)


def _pass(h: Array, U: Array, mean: bool, interpret) -> tuple[Array, ...]:
    """lse [M], and with `mean` sum_v p_v U_v [M, d]."""
    count, d = h.shape
    words = U.shape[0]
    rows = min(count, _ROWS)
    block = min(words, max(128, min(1024, _WORDS_BYTES // (d * U.dtype.itemsize)) // 128 * 128))
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if U.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def kernel(h_ref, u_ref, lse_ref, *rest):
        mu_ref, top_ref, total_ref, sum_ref = rest if mean else (None, *rest, None)
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, _LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)
            if mean:
                sum_ref[...] = jnp.zeros_like(sum_ref)

        left = words - j * block
        z = jax.lax.dot_general(h_ref[...], u_ref[...], (((1,), (1,)), ((), ())), precision, jnp.float32)
        z = jnp.where(jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) < left, z, -jnp.inf)
        top = jnp.maximum(top_ref[...], z.max(1, keepdims=True))
        old, p = jnp.exp(top_ref[...] - top), jnp.exp(z - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * old + p.sum(1, keepdims=True)
        if mean:
            part = u_ref[...]  # past the last word it holds anything, and 0 x NaN would be NaN
            part = jnp.where(jax.lax.broadcasted_iota(jnp.int32, part.shape, 0) < left, part, jnp.zeros((), part.dtype))
            sum_ref[...] = sum_ref[...] * old + jnp.dot(p.astype(part.dtype), part, precision=precision,
                                                        preferred_element_type=jnp.float32)

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            lse_ref[...] = top_ref[...] + jnp.log(total_ref[...])
            if mean:
                mu_ref[...] = (sum_ref[...] / total_ref[...]).astype(mu_ref.dtype)

    wide = pl.BlockSpec((rows, d), lambda i, j: (i, 0))
    one = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, rows), pl.cdiv(words, block)),
        in_specs=[wide, pl.BlockSpec((block, d), lambda i, j: (j, 0))],
        out_specs=[one, wide] if mean else [one],
        out_shape=[jax.ShapeDtypeStruct((count, 1), jnp.float32), jax.ShapeDtypeStruct(h.shape, h.dtype)][:1 + mean],
        scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32), pltpu.VMEM((rows, 1), jnp.float32),
                        pltpu.VMEM((rows, d), jnp.float32)][:2 + mean],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                             vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
    )(h.astype(U.dtype), U)
    return out[0][:, 0], *out[1:]
