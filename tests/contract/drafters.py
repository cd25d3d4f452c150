"""Drafters that know the answer, and use it for good or ill. params['script'] [B, C]: the true ids by slot."""

import dataclasses

import jax.numpy as jnp

from backbone.contract import Draft
from harness.baselines import Stateless


@dataclasses.dataclass(frozen=True)
class Scripted(Stateless):
    """Drafts the true continuation, except from position `wrong_from` on (None: always right)."""

    block: int = 3
    wrong_from: int | None = None
    vocab: int = 97

    def draft(self, params, cache, state, rng, sampling):
        at = jnp.minimum(cache.pos[:, None] + 1 + jnp.arange(self.block), params['script'].shape[1] - 1)
        tokens = jnp.take_along_axis(params['script'], at, axis=1)
        if self.wrong_from is not None:
            tokens = jnp.where(jnp.arange(self.block) >= self.wrong_from, (tokens + 1) % self.vocab, tokens)
        return Draft(tokens, jnp.full(cache.pos.shape, self.block, jnp.int32)), cache, state


@dataclasses.dataclass(frozen=True)
class Ragged(Scripted):
    """Right, but each row drafts another length, 0 included, changing from round to round."""

    def draft(self, params, cache, state, rng, sampling):
        draft, cache, state = super().draft(params, cache, state, rng, sampling)
        return draft.replace(length=(cache.pos // 2 + jnp.arange(cache.pos.shape[0])) % (self.block + 1)), cache, state
