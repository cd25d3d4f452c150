"""log-sum-exp over the vocabulary: all of a CP head's loss that is of the vocabulary's size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cp_logits(h: Array, U: Array, frozen: bool = False) -> Array:
    """h [M, d], U [V, d] -> [M], float32 at least: log sum_v exp(h_i . U_v).

    The gradient of h_i is the mean of U_v under softmax(h_i . U). frozen: U gets no gradient. Products take U's type,
    sums are in float32 at least. This form makes all M x V logits; kernels do not.
    """
    U = jax.lax.stop_gradient(U) if frozen else U
    wide = jnp.promote_types(U.dtype, jnp.float32)
    return jax.nn.logsumexp(jnp.einsum('md,vd->mv', h.astype(U.dtype), U, preferred_element_type=wide), axis=-1)
