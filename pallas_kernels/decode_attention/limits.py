"""Which slots a row needs, as numbers that a kernel can read: the masks of `ref.py` without the arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.ref import positions

Array = jax.Array
BOUNDS = ('first', 'count', 'turn', 'base', 'lowest', 'highest')


def limits(pos: Array, size: int, slots: int, block: int, lag: int, window: int | None,
           ring: bool) -> tuple[Array, Array, Array]:
    """-> above [B, S], latest [B, S], bounds [B, 6]; all int32.

    Slot j of row b holds position p = j + turn - (slots where j > base), and a query sees it where above < p <= latest;
    above is at least -1, so a position below 0 is none. bounds: BOUNDS, where the row's blocks of `block` slots are
    first..first+count-1, and no query of the row sees p unless lowest < p <= highest.
    """
    at = positions(pos, size).astype(jnp.int32)
    latest = at - lag
    above = jnp.full_like(latest, -1) if window is None else jnp.maximum(latest - window, -1)
    lowest, highest = above.min(1), latest.max(1)
    if ring:
        last = at.min(1) - 1
        base = last % slots
        turn = last - base
        highest = jnp.minimum(highest, last)
        low, high = jnp.zeros_like(last), jnp.minimum(highest, slots - 1)  # the oldest may lie anywhere
    else:
        turn, base = jnp.zeros_like(highest), jnp.full_like(highest, slots)
        low, high = lowest + 1, jnp.minimum(highest, slots - 1)
    first = jnp.clip(low, 0, slots - 1) // block
    count = jnp.where(high >= low, high // block - first + 1, 0)
    return above, latest, jnp.stack([first, count, turn, base, lowest, highest], axis=1).astype(jnp.int32)


def by_head(q: Array, groups: int) -> Array:
    """q [B, S, H, hd] -> [B, KH, H / KH * S, hd]: the queries that read the same keys together, S innermost."""
    batch, size, heads, hd = q.shape
    return q.reshape(batch, size, groups, heads // groups, hd).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, hd)


def by_query(rows: Array, size: int) -> Array:
    """The inverse of by_head."""
    batch, groups, count, hd = rows.shape
    return rows.reshape(batch, groups, count // size, size, hd).transpose(0, 3, 1, 2, 4).reshape(batch, size, -1, hd)


def common(q: Array, k: Array, v: Array, pos: Array) -> str | None:
    """What no kernel takes, or None."""
    if k.shape != v.shape or k.dtype != v.dtype:
        return f'k and v must be alike, got {k.dtype}{list(k.shape)}, {v.dtype}{list(v.shape)}'
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[1]:
        return f'q {list(q.shape)} does not fit a cache {list(k.shape)}'
    if not jnp.issubdtype(pos.dtype, jnp.integer) or pos.shape not in (q.shape[:1], q.shape[:2]):
        return f'pos must be integers [B] or [B, S], got {pos.dtype}{list(pos.shape)}'
    return None
