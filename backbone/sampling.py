"""Temperature, top-k and top-p, applied alike to the target's law and to a draft's.

Order as in Hugging Face transformers: temperature, then top-k, then top-p. Everything is computed in
at least float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from backbone.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(f'temperature must be >= 0, got {self.temperature}')
        if self.top_k < 0:
            raise ConfigError(f'top_k must be >= 0, got {self.top_k}')
        if not 0 < self.top_p <= 1:
            raise ConfigError(f'top_p must be in (0, 1], got {self.top_p}')

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def law(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The law tokens are drawn from: logits [..., V] -> probabilities [..., V] summing to 1.

    Greedy gives the point mass on the first maximum.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if sampling.greedy:
        return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _keep_best(logits, jnp.ones(logits.shape, jnp.int32), sampling.top_k)
    if sampling.top_p < 1:
        # A token stays while the mass of the likelier ones is below top_p, so the first always stays.
        logits = _keep_best(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)
    return jax.nn.softmax(logits, axis=-1)


def _keep_best(logits: jax.Array, weights: jax.Array, limit: float) -> jax.Array:
    """Logits [..., V] with -inf where the weights of all larger ones come to `limit` or more; equal ones stay together.

    The smallest logit that stays is found by bisection over the bits of a float, which are ordered as the floats are:
    some tens of passes over the row. Sorting it would be most of a sampled step on a CPU.
    """
    kind = jnp.dtype(f'int{8 * logits.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0, logits), kind)  # -0 is 0
    order = jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        few = jnp.where(order > middle, weights, 0).sum(-1, keepdims=True) < limit
        return jnp.where(few, low, middle + 1), jnp.where(few, middle, high)

    low = jnp.full((*logits.shape[:-1], 1), jnp.iinfo(kind).min, kind)
    _, smallest = jax.lax.fori_loop(0, 8 * kind.itemsize, halve, (low, jnp.full_like(low, jnp.iinfo(kind).max)))
    return jnp.where(order < smallest, -jnp.inf, logits)


# Randomness: `rng` is one key, or one key a row [B]. With a key a row, what a row draws is its own, whatever rows are
# decoded beside it. These take either; jax.random takes one key only.


def draw(probs: jax.Array, rng: jax.Array) -> jax.Array:
    """One token a row from probabilities [..., V]; a row need not be normalised."""
    return _each(lambda key, p: jax.random.categorical(key, jnp.log(p), axis=-1).astype(jnp.int32), rng, probs)


def split(rng: jax.Array, count: int = 2) -> tuple[jax.Array, ...]:
    """`count` independent ones, each of the shape of `rng`."""
    return _each(lambda key: tuple(jax.random.split(key, count)), rng)


def fold_in(rng: jax.Array, number: jax.Array | int) -> jax.Array:
    """One that depends on `number` too."""
    return _each(lambda key: jax.random.fold_in(key, number), rng)


def uniform(rng: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """[B, ...] in [0, 1)."""
    return _each(lambda key: jax.random.uniform(key, shape[rng.ndim:], dtype), rng)


def _each(function: Callable, rng: jax.Array, *rows: jax.Array):
    return jax.vmap(function)(rng, *rows) if rng.ndim else function(rng, *rows)


def choose(logits: jax.Array, rng: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token: argmax when greedy, else a draw from `law`. logits [..., V] -> int32 [...]."""
    if sampling.greedy:
        return logits.argmax(-1).astype(jnp.int32)
    return draw(law(logits, sampling), rng)
