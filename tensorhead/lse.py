"""log-sum-exp over the vocabulary, without the logits: all of the loss that is of the vocabulary's size.

The loss of a CP head needs of factor (s, a) only the gold logit, which is a gather, and

    lse_i = log sum_v exp(h_i . U_v),        d lse_i / d h_i = mu_i = sum_v softmax_v(h_i . U) U_v

for r*n rows a token. The vocabulary is passed in chunks with a running maximum, so that nothing of size [rows, W] is
made. lse and mu together are attention with queries h and keys = values = U: where U is frozen the forward pass makes
both, and the backward pass, which then is a multiplication by mu, does not see the vocabulary at all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from backbone.matmul import product
from backbone.mesh import constrain, ways

Array = jax.Array


def linear_lse(h: Array, U: Array, chunk: int = 0, frozen: bool = False) -> Array:
    """logsumexp over W of h @ U.T: h [..., d], U [W, d] -> [...], in at least float32.

    chunk: words at a time (of each shard, where a mesh in force shards the vocabulary); it need not divide W. 0: dense,
    all logits at once, plain autodiff. frozen: U gets no gradient, and the backward pass no vocabulary product.
    Products take U's dtype; sums are in at least float32.
    """
    if chunk:
        return _chunked(h, U, chunk, frozen)
    return jax.nn.logsumexp(product('...d,vd->...v', h, jax.lax.stop_gradient(U) if frozen else U), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _chunked(h: Array, U: Array, chunk: int, frozen: bool) -> Array:
    return _forward(h, U, chunk, mean=False)[0]


def _save(h: Array, U: Array, chunk: int, frozen: bool):
    lse, mu = _forward(h, U, chunk, mean=frozen)
    return lse, (mu, U) if frozen else (h, U, lse)


def _backward(chunk: int, frozen: bool, saved, g: Array):
    if frozen:
        mu, U = saved
        return (g[..., None] * mu).astype(mu.dtype), jnp.zeros_like(U)
    return _recompute(*saved, chunk, g)


_chunked.defvjp(_save, _backward)


# U is cut as [p, W/p, d] with p the pieces of the vocabulary on the mesh in force (1 outside of one); every piece walks
# its own words and the pieces meet once, at the end: an all-reduce over rows instead of an all-gather of U.


def _pieces(U: Array) -> Array:
    words, d = U.shape
    return constrain(U.reshape(ways('vocab', words), -1, d), 'vocab', None, None)


def _steps(U: Array, chunk: int) -> tuple[int, int]:
    size = min(chunk, U.shape[1])
    return -(-U.shape[1] // size), size


def _part(U: Array, i: Array, size: int) -> tuple[Array, Array, Array]:
    """Words start..start+size-1 of every piece [p, size, d], start, and bool [size]: not in an earlier part.

    The last part reaches back over its predecessor: no padded copy of U.
    """
    start = jnp.minimum(i * size, U.shape[1] - size)
    return jax.lax.dynamic_slice_in_dim(U, start, size, axis=1), start, start + jnp.arange(size) >= i * size


def _logits(h: Array, part: Array, fresh: Array) -> Array:
    """[..., p, size]; -inf at words that an earlier part has."""
    return jnp.where(fresh, product('...d,pvd->...pv', h, part), -jnp.inf)


def _forward(h: Array, U: Array, chunk: int, mean: bool) -> tuple[Array, Array | None]:
    """lse [...], and mu [..., d] in h's dtype where `mean`."""
    U = _pieces(U)
    count, size = _steps(U, chunk)
    wide = jnp.promote_types(U.dtype, jnp.float32)
    rows = (*h.shape[:-1], U.shape[0])

    def step(carry, i):
        top, total, acc = carry
        part, _, fresh = _part(U, i, size)
        z = _logits(h, part, fresh)
        new = jnp.maximum(top, z.max(-1))
        p = jnp.exp(z - new[..., None])
        old = jnp.exp(top - new)
        if mean:
            acc = acc * old[..., None] + product('...pv,pvd->...pd', p, part)
        return (new, total * old + p.sum(-1), acc), None

    acc = jnp.zeros((*rows, U.shape[2]), wide) if mean else None
    start = (jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide), acc)
    (top, total, acc), _ = jax.lax.scan(step, start, jnp.arange(count))
    highest = top.max(-1)
    share = jnp.exp(top - highest[..., None])
    total = (total * share).sum(-1)
    mu = ((acc * share[..., None]).sum(-2) / total[..., None]).astype(h.dtype) if mean else None
    return highest + jnp.log(total), mu


def _recompute(h: Array, U: Array, lse: Array, chunk: int, g: Array) -> tuple[Array, Array]:
    """Gradients of h and U from a second pass over the vocabulary."""
    pieces = _pieces(U)
    count, size = _steps(pieces, chunk)
    wide = lse.dtype
    lead = 'abcefghi'[:h.ndim - 1]  # rows keep their axes: a reshape would merge sharded ones

    def step(carry, i):
        dh, dU = carry
        part, start, fresh = _part(pieces, i, size)
        p = jnp.exp(_logits(h, part, fresh) - lse[..., None, None]) * g[..., None, None]
        dh = dh + product('...pv,pvd->...pd', p, part)
        own = product(f'{lead}pv,{lead}d->pvd', p, h.astype(U.dtype))
        own = own + jax.lax.dynamic_slice_in_dim(dU, start, size, axis=1)
        return (dh, jax.lax.dynamic_update_slice_in_dim(dU, own, start, axis=1)), None

    start = (jnp.zeros((*h.shape[:-1], *pieces.shape[::2]), wide), jnp.zeros(pieces.shape, wide))
    (dh, dU), _ = jax.lax.scan(step, start, jnp.arange(count))
    return dh.sum(-2).astype(h.dtype), dU.reshape(U.shape).astype(U.dtype)
