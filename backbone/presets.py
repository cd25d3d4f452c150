"""Shapes of published models, as their own config files give them.

A preset costs nothing: `model.abstract_params(PRESETS[name])` gives its parameters' shapes. Where a release gives the
number of parameters, tests/backbone/test_presets.py holds the preset against it.
"""

from __future__ import annotations

import dataclasses

from backbone.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeScaling
from backbone.errors import ConfigError


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, *, vocab: int, context: int,
           theta: float = 10_000.0, tied: bool = False, scaling: RopeScaling | None = None, family: str = 'llama',
           eps: float = 1e-5) -> ModelConfig:
    attention = AttentionConfig(heads, kv_heads, hidden // heads, qkv_bias=family == 'qwen2', rope_theta=theta,
                                rope_scaling=scaling)
    return ModelConfig(family, vocab, hidden, layers, context, attention, MlpConfig(intermediate), norm_eps=eps,
                       tie_embeddings=tied)


def _llama3(layers: int, hidden: int, heads: int, intermediate: int, factor: float, tied: bool) -> ModelConfig:
    return _llama(layers, hidden, heads, 8, intermediate, vocab=128_256, context=131_072, theta=500_000.0, tied=tied,
                  scaling=RopeScaling(factor, 1.0, 4.0, 8192))


def _smollm2(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, theta: float) -> ModelConfig:
    return _llama(layers, hidden, heads, kv_heads, intermediate, vocab=49_152, context=8192, theta=theta, tied=True)


def _qwen25(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, *, vocab: int = 151_936,
            context: int = 131_072, tied: bool = True) -> ModelConfig:
    return _llama(layers, hidden, heads, kv_heads, intermediate, vocab=vocab, context=context, theta=1e6, tied=tied,
                  family='qwen2', eps=1e-6)


def _opt(layers: int, hidden: int, heads: int, *, embed_size: int | None = None, placement: str = 'pre') -> ModelConfig:
    attention = AttentionConfig(heads, heads, hidden // heads, qkv_bias=True, out_bias=True, position='learned')
    return ModelConfig('opt', 50_272, hidden, layers, 2048, attention,
                       MlpConfig(4 * hidden, 'relu', gated=False, bias=True), norm='layer', norm_placement=placement,
                       tie_embeddings=True, embed_size=embed_size, position_offset=2)


def _gemma(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig('gemma', 256_000, hidden, layers, 8192, AttentionConfig(heads, kv_heads, 256),
                       MlpConfig(intermediate, 'gelu_tanh'), norm_eps=1e-6, tie_embeddings=True,
                       embed_scale=hidden ** 0.5)


def _mixture(like: ModelConfig, family: str, moe: MoeConfig) -> ModelConfig:
    """A model whose MLP becomes one of many experts; OLMoE also norms its queries and keys."""
    attention = dataclasses.replace(like.attention, qk_norm=family == 'olmoe')
    return like.replace(family=family, attention=attention, moe=moe)


PRESETS: dict[str, ModelConfig] = {
    'smollm2-135m': _smollm2(30, 576, 9, 3, 1536, 100_000.0),
    'smollm2-360m': _smollm2(32, 960, 15, 5, 2560, 100_000.0),
    'smollm2-1.7b': _smollm2(24, 2048, 32, 32, 8192, 130_000.0),
    'tinyllama-1.1b': _llama(22, 2048, 32, 4, 5632, vocab=32_000, context=2048),
    'llama-2-7b': _llama(32, 4096, 32, 32, 11_008, vocab=32_000, context=4096),
    'llama-3.2-1b': _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    'llama-3.2-3b': _llama3(28, 3072, 24, 8192, 32.0, tied=True),
    'llama-3.1-8b': _llama3(32, 4096, 32, 14_336, 8.0, tied=False),
    'llama-3.1-70b': _llama3(80, 8192, 64, 28_672, 8.0, tied=False),
    'opt-125m': _opt(12, 768, 12),
    'opt-350m': _opt(24, 1024, 16, embed_size=512, placement='post'),
    'opt-1.3b': _opt(24, 2048, 32),
    'opt-2.7b': _opt(32, 2560, 32),
    'opt-6.7b': _opt(32, 4096, 32),
    'opt-13b': _opt(40, 5120, 40),
    'opt-30b': _opt(48, 7168, 56),
    'gemma-2b': _gemma(18, 2048, 8, 1, 16_384),
    'gemma-7b': _gemma(28, 3072, 16, 16, 24_576),
    'qwen2.5-0.5b': _qwen25(24, 896, 14, 2, 4864, context=32_768),
    'qwen2.5-1.5b': _qwen25(28, 1536, 12, 2, 8960),
    'qwen2.5-7b': _qwen25(28, 3584, 28, 4, 18_944, vocab=152_064, tied=False),
    'olmoe-1b-7b': _mixture(_llama(16, 2048, 16, 16, 1024, vocab=50_304, context=4096), 'olmoe',
                            MoeConfig(64, 8, norm_topk=False)),
    'mixtral-8x7b': _mixture(_llama(32, 4096, 32, 8, 14_336, vocab=32_000, context=32_768, theta=1e6), 'mixtral',
                             MoeConfig(8, 2)),
    'stories-15m': _llama(6, 288, 6, 6, 768, vocab=32_000, context=256, tied=True),
}


def preset(name: str) -> ModelConfig:
    """Errors: ConfigError names the presets there are."""
    if name not in PRESETS:
        raise ConfigError(f'unknown preset {name!r}, one of {", ".join(PRESETS)}')
    return PRESETS[name]
