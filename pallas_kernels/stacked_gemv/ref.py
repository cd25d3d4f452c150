"""A few rows by each of several matrices of one layer: layer k of all stacks, or the slow and the fast stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def stacked_gemv(x: Array, w: Array, layer: Array | int = 0) -> Array:
    """x [S, M, K], w [L, S, K, N], layer [] or int -> [S, M, N] in x's type, summed in float32 at least.

    The layers stay where they are: a kernel reads the one it is told, XLA may copy the slice first.
    """
    wide = jnp.promote_types(w.dtype, jnp.float32)
    y = jnp.einsum('smk,skn->smn', x.astype(w.dtype), w[layer], preferred_element_type=wide)
    return y.astype(x.dtype)
