"""The MLPs of a few experts that lie in slots, for a few rows: what a mixture adds when it decodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mlp.ref import activated

Array = jax.Array


def moe_gather(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array, active: Array,
               activation: str = 'silu') -> Array:
    """x [M, d] -> [M, d], float32 at least: sum over k of weights[:, k] times what the expert in slots[k] says.

    gate (None: an MLP without), up [S, d, f], down [S, f, d]. slots [K] int32, of which the first `active` [] count;
    the others are not read. weights [M, K]: 0 where a row does not go through an expert, which then adds nothing to
    it, not even a NaN. Summed in the order of k. Errors: KernelError for an unknown activation.
    """
    act, wide = activated(activation), jnp.promote_types(up.dtype, jnp.float32)

    def product(form: str, a: Array, w: Array) -> Array:
        return jnp.einsum(form, a.astype(w.dtype), w[slots], preferred_element_type=wide)

    h = product('md,kdf->kmf', x, up)
    h = act(h) if gate is None else act(product('md,kdf->kmf', x, gate)) * h
    return weighted(product('kmf,kfd->kmd', h, down), weights, active)


def weighted(y: Array, weights: Array, active: Array) -> Array:
    """y [K, M, d] -> [M, d]: by weights [M, K], what does not count left out."""
    share = jnp.where(jnp.arange(y.shape[0]) < active, weights, 0).astype(y.dtype).T[..., None]
    return jnp.where(share > 0, share * y, 0).sum(0)


def distinct(slots: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Slots and weights [M, K] row by row -> slots [P], weights [M, P], active []: each slot once, in rising order.
    P = M K; a slot that several rows want is read once."""
    found = jnp.unique(slots, size=slots.size, fill_value=-1)
    active = (found >= 0).sum().astype(jnp.int32)
    shares = jnp.where(slots[..., None] == found, weights[..., None], 0).sum(1)
    return jnp.maximum(found, 0).astype(jnp.int32), shares, active
