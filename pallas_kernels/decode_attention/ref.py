"""A few queries a row over its cache: decoding, verification blocks, StagFormer's cross-attention, two streams."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def decode_attention(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
                     ring: bool = False) -> Array:
    """q [B, S, H, hd] over k, v [B, KH, C, hd], H a multiple of KH -> [B, S, H, hd] in q's type.

    pos: int32 [B], query i of row b at position pos[b] + i; or [B, S], the position of each query. Two streams over one
    cache are a block of twice the queries, whose positions come twice.
    A query at position t sees the positions t - lag - window < j <= t - lag. lag 0 is causal, 1 strict: what a query
    wrote itself is not seen. window None: all. A query that sees nothing gets exactly 0.
    ring: slot j holds the latest position before the row's first query that is j modulo C, or none yet; else slot j
    holds position j. What lies in slots that no query of the row sees has no effect, NaN included.
    Scores are q k / sqrt(hd); products take k's and v's type, sums and the softmax are in float32 at least.
    """
    batch, size, heads, hd = q.shape
    groups, slots = k.shape[1:3]
    at = positions(pos, size)
    mask = visible(at, slots, lag, window, ring)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, size, groups, heads // groups, hd).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum('bkgsh,bkch->bkgsc', grouped.astype(k.dtype), k, preferred_element_type=wide) * hd ** -0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(wide).min)  # finite where a query sees nothing
    weights = jnp.exp(scores - top)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(wide).tiny)
    seen = jnp.where(mask.any(1)[:, None, :, None], v, 0)
    y = jnp.einsum('bkgsc,bkch->bkgsh', weights.astype(v.dtype), seen, preferred_element_type=wide)
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def positions(pos: Array, size: int) -> Array:
    """[B, S] of what the op takes as `pos`."""
    return pos if pos.ndim == 2 else pos[:, None] + jnp.arange(size, dtype=pos.dtype)


def visible(at: Array, slots: int, lag: int, window: int | None, ring: bool) -> Array:
    """[B, S, C]: whether the query at position `at` [B, S] sees a slot."""
    held = jnp.arange(slots)[None]
    if ring:
        last = at.min(1, keepdims=True) - 1
        held = last - (last - held) % slots
    held, latest = held[:, None], at[..., None] - lag
    mask = (held >= 0) & (held <= latest)
    return mask if window is None else mask & (held > latest - window)
