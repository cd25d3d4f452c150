"""Which drafted tokens stay. Lossless: the committed tokens follow the target's own law.

Greedy: the longest prefix equal to the target's argmax. Sampled: accept a token with probability
min(1, p/q); at the first rejection draw from the normalised max(p - q, 0); after `length` accepted
tokens draw the bonus from p (Leviathan et al., 2023; Chen et al., 2023). p is the target's law after
the sampling processors, q the law the token was really drawn from after the same processors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from backbone.contract import Accepted, Draft
from backbone.sampling import Sampling, draw, law, split, uniform

Array = jax.Array


def verify(logits: Array, draft: Draft, rng: Array, sampling: Sampling) -> Accepted:
    """logits [B, K+1, V] of the block [pending, draft.tokens] -> Accepted(n [B], next_token [B])."""
    if sampling.greedy:
        return verify_greedy(logits, draft)
    return verify_sample(logits, draft, rng, sampling)


def verify_greedy(logits: Array, draft: Draft) -> Accepted:
    best = logits.argmax(-1).astype(jnp.int32)
    n = _leading(draft.tokens == best[:, :-1], draft.length)
    return Accepted(n, _at(best, n))


def verify_sample(logits: Array, draft: Draft, rng: Array, sampling: Sampling) -> Accepted:
    batch, block = draft.tokens.shape
    accept_rng, draw_rng = split(rng)
    p = law(logits, sampling)  # [B, K+1, V]
    p_gold = jnp.take_along_axis(p[:, :-1], draft.tokens[..., None], axis=-1)[..., 0]
    q_gold = jnp.ones_like(p_gold) if draft.law is None else draft.law.gold.astype(p_gold.dtype)
    u = uniform(accept_rng, (batch, block), p_gold.dtype)
    n = _leading(u * q_gold < p_gold, draft.length)
    last = _at(p, n)  # [B, V]: the law at the first rejection, or of the bonus
    rejected = n < draft.length
    index = jnp.clip(n, 0, max(block - 1, 0))
    if block == 0:
        return Accepted(n, draw(last, draw_rng))
    if draft.law is None:  # a point mass on the drafted token
        q = jax.nn.one_hot(_at(draft.tokens, index), p.shape[-1], dtype=p.dtype)
    else:
        q = draft.law.row(index).astype(p.dtype)
    residual = jnp.maximum(last - jnp.where(rejected[:, None], q, 0), 0)
    # p and q equal to rounding: the residual may vanish; p itself is then the right law.
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, last)
    return Accepted(n, draw(residual, draw_rng))


def _leading(ok: Array, length: Array) -> Array:
    """How many leading entries of ok [B, K] are True, at most length[B]."""
    ok = ok & (jnp.arange(ok.shape[1]) < length[:, None])
    return jnp.cumprod(ok.astype(jnp.int32), axis=1).sum(1)


def _at(table: Array, index: Array) -> Array:
    return jax.vmap(lambda row, i: row[i])(table, index)
