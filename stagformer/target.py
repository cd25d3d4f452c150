"""The staggered model as a Target of the contract: any drafter, any verifier, batch and uneven prompts as for all.

One token a row runs all stacks at once (step.py); a block, as in prefill and verification, is a pass a stack
(passes.py). Speculation on top is therefore lossless but pays twice: verifying a block cannot be staggered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.model import finish, unembed
from stagformer import layout, passes, recurrent, state, step
from stagformer.config import StagFormerConfig
from stagformer.model import mixed

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StagFormerTarget:
    """params: {'base', 'stagformer'} as they are stored (form 'storage'), or from layout.pack in that form.

    recurrent: after the prompt only the last pass runs, and reads its own earlier outputs where it was trained to read
    the pass below (StagFormer, section 3.2; shared weights only). An approximation: exact is False and `reference` the
    exact model. Its first token after a prompt is the exact one's.
    Errors: ConfigError for recurrent without shared weights.
    """

    cfg: StagFormerConfig
    cache_dtype: str = 'float32'
    form: str = 'storage'
    recurrent: bool = False

    def __post_init__(self):
        layout.check_form(self.cfg, self.form)
        if self.recurrent and not (self.cfg.shared and self.cfg.stacks > 1):
            raise ConfigError('recurrent decoding needs shared weights and at least two stacks')
        if self.recurrent and (self.cfg.mix or self.cfg.context_from != 'prev' or self.cfg.lag != 1):
            raise ConfigError('recurrent decoding runs one pass: it has nothing to mix, one context, and lag 1')

    @property
    def exact(self) -> bool:
        return not self.recurrent

    @property
    def reference(self) -> StagFormerTarget | None:
        return dataclasses.replace(self, recurrent=False) if self.recurrent else None

    @property
    def vocab_size(self) -> int:
        return self.cfg.base.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.base.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """Errors: ConfigError for more slots than the model was made for."""
        if max_len > self.max_seq_len:
            raise ConfigError(f'a cache of {max_len} slots is longer than the context of {self.max_seq_len}')
        layers = state.init(self.cfg, batch, max_len, block, self.cache_dtype, self.form)
        return caches.init_cache(layers, batch, max_len)

    def kv_bytes_formula(self, tokens: int) -> float:
        """Bytes of keys and values of a row with `tokens` positions: every stack's own, and of each stack that others
        read as many positions as they see. Two stacks with full cross-attention: half as much again as a plain model's.
        """
        cfg = self.cfg
        own = sum(cfg.depths) * cfg.base.attention.num_kv_heads * tokens
        read = cfg.cross_sources * cfg.kv_heads * min(tokens, cfg.window or tokens)
        return 2.0 * cfg.base.attention.head_dim * (own + read) * jnp.dtype(self.cache_dtype).itemsize

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: Mapping[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the contract says. Taps: 'hidden:last' only. Errors: ConfigError for other taps, resume or masks."""
        cfg, base = self.cfg, params['base']
        if resume is not None or masks is not None:
            raise ConfigError('a staggered target takes no resume (its layers are not one sequence) and no masks')
        if unknown := [tap for tap in taps if tap != 'hidden:last']:
            raise ConfigError(f'unknown tap {unknown[0]!r} of a staggered target, which has hidden:last')
        form = self.form
        if self.recurrent and logits_at is None:
            outputs, layers = recurrent.run(cfg, params, tokens, cache, form)
        elif tokens.shape[1] == 1 and form != 'storage' and cfg.lag == 1:
            outputs, layers = step.run(cfg, params, tokens, cache, form)
        else:
            outputs, layers = passes.run(cfg, params, tokens, cache, form, logits_at)
        hidden = finish(cfg.base, base, mixed(cfg, params, outputs))
        found = {'hidden:last': hidden} if taps else {}
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        cache = caches.write_tokens(cache.replace(layers=layers), tokens)
        return Output(tokens, unembed(cfg.base, base, hidden), cache, found)


def build(model: Mapping[str, Any], cache_dtype: str = 'float32', packed: bool = True,
          recurrent: bool = False) -> StagFormerTarget:
    """By name: model is a StagFormerConfig as a dict. packed: for parameters from layout.build."""
    cfg = StagFormerConfig.from_dict(model)
    return StagFormerTarget(cfg, cache_dtype, layout.form_here(cfg) if packed else 'storage', recurrent)
