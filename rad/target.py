"""The hybrid as a Target of the contract: any drafter, any verifier, batch and uneven prompts as for all.

A replaced layer remembers a state of one size instead of keys and values; backbone/cache.py says how a rejected draft
is undone in it. The hybrid is a model of its own, so it is `exact`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone import layout
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.layers import make_context
from backbone.model import embed, finish, unembed
from rad import model as hybrid
from rad import student
from rad.config import RadConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HybridTarget:
    """A Target with params {'base', 'rad'}, as they are stored or from `pack`. States are at least float32, whatever
    cache_dtype is. Errors: ConfigError where the base does not have such layers."""

    cfg: ModelConfig
    rcfg: RadConfig
    cache_dtype: str = 'float32'
    exact: ClassVar[bool] = True
    reference: ClassVar[None] = None

    def __post_init__(self):
        self.rcfg.check(self.cfg)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """layers: a KVState for each kept layer and an SsmState for each replaced one ({'kv', 'ssm'} in the parallel
        control). Blocks of up to block + 1 tokens can be committed in part; of a longer one (a prompt) just what its
        `logits_at` says, or nothing at all in a row that has nothing yet."""
        rcfg = self.rcfg
        kept = self.cfg.num_layers - (0 if rcfg.parallel else len(rcfg.layers))
        kv = iter(caches.init_kv(self.cfg.replace(num_layers=kept), batch, max_len, self.cache_dtype, stacked=False)
                  if kept else ())
        ssm = lambda: caches.init_ssm(rcfg.ssm, batch, block, self.cache_dtype)
        replaced = (lambda: {'kv': next(kv), 'ssm': ssm()}) if rcfg.parallel else ssm
        layers = tuple(replaced() if l in rcfg.layers else next(kv) for l in range(self.cfg.num_layers))
        return caches.init_cache(layers, batch, max_len)

    def kv_bytes_formula(self, tokens: int, block: int = 0) -> float:
        """Bytes that the layers of a row with `tokens` positions remember: keys and values of the kept ones; state,
        tail and a log of block + 1 tokens of the others, whatever `tokens` is."""
        att, ssm, k = self.cfg.attention, self.rcfg.ssm, len(self.rcfg.layers)
        kept = self.cfg.num_layers - (0 if self.rcfg.parallel else k)
        keys = 2.0 * kept * att.num_kv_heads * att.head_dim * tokens * jnp.dtype(self.cache_dtype).itemsize
        logged = ssm.num_groups * (ssm.head_dim + ssm.state_size) + 2 * ssm.num_heads + ssm.conv_channels
        scalars = (ssm.inner * ssm.state_size + (ssm.conv_width - 1) * ssm.conv_channels + (block + 1) * logged)
        position = jnp.dtype('int32').itemsize
        return keys + k * (scalars * jnp.promote_types(self.cache_dtype, jnp.float32).itemsize + position)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: Mapping[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the contract says; a block may also begin behind tokens that are not committed yet (`caches.ahead`), as
        long as the log holds both. Errors: ConfigError for masks, and for a block longer than the log without
        logits_at."""
        params = student.whole(self.rcfg.layers, params)
        cfg, base = self.cfg, params['base']
        if masks is not None:
            raise ConfigError('a hybrid target takes no masks')
        native = isinstance(base['layers'], tuple)  # packed for decoding on one device
        ctx = make_context(cfg, cache.pos, tokens.shape[1], cache.tokens.shape[1] - 1, native=native)
        if resume is None:
            x, lo = embed(cfg, base, tokens, ctx.positions), 0
        else:
            x, lo = resume.hidden, resume.layer
        x, layers, found = hybrid.run(cfg, self.rcfg, params, x, cache.layers, ctx, lo=lo, taps=taps, last=logits_at)
        hidden = finish(cfg, base, x)
        if 'hidden:last' in taps:
            found['hidden:last'] = hidden
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        cache = caches.write_tokens(cache.replace(layers=layers), tokens)
        return Output(tokens, unembed(cfg, base, hidden), cache, found)


def build(model: Mapping[str, Any], rad: Mapping[str, Any], cache_dtype: str = 'float32',
          packed: bool = True) -> HybridTarget:
    """By name: fields of ModelConfig and RadConfig. packed: for parameters from `pack`; it takes stored ones too."""
    del packed
    cfg = ModelConfig.from_dict(model)
    return HybridTarget(cfg, RadConfig.of(cfg, rad), cache_dtype)


def pack(params: dict, dtype: Any = jnp.float32, **settings: Any) -> dict:
    """{'base', 'rad'} as trained, for decoding: matrices in `dtype`, everything else in float32; a base that is packed
    stays. settings: those of `build`, which do not matter here."""
    del settings
    base = params['base']
    base = base if isinstance(base['layers'], tuple) else layout.pack(base, dtype)
    turn = layout.transpose if 'kernel_t' in base.get('lm_head', {}) else lambda tree: tree
    stacked = params['rad']['mixers']

    def one(i: int) -> dict:
        mixer = jax.tree.map(lambda a: jnp.asarray(a[i], jnp.float32), stacked)
        # The convolution's kernel is none of the matrices: nothing is multiplied by it.
        matrices = {n: {'kernel': jnp.asarray(stacked[n]['kernel'][i], dtype)} for n in ('in_proj', 'out_proj')
                    if n in stacked}
        return mixer | turn(matrices)

    return {'base': base, 'rad': {'mixers': tuple(one(i) for i in range(len(stacked['D'])))}}
