"""Temperature, top-k and top-p, applied alike to the target's law and to a draft's.

Order as in Hugging Face transformers: temperature, then top-k, then top-p. Everything is computed in
at least float32.
"""

from __future__ import annotations

import dataclasses

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
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # A token stays while the mass strictly before it is below top_p, so the first always stays.
        kept = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], -1) < sampling.top_p
        cutoff = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < cutoff, -jnp.inf, logits)
    return jax.nn.softmax(logits, axis=-1)


def draw(probs: jax.Array, rng: jax.Array) -> jax.Array:
    """One token a row from probabilities [..., V]; a row need not be normalised."""
    return jax.random.categorical(rng, jnp.log(probs), axis=-1).astype(jnp.int32)


def choose(logits: jax.Array, rng: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token: argmax when greedy, else a draw from `law`. logits [..., V] -> int32 [...]."""
    if sampling.greedy:
        return logits.argmax(-1).astype(jnp.int32)
    return draw(law(logits, sampling), rng)
