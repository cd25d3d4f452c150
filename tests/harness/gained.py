"""A stand-in for a method whose model is more than a plain base: a gain for each word, on the logits."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from backbone import layout
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.language_model import LanguageModel
from backbone.model import PlainTarget, init_params, unembed


@dataclasses.dataclass(frozen=True)
class GainedTarget:
    """Logits times params['gained']['words'] [V]."""

    cfg: ModelConfig
    cache_dtype: str = 'float32'
    packed: bool = False
    exact: bool = True
    reference: Any = None

    vocab_size = property(lambda self: self.cfg.vocab_size)
    max_seq_len = property(lambda self: self.cfg.max_seq_len)
    plain = property(lambda self: PlainTarget(self.cfg, self.cache_dtype, stacked=not self.packed))

    def init_cache(self, batch, max_len, block):
        return self.plain.init_cache(batch, max_len, block)

    def forward(self, params, tokens, cache, **options):
        if options.get('resume') is not None:
            raise ConfigError('resume: a gained model runs whole')
        output = self.plain.forward(params, tokens, cache, **options)
        return output.replace(logits=output.logits * params['gained']['words'])

    def kv_bytes_formula(self, tokens: int) -> float:
        a = self.cfg.attention
        return 2.0 * self.cfg.num_layers * a.num_kv_heads * a.head_dim * tokens * jnp.dtype(self.cache_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Gained(LanguageModel):
    """Its task: the base and the gains are trained."""

    trainable: tuple[str, ...] = ('base/.*', 'gained/.*')
    parts: tuple[str, ...] = ('gained',)

    @property
    def target(self):
        return GainedTarget(self.cfg)

    def init(self, rng):
        return {'base': init_params(self.cfg, rng), 'gained': {'words': jnp.ones(self.cfg.vocab_size)}}

    def decodes(self):
        return {'factory': f'{__name__}.build_target', 'kwargs': {'model': self.cfg.to_dict()},
                'pack': f'{__name__}.build_packed', 'params': list(self.parts)}


def build(model) -> Gained:
    return Gained(ModelConfig.from_dict(dict(model)))


def build_target(model, cache_dtype='float32', packed=False) -> GainedTarget:
    return GainedTarget(ModelConfig.from_dict(model), cache_dtype, packed)


def build_packed(model, params, dtype) -> dict:
    del model
    words = jnp.asarray(params['gained']['words'], 'float32')
    return {'base': layout.pack(params['base'], dtype), 'gained': {'words': words}}


def logits(cfg: ModelConfig, tree: dict, tokens) -> Any:
    """What the whole model says, written independently: [B, S, V]."""
    from backbone.model import hidden_states

    return unembed(cfg, tree['base'], hidden_states(cfg, tree['base'], tokens)) * tree['gained']['words']
