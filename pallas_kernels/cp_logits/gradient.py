"""The backward pass: by the mean that the forward pass made beside it, or once more over the vocabulary, in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
_LOGITS = 1 << 25  # of one part


def differentiable(lse: Callable, mean: Callable | None) -> Callable:
    """A function of h [M, d], U [V, d] and frozen, with the gradients of ref.cp_logits.

    lse(h, U) -> [M]. mean(h, U) -> lse [M] and sum_v p_v U_v [M, d] in h's type: what a frozen U needs, and then the
    backward pass does not see the vocabulary. Without it, and for a U that learns, the words' weights are made again.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def run(h, U, frozen):
        return lse(h, U)

    def forward(h, U, frozen):
        if frozen and mean is not None:
            value, mu = mean(h, U)
            return value, (mu, U)
        value = lse(h, U)
        return value, (h, U, value)

    def backward(frozen, saved, g):
        if frozen and mean is not None:
            mu, U = saved
            return (g[:, None] * mu).astype(mu.dtype), jnp.zeros_like(U)
        return again(*saved, g, frozen)

    run.defvjp(forward, backward)
    return run


def again(h: Array, U: Array, value: Array, g: Array, frozen: bool) -> tuple[Array, Array]:
    """Gradients of h and U from their log-sum-exp [M] and its cotangent g [M]."""
    words = U.shape[0]
    size = max(1, min(words, _LOGITS // max(h.shape[0], 1)))
    wide = jnp.promote_types(U.dtype, jnp.float32)
    rows = h.astype(U.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)

    def step(carry, i):
        dh, dU = carry
        start = jnp.minimum(i * size, words - size)  # the last part reaches back: no padded copy of U
        part = jax.lax.dynamic_slice_in_dim(U, start, size)
        fresh = start + jnp.arange(size) >= i * size
        z = jnp.where(fresh, product('md,vd->mv', rows, part), -jnp.inf)
        p = (jnp.exp(z - value[:, None]) * g[:, None]).astype(U.dtype)
        dh = dh + product('mv,vd->md', p, part)
        if not frozen:
            own = product('mv,md->vd', p, rows) + jax.lax.dynamic_slice_in_dim(dU, start, size)
            dU = jax.lax.dynamic_update_slice_in_dim(dU, own, start, axis=0)
        return (dh, dU), None

    start = (jnp.zeros(h.shape, wide), jnp.zeros((), wide) if frozen else jnp.zeros(U.shape, wide))
    (dh, dU), _ = jax.lax.scan(step, start, jnp.arange(-(-words // size)))
    return dh.astype(h.dtype), jnp.zeros_like(U) if frozen else dU.astype(U.dtype)
