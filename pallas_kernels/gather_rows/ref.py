"""Products with some rows of a matrix, which come in blocks: what a sparse layer is made of.

rows_in gives the queries of some heads or the activations of some neurons, rows_out what they add to the residual.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rows_in(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64) -> Array:
    """x [M, k] against the blocks `ids` [K] of w [L, n, k], of which the first `active` [] count -> [M, K block],
    float32 at least, 0 for those that do not count. `block` rows are a block. layer [] or int; ids in any order."""
    wide = jnp.promote_types(w.dtype, jnp.float32)
    y = jnp.einsum('mk,nk->mn', x.astype(w.dtype), _rows(w, ids, layer, block), preferred_element_type=wide)
    return jnp.where(counting(ids, active, block), y, 0)


def rows_out(h: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64) -> Array:
    """h [M, K block] against the same blocks of w [L, n, k] -> [M, k], float32 at least. What does not count adds
    nothing, not even a NaN."""
    wide = jnp.promote_types(w.dtype, jnp.float32)
    h = jnp.where(counting(ids, active, block), h, 0).astype(w.dtype)
    return jnp.einsum('mn,nk->mk', h, _rows(w, ids, layer, block), preferred_element_type=wide)


def counting(ids: Array, active: Array, block: int) -> Array:
    """bool [K block]."""
    return jnp.arange(ids.shape[0] * block) < active * block


def _rows(w: Array, ids: Array, layer: Array | int, block: int) -> Array:
    return w.reshape(w.shape[0], -1, block, w.shape[2])[layer][ids].reshape(-1, w.shape[2])
