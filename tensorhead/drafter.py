"""Drafting with a CP head, one trunk pass a round.

The pending token was drawn by the verifier, so no trunk pass has read it yet. The mixture can: seeing x_{t+1} = y only
re-weights its components, omega_a ~ w_a(e_t) p_a^(1)(y). So the hidden state behind the last kept token drafts the n-1
tokens after the pending one, from factors 2..n, and nothing that was computed is thrown away. At rank 1 these are
Medusa-style heads (Cai et al., 2024). The model: Basharin et al., 2024, arXiv 2410.17765.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.contract import Draft, Output
from backbone.draft_vocabulary import DraftedLaw
from backbone.errors import ConfigError
from backbone.model import token_rows
from backbone.sampling import Sampling, draw, fold_in, law
from tensorhead import cp
from tensorhead import head as heads
from tensorhead import packed as packing
from tensorhead.config import TensorHeadConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TensorHeadDrafter:
    """Drafts K = horizon-1 tokens with params['tensorhead'], from the hidden state behind the last token kept.

    drafts: fewer than those, 0 for all: the rest of the factors is left out, which marginalises them exactly. A short
    draft is cheaper to verify; with few acceptances it is the faster one.
    components: so many of the likeliest components draft, once the pending token has been seen; 0 is all of them. The
    mixture is cut to those before anything is drawn, so the law stays exact; fewer rows meet the vocabulary.
    State: {'e': [B, d]}.
    """

    cfg: TensorHeadConfig
    components: int = 0
    drafts: int = 0

    needs = ('hidden:last',)

    def __post_init__(self):
        if self.cfg.horizon < 2:
            raise ConfigError('tensorhead.horizon must be at least 2 to draft (factor 1 is the pending token), '
                              f'got {self.cfg.horizon}')
        if not 0 <= self.components <= self.cfg.rank:
            raise ConfigError(f'components must be in 0..{self.cfg.rank} (0 is all), got {self.components}')
        if not 0 <= self.drafts < self.cfg.horizon:
            raise ConfigError(f'drafts must be in 0..{self.cfg.horizon - 1} (0 is all), got {self.drafts}')

    @property
    def block(self) -> int:
        return self.drafts or self.cfg.horizon - 1

    def init_params(self, rng: Array) -> dict:
        ids = jnp.arange(self.cfg.draft_vocab, dtype=jnp.int32) if self.cfg.draft_vocab else None
        return heads.init(self.cfg, rng, ids)

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        del max_len
        return {'e': jnp.zeros((batch, self.cfg.hidden_size))}

    def prefill(self, params: Any, state: dict[str, Array], output: Output, n: Array) -> dict[str, Array]:
        return {'e': _at(output.taps['hidden:last'], n)}

    def commit(self, params: Any, state: dict[str, Array], output: Output, n: Array) -> dict[str, Array]:
        new = _at(output.taps['hidden:last'], jnp.maximum(n, 0))
        return {'e': jnp.where(n[:, None] >= 0, new, state['e'])}

    def draft(self, params: Any, cache: Cache, state: dict[str, Array], rng: Array,
              sampling: Sampling) -> tuple[Draft, Cache, dict[str, Array]]:
        head = self.ready(params['tensorhead'], params['base'])
        e = start = state['e']
        if self.cfg.pending_size:
            start = heads.read_pending(head, e, token_rows(params['base'], cache.pending[:, None])[:, 0])
        log_w, logp = self._mixture(head, e, start, cache.pending)

        def choose(s: int, log_q: Array) -> tuple[Array, Array | None]:
            if sampling.greedy:
                return log_q.argmax(-1).astype(jnp.int32), None
            probs = law(log_q, sampling)
            return draw(probs, fold_in(rng, s)), probs

        if logp.shape[2] == 1:  # one component: a draft says nothing of the next, so all are chosen at once
            index, probs = choose(0, logp[:, :, 0])
        else:
            index, probs = cp.walk(log_w, logp, choose)
            probs = None if sampling.greedy else jnp.stack(probs, axis=1)
        ids = head.get('draft_ids')
        length = jnp.full(index.shape[:1], self.block, jnp.int32)
        drafted = None
        if not sampling.greedy:
            gold = jnp.take_along_axis(probs, index[..., None], axis=-1)[..., 0]
            drafted = DraftedLaw(probs, gold, ids, self.cfg.vocab_size)
        return Draft(index if ids is None else ids[index], length, drafted), cache, state

    def ready(self, head: dict, base: dict, dtype: Any = None) -> dict:
        """params['tensorhead'] as it decodes beside params['base'] (tensorhead/packed.py), matrices in `dtype`.

        One that is ready stays as it is; one that is not drafts the same, packed anew in every round.
        """
        return packing.pack(self.cfg, head, base, dtype, self.block)

    def _mixture(self, head: dict, e: Array, start: Array, pending: Array) -> tuple[Array, Array]:
        """e [B, d], pending [B] -> weights given the pending token [B, c], log p of the K drafts [B, K, c, W].

        start [B, d]: what factors 2..n begin from: e, or e with the pending token read into it. All components: one
        product with the vocabulary. Some of them: one to choose them by, one for the rest.
        """
        cfg, count = self.cfg, self.components or self.cfg.rank
        log_w = packing.log_weights(head, e)
        if cfg.rank == 1:  # nothing to choose between, and `law` normalises
            return log_w, packing.logits(cfg, head, packing.features(cfg, head['later'], start))
        first = packing.features(cfg, head['first'], e)
        if count == cfg.rank:
            both = jnp.concatenate([first, packing.features(cfg, head['later'], start)], axis=1)
            logp = jax.nn.log_softmax(packing.logits(cfg, head, both), axis=-1)
            return self._seen(head, log_w, logp[:, 0], pending), logp[:, 1:]
        logp = jax.nn.log_softmax(packing.logits(cfg, head, first), axis=-1)
        log_w, best = jax.lax.top_k(self._seen(head, log_w, logp[:, 0], pending), count)
        later = packing.logits(cfg, head, packing.features_of(cfg, head['later'], start, best))
        if count == 1:
            return jnp.zeros_like(log_w), later
        return jax.nn.log_softmax(log_w, axis=-1), jax.nn.log_softmax(later, axis=-1)

    def _seen(self, head: dict, log_w: Array, logp: Array, pending: Array) -> Array:
        """Weights [B, r] given the pending token, logp [B, r, W] of factor 1. An unknown word says nothing."""
        index, known = heads.index_of(head, pending)
        gold = jnp.take_along_axis(logp, index[:, None, None], axis=-1)[..., 0]
        return cp.condition_on(log_w, jnp.where(known[:, None], gold, 0))


def _at(table: Array, index: Array) -> Array:
    """table [B, S, d] at index [B] -> [B, d]."""
    return jnp.take_along_axis(table, index[:, None, None], axis=1)[:, 0]


def build(cfg: ModelConfig, head: Mapping[str, Any], components: int = 0, drafts: int = 0) -> TensorHeadDrafter:
    """From a config or an artefact's card: head holds the fields of TensorHeadConfig; sizes default to the base's.

    Errors: ConfigError for an unknown field, or a head made for a base of another shape.
    """
    sizes = {'hidden_size': cfg.hidden_size, 'vocab_size': cfg.vocab_size}
    made = TensorHeadConfig.from_dict(sizes | dict(head))
    made.check_base(cfg)
    return TensorHeadDrafter(made, components, drafts)
