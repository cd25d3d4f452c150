"""Mosaic TPU: blocks of a row's slots, all heads of them, stream through VMEM under a running softmax.

Grid (row, block). Which block a step reads is prefetched: the row's first needed one and those after it, and past its
last one that same block again, which is not fetched a second time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.limits import BOUNDS, by_head, by_query, common, limits

Array = jax.Array
MAX_QUERIES = 256  # of one row and KV head
_BLOCK_BYTES = 1 << 20  # of keys; as much of values, and two of each in flight
_LOWEST = -1e30  # finite: exp(-inf - _LOWEST) is 0, also where a query has seen nothing yet


def refuses(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
            ring: bool = False) -> str | None:
    if why := common(q, k, v, pos):
        return why
    if any(a.dtype not in (jnp.float32, jnp.bfloat16) for a in (q, k)):
        return f'q and the cache must be float32 or bfloat16, got {q.dtype}, {k.dtype}'
    queries = q.shape[1] * q.shape[2] // k.shape[1]
    return None if queries <= MAX_QUERIES else f'{queries} queries a KV head are more than {MAX_QUERIES}'


def _block(k: Array) -> int:
    groups, slots, hd = k.shape[1:]
    slot = groups * -(-hd // 128) * 128 * k.dtype.itemsize
    return min(slots, max(128, min(512, _BLOCK_BYTES // slot) // 128 * 128))


def decode_attention(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
                     ring: bool = False, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.decode_attention."""
    batch, size, heads, hd = q.shape
    groups, slots = k.shape[1:3]
    block = _block(k)
    above, latest, bounds = limits(pos, size, slots, block, lag, window, ring)
    rows = by_head(q, groups).astype(k.dtype)
    count = rows.shape[2]
    spread = lambda a: jnp.tile(a, (1, heads // groups))[..., None]  # of the queries -> of their heads' rows
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    first, blocks, turn, base, lowest, highest = range(len(BOUNDS))

    def where(b, i, bounds):
        return b, 0, bounds[b, first] + jnp.maximum(jnp.minimum(i, bounds[b, blocks] - 1), 0), 0

    def kernel(bounds_ref, above_ref, latest_ref, q_ref, k_ref, v_ref, y_ref, top_ref, total_ref, sum_ref):
        b, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, _LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def held(shape, axis):
            """Positions of this block's slots along an axis; past the last slot none."""
            slot = (bounds_ref[b, first] + i) * block + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            at = slot + bounds_ref[b, turn] - jnp.where(slot > bounds_ref[b, base], slots, 0)
            return jnp.where(slot < slots, at, -1)

        @pl.when(i < bounds_ref[b, blocks])
        def _():
            at = held((count, block), 1)
            mask = (at > above_ref[0]) & (at <= latest_ref[0])
            at = held((block, hd), 0)
            needed = (at > bounds_ref[b, lowest]) & (at <= bounds_ref[b, highest])
            for h in range(groups):
                scores = jax.lax.dot_general(q_ref[0, h], k_ref[0, h], (((1,), (1,)), ((), ())), precision,
                                             jnp.float32) * hd ** -0.5
                scores = jnp.where(mask, scores, -jnp.inf)
                top = jnp.maximum(top_ref[h], scores.max(1, keepdims=True))
                old, p = jnp.exp(top_ref[h] - top), jnp.exp(scores - top)
                values = jnp.where(needed, v_ref[0, h], jnp.zeros((), v_ref.dtype))  # 0 x NaN would be NaN
                top_ref[h] = top
                total_ref[h] = total_ref[h] * old + p.sum(1, keepdims=True)
                sum_ref[h] = sum_ref[h] * old + jnp.dot(p.astype(values.dtype), values, precision=precision,
                                                        preferred_element_type=jnp.float32)

        @pl.when(i == pl.num_programs(1) - 1)
        def _():
            total = total_ref[...]
            y_ref[0] = jnp.where(total > 0, sum_ref[...] / total, 0).astype(y_ref.dtype)

    column = lambda: pl.BlockSpec((1, count, 1), lambda b, i, bounds: (b, 0, 0))
    of_row = lambda: pl.BlockSpec((1, groups, count, hd), lambda b, i, bounds: (b, 0, 0, 0))
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(slots, block)),
            in_specs=[column(), column(), of_row(), pl.BlockSpec((1, groups, block, hd), where),
                      pl.BlockSpec((1, groups, block, hd), where)],
            out_specs=of_row(),
            scratch_shapes=[pltpu.VMEM((groups, count, 1), jnp.float32), pltpu.VMEM((groups, count, 1), jnp.float32),
                            pltpu.VMEM((groups, count, hd), jnp.float32)]),
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        interpret=interpret,
    )(bounds, spread(above), spread(latest), rows, k, v)
    return by_query(y, size)
