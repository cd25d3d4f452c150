"""Losses that several tasks share. Everything is a sum over tokens with its weight, so that microbatches add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.errors import ConfigError

Array = jax.Array


@struct.dataclass
class TokenSums:
    """Weighted sums over a batch: nll in nats, z = logsumexp^2, correct = argmax hits, weight = tokens counted."""

    nll: Array
    z: Array
    correct: Array
    weight: Array

    def mean(self, what: str) -> Array:
        return getattr(self, what) / jnp.maximum(self.weight, 1e-9)


def next_token(logits: Array, targets: Array, weights: Array) -> TokenSums:
    """logits [..., V]; targets [...] int; weights [...] -> sums, in at least float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    norm = jax.nn.logsumexp(logits, axis=-1)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weights = weights.astype(norm.dtype)
    # No argmax: a hit is a gold logit that nothing exceeds, and the maximum is at hand.
    hit = gold >= jax.lax.stop_gradient(logits).max(-1)
    return TokenSums(((norm - gold) * weights).sum(), (norm * norm * weights).sum(), (hit * weights).sum(),
                     weights.sum())


def next_token_chunked(to_logits: Callable[[Array], Array], hidden: Array, targets: Array, weights: Array,
                       chunk: int) -> TokenSums:
    """The same from hidden [B, S, d], `chunk` positions at a time; 0: all at once.

    to_logits: [B, chunk, d] -> [B, chunk, V]. The backward pass makes each chunk's logits again, so that [B, S, V]
    never exists. Errors: ConfigError where chunk does not divide S.
    """
    return summed(lambda h, t, w: next_token(to_logits(h), t, w), (hidden, targets, weights), chunk)


def summed(sums_of: Callable[..., Any], arrays: tuple[Array, ...], chunk: int) -> Any:
    """sums_of(*arrays), sums over the positions of arrays [B, S, ...], `chunk` positions at a time; 0: all at once.

    The backward pass makes each chunk again. Errors: ConfigError where chunk does not divide S.
    """
    batch, size = arrays[0].shape[:2]
    if not 0 < chunk < size:
        return sums_of(*arrays)
    if size % chunk:
        raise ConfigError(f'loss_chunk {chunk} does not divide {size} tokens')

    @jax.checkpoint
    def add(total: Any, part: tuple[Array, ...]):
        return jax.tree.map(jnp.add, total, sums_of(*part)), None

    parts = jax.tree.map(lambda a: a.reshape(batch, -1, chunk, *a.shape[2:]).swapaxes(0, 1), arrays)
    like = jax.eval_shape(sums_of, *jax.tree.map(lambda a: a[0], parts))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like), parts)
    return total


def some_positions(weights: Array, count: int, rng: Array) -> Array:
    """`count` positions a row [B, count], at random among those that count (weights [B, S] > 0) as far as there are."""
    lot = jnp.where(weights > 0, jax.random.uniform(rng, weights.shape), -1.0)
    return jax.lax.top_k(lot, count)[1]


def at_positions(a: Array, at: Array) -> Array:
    """a [B, S, ...] at [B, P] -> [B, P, ...]."""
    return jax.vmap(lambda row, i: row[i])(a, at)
