"""Contextual sparsity as a Target: prompts run whole, single tokens through what the selector keeps.

An approximation of the base, with the exact one as its `reference`. After Akhauri et al., 2024 (ShadowLLM, arXiv
2406.16635); causal: what a token goes through depends on this token and earlier ones. Keys and values are made for
every head at every position, so a head may come back at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.layers import make_context
from backbone.model import PlainTarget, embed, finish, run_layers, unembed
from sparsity import account, audit, prompt, step
from sparsity.audit import SparseState
from sparsity.config import SparsityConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SparseTarget:
    """A Target with params {'base', 'sparsity'}. Prompts and blocks of more tokens run whole, exact as far as the keys
    and values before them are.

    selector: of sparsity/selectors.py, or of sparsity/thresholds.py.
    compute: 'masked' multiplies by 0 and 1 in the plain layer; 'gathered' reads only what is kept, of parameters made
    by layout.pack. implementation: of the gathered products, see sparsity/gather.py.
    logged: whether the cache keeps what every refresh dropped, for `audit`: a bit a unit.
    stacked, cache_dtype: as of PlainTarget.
    """

    cfg: ModelConfig
    s: SparsityConfig
    selector: Any
    compute: str = 'masked'
    implementation: str | None = None
    cache_dtype: str = 'float32'
    stacked: bool = True
    logged: bool = False
    exact: ClassVar[bool] = False

    def __post_init__(self):
        step.checked(self.cfg, self.s, self.compute, self.implementation, self.stacked)
        if self.by_value and self.compute != 'masked':
            raise ConfigError(f'{type(self.selector).__name__} decides while a layer runs: compute must be masked, got '
                              f'{self.compute}')

    @property
    def by_value(self) -> bool:
        """Whether the selector is a layer of its own that looks at the values themselves."""
        return hasattr(self.selector, 'layer')

    @property
    def reference(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype, self.stacked)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """As PlainTarget's; `layers` is a SparseState."""
        del block
        state = audit.init(self, batch, max_len)
        return caches.init_cache(state, batch, max_len)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: Mapping[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the contract says. logits_at marks a prompt. Errors: ConfigError for resume or masks, and for taps of a
        single token, of which the heads that were dropped have none."""
        if resume is not None or masks is not None:
            raise ConfigError('a sparse target takes no resume and no masks')
        if logits_at is not None:
            return self._prompt(params, tokens, cache, taps, logits_at)
        if tokens.shape[1] > 1:
            return self.full(params, tokens, cache, taps=taps)
        if taps:
            raise ConfigError(f'a sparse target has no taps of a single token, asked for {taps[0]!r}')
        s: SparseState = cache.layers
        ctx = self._context(cache, 1)
        if self.by_value:
            logits, kv, reads = self.selector.one_token(self, params, tokens, s.kv, ctx, s.reads)
            s = s.replace(kv=kv, reads=reads)
        else:
            logits, kv, choice, anew = step.one_token(self, params, tokens, s.kv, ctx, s.choice, s.prompt)
            s = audit.noted(self, params, s.replace(kv=kv, choice=choice), cache.pos, anew)
        return Output(tokens, logits, caches.write_tokens(cache.replace(layers=s), tokens))

    def full(self, params: dict, tokens: Array, cache: caches.Cache, rows: Array | None = None, *,
             taps: tuple[str, ...] = (), logits_at: Array | None = None) -> Output:
        """Every layer, whole, on the block [B, S], as the reference would on this cache; `rows` [B]: the others write
        nothing."""
        ctx = self._context(cache, tokens.shape[1])
        if rows is not None:
            ctx = ctx.replace(pos=jnp.where(rows, cache.pos, cache.tokens.shape[1] - 1))  # dropped
        x = embed(self.cfg, params['base'], tokens, ctx.positions)
        x, kv, found = run_layers(self.cfg, params['base'], x, cache.layers.kv, ctx, taps=taps)
        return self._said(params, tokens, cache, cache.layers.replace(kv=kv), x, found, taps, logits_at)

    def _prompt(self, params, tokens, cache, taps, logits_at):
        s: SparseState = cache.layers
        choice = () if self.by_value else s.choice.replace(at=jnp.full_like(s.choice.at, -1))
        s = s.replace(begin=cache.pos + logits_at + 1, choice=choice)
        cache = cache.replace(layers=s)
        if not s.prompt:
            return self.full(params, tokens, cache, taps=taps, logits_at=logits_at)
        ctx = self._context(cache, tokens.shape[1])
        x = embed(self.cfg, params['base'], tokens, ctx.positions)
        x, kv, gathered, found = prompt.run(self.cfg, self.s, params['base'], x, s.kv, ctx, logits_at, taps)
        return self._said(params, tokens, cache, s.replace(kv=kv, prompt=gathered), x, found, taps, logits_at)

    def _said(self, params, tokens, cache, s, x, found, taps, logits_at):
        hidden = finish(self.cfg, params['base'], x)
        if 'hidden:last' in taps:
            found['hidden:last'] = hidden
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        cache = caches.write_tokens(cache.replace(layers=s), tokens)
        return Output(tokens, unembed(self.cfg, params['base'], hidden), cache, found)

    def _context(self, cache, size):
        unstacked = isinstance(cache.layers.kv, tuple)
        return make_context(self.cfg, cache.pos, size, cache.tokens.shape[1] - 1, native=unstacked)

    # --- read out -----------------------------------------------------------------------------------------------

    def audit(self, cache: caches.Cache) -> dict[str, Any]:
        """By slot [B, C]: 'skipped', None but where a choice was made: then {'heads', 'neurons'}, for each layer the
        ids of the units that were left out from there on. {} unless `logged`."""
        return audit.read(self, cache) if self.logged and not self.by_value else {}

    def statistics(self, cache: caches.Cache, weights: int = 4) -> dict[str, Any]:
        """Of a finished call, see account.statistics. weights: bytes of a stored weight."""
        cached = jnp.dtype(self.cache_dtype).itemsize
        return account.statistics(self.cfg, cache.layers.reads, weights, cached)
