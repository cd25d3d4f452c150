"""Lossless sparsity: the thinned model drafts, its own dense base verifies. In no paper.

A draft step is the sparse target's: it writes keys and values of all heads, in deeper layers made of thinned states.
Verification runs the same slots through every layer, whole, from the embedding on, and so overwrites all of them before
anything is kept: the cache never holds a thinned state behind a committed token.
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
from backbone.model import cache_context
from backbone.sampling import Sampling, choose, draw, fold_in, law
from sparsity import layout, methods, step
from sparsity.config import SparsityConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SparseDrafter:
    """Drafts K = block tokens with params['base'] thinned as s and the selector say, on the target's own cache.

    selector: one that needs nothing of the prompt. compute, implementation: as of SparseTarget; gathered products want
    a base of layout.pack, or what `ready` adds beside another packed one.
    State: what is kept, {'units': {'heads', 'neurons'}, 'at'}, see step.Choice.
    """

    cfg: ModelConfig
    s: SparsityConfig
    selector: Any
    block: int = 4
    compute: str = 'masked'
    implementation: str | None = None
    needs = ()

    def __post_init__(self):
        step.checked(self.cfg, self.s, self.compute, self.implementation, stacked=False)
        if self.block < 1:
            raise ConfigError(f'SparseDrafter needs block >= 1, got {self.block}')
        if self.selector.reads_prompt or hasattr(self.selector, 'layer'):
            raise ConfigError(f'SparseDrafter: {type(self.selector).__name__} needs more than the token that is run')

    def init_params(self, rng: Array) -> dict:
        """Of the predictor, untrained; {} for other selectors."""
        if not hasattr(self.selector, 'p'):
            return {}
        from sparsity.predictor import init_params

        return init_params(self.cfg, self.selector.p, rng)

    def init_state(self, batch: int, max_len: int) -> dict[str, Any]:
        del max_len
        choice = step.first_choice(self.cfg, self.s, 'masked', batch)
        return {'units': choice.units, 'at': choice.at}

    def prefill(self, params: Any, state: dict[str, Any], output: Output, n: Array) -> dict[str, Any]:
        return state

    def commit(self, params: Any, state: dict[str, Any], output: Output, n: Array) -> dict[str, Any]:
        """Nothing to do: a choice made for a token that was not kept is found out by its slot (step.due)."""
        return state

    def ready(self, mine: dict, base: dict, dtype: Any = jnp.float32) -> dict:
        """params['sparsity'] as it drafts beside params['base']."""
        mine = jax.tree.map(jnp.asarray, mine)
        if self.compute == 'gathered' and isinstance(base['layers'], tuple) and not layout.has_rows(base):
            return mine | {'rows': layout.turned_rows(base)}
        return mine

    def draft(self, params: Any, cache: Cache, state: dict[str, Any], rng: Array,
              sampling: Sampling) -> tuple[Draft, Cache, dict[str, Any]]:
        rows = params.get('sparsity', {}).get('rows')
        if rows is not None:
            params = params | {'base': layout.with_rows(params['base'], rows)}
        batch, size = cache.pos.shape[0], self.block
        choice = step.Choice(state['units'], state['at'], step.pick(self.cfg, self.s, self.compute, state['units']))

        def one(carry: tuple, i: Array) -> tuple[tuple, tuple]:
            token, kv, choice = carry
            ctx = cache_context(self.cfg, caches.ahead(cache, i), 1)
            logits, kv, choice, _ = step.one_token(self, params, token[:, None], kv, ctx, choice, {})
            key = fold_in(rng, i)
            if sampling.greedy:
                token = choose(logits[:, 0], key, sampling)
                return (token, kv, choice), (token, ())
            probs = law(logits[:, 0], sampling)
            token = draw(probs, key)
            return (token, kv, choice), (token, probs)

        start = (cache.pending, cache.layers, choice)
        (_, kv, choice), (tokens, probs) = jax.lax.scan(one, start, jnp.arange(size))
        tokens, drafted = tokens.T, None
        if not sampling.greedy:
            probs = probs.swapaxes(0, 1)
            drafted = DenseLaw(probs, jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0])
        draft = Draft(tokens, jnp.full((batch,), size, jnp.int32), drafted)
        return draft, cache.replace(layers=kv), {'units': choice.units, 'at': choice.at}


def build(cfg: ModelConfig, sparsity: Mapping[str, Any] | None = None, selector: str = 'predictor',
          predictor: Mapping[str, Any] | None = None, block: int = 4, compute: str = 'masked',
          implementation: str | None = None) -> SparseDrafter:
    """From a config or an artefact's card: fields of SparsityConfig and PredictorConfig. Errors: ConfigError."""
    s = SparsityConfig.of(cfg, sparsity or {})
    return SparseDrafter(cfg, s, methods.named(selector, cfg, s, predictor), block, compute, implementation)
