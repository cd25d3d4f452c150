"""Lossless RAD: the hybrid drafts, its own original base verifies. One tree holds both.

The hybrid runs with a cache of its own, in step with the base's: what it drafts from are its own keys, values and
states over the text that was kept. Verification is the base's, so the text is the base's; all weights but the mixers
are shared. That a distilled hybrid may draft for its base is our own use of it: of Hoshino et al., 2025 (arXiv
2505.22135), only the opening could be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.contract import DenseLaw, Draft, Output
from backbone.errors import ConfigError
from backbone.sampling import Sampling, choose, draw, fold_in, law
from rad import export, surgery
from rad.config import RadConfig
from rad.target import HybridTarget

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RadDrafter:
    """Drafts K = block tokens with the hybrid of params['base'] and params['rad'].

    cache_dtype: of the keys and values of the hybrid's own cache. State: that cache.
    """

    cfg: ModelConfig
    rad: RadConfig
    block: int = 4
    cache_dtype: str = 'float32'
    needs = ()

    def __post_init__(self):
        if self.block < 1:
            raise ConfigError(f'RadDrafter needs block >= 1, got {self.block}')
        if self.rad.parallel:
            raise ConfigError('RadDrafter: a mixer beside a kept attention makes the draft dearer than the base')

    @property
    def hybrid(self) -> HybridTarget:
        return HybridTarget(self.cfg, self.rad, self.cache_dtype)

    def init_params(self, rng: Array) -> dict:
        """Mixers at random: without the base's weights there is nothing to copy."""
        return {'mixers': surgery.init_mixers(self.cfg, self.rad, rng)}

    def init_state(self, batch: int, max_len: int) -> Cache:
        return self.hybrid.init_cache(batch, max_len, self.block)

    def ready(self, mine: dict, base: dict, dtype: Any = jnp.float32) -> dict:
        """params['rad'] as it drafts beside params['base']."""
        return export.drafting(self.rad, mine, base, dtype)

    def own(self, params: Any) -> dict:
        """{'base', 'rad'} of the hybrid: its base is the model's, but where parts of it were trained."""
        return params if 'base' not in params['rad'] else {'base': params['rad']['base'], 'rad': params['rad']}

    def prefill(self, params: Any, state: Cache, output: Output, n: Array) -> Cache:
        seen = self.hybrid.forward(self.own(params), output.tokens, state, logits_at=n)
        return self.commit(params, seen.cache, output, n)

    def draft(self, params: Any, cache: Cache, state: Cache, rng: Array, sampling: Sampling
              ) -> tuple[Draft, Cache, Cache]:
        mine = self.own(params)

        def step(carry: tuple, i: Array) -> tuple[tuple, tuple]:
            own, token = carry
            output = self.hybrid.forward(mine, token[:, None], caches.ahead(own, i))
            own, key, logits = output.cache.replace(pos=own.pos), fold_in(rng, i), output.logits[:, 0]
            if sampling.greedy:
                token = choose(logits, key, sampling)
                return (own, token), (token, ())
            probs = law(logits, sampling)
            token = draw(probs, key)
            return (own, token), (token, probs)

        # One step more than the block: the last draft is run, too, so that its slot is there if all are kept.
        (state, _), (tokens, probs) = jax.lax.scan(step, (state, cache.pending), jnp.arange(self.block + 1))
        tokens, drafted = tokens[:-1].T, None
        if not sampling.greedy:
            probs = probs[:-1].swapaxes(0, 1)
            drafted = DenseLaw(probs, jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0])
        return Draft(tokens, jnp.full(tokens.shape[:1], self.block, jnp.int32), drafted), cache, state

    def commit(self, params: Any, state: Cache, output: Output, n: Array) -> Cache:
        return caches.commit(state, n, output.cache.pending)


def build(cfg: ModelConfig, rad: Mapping[str, Any], block: int = 4, cache_dtype: str = 'float32') -> RadDrafter:
    """From a config or an artefact's card: rad holds the fields of RadConfig. Errors: ConfigError."""
    return RadDrafter(cfg, RadConfig.of(cfg, rad), block, cache_dtype)


def untrained(cfg: ModelConfig, base: dict, dtype: Any, layers: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """{'rad': mixers that say nothing yet}, for trying things on any model."""
    rad = RadConfig.of(cfg, {'layers': layers})
    return {'rad': export.drafting(rad, surgery.init_rad(cfg, rad, base, jax.random.key(0)), base, dtype)}
