"""Hugging Face's config.json <-> ModelConfig, for llama, qwen2, opt, gemma, mixtral and olmoe.

Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). The first is written; both versions read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from backbone.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeScaling
from backbone.errors import ConfigError, FormatError, TokenizerError

_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
                'gelu_pytorch_tanh': 'gelu_tanh'}
_TO_HF = {'silu': 'silu', 'relu': 'relu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
_ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'opt': 'OPTForCausalLM',
                  'gemma': 'GemmaForCausalLM', 'mixtral': 'MixtralForCausalLM', 'olmoe': 'OlmoeForCausalLM'}
_DEFAULT_CONTEXT = {'llama': 2048, 'qwen2': 32768, 'opt': 2048, 'gemma': 8192, 'mixtral': 131072, 'olmoe': 4096}
_DEFAULT_EPS = {'mixtral': 1e-5, 'olmoe': 1e-5}  # else 1e-6
_DEFAULT_THETA = {'mixtral': 1e6}  # else 1e4


@contextlib.contextmanager
def faults_of(where: str) -> Iterator[None]:
    """A damaged file can hold any value: what a mapping trips over becomes one line that names the file."""
    try:
        yield
    except KeyError as error:
        raise FormatError(f'{where}: {error.args[0]} is missing') from None
    except (ConfigError, TokenizerError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(f'{where}: {error}') from None


def whole(data: Mapping[str, Any], key: str, default: Any = None) -> int:
    """data[key] as an int. Errors: KeyError, ValueError name the key."""
    value = data[key] if default is None else data.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f'{key} is {value!r}, not a count')
    return value


def from_hf(data: Mapping[str, Any], where: str) -> ModelConfig:
    """Errors: FormatError for an unknown architecture or a feature that is not modelled here."""
    family = data.get('model_type') if isinstance(data, Mapping) else None
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise FormatError(f'{where}: unknown architecture {family!r}, one of {", ".join(_ARCHITECTURES)}')
    with faults_of(where):
        return _opt_from_hf(data) if family == 'opt' else _llama_from_hf(data, family)


def _llama_from_hf(data: Mapping[str, Any], family: str) -> ModelConfig:
    hidden, heads = whole(data, 'hidden_size'), whole(data, 'num_attention_heads')
    theta, scaling = _rope_from_hf(data, _DEFAULT_THETA.get(family, 10_000.0))
    _refuse_windows(data)
    # Gemma was trained with the tanh form; its older configs say 'gelu' and mean it.
    activation = data.get('hidden_activation') or data.get('hidden_act', 'silu')
    activation = 'gelu_pytorch_tanh' if (family, activation) == ('gemma', 'gelu') else activation
    bias = bool(data.get('attention_bias', False))
    return ModelConfig(
        family=family,
        vocab_size=whole(data, 'vocab_size'),
        hidden_size=hidden,
        num_layers=whole(data, 'num_hidden_layers'),
        max_seq_len=whole(data, 'max_position_embeddings', _DEFAULT_CONTEXT[family]),
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=whole(data, 'num_key_value_heads', heads),
            head_dim=whole(data, 'head_dim', 256 if family == 'gemma' else hidden // heads),
            qkv_bias=bias or family == 'qwen2', out_bias=bias, rope_theta=theta, rope_scaling=scaling,
            window=_window(data) if family == 'mixtral' else None, qk_norm=family == 'olmoe'),
        mlp=MlpConfig(whole(data, 'intermediate_size'), _activation(activation),
                      bias=bool(data.get('mlp_bias', False))),
        norm_eps=float(data.get('rms_norm_eps', _DEFAULT_EPS.get(family, 1e-6))),
        tie_embeddings=bool(data.get('tie_word_embeddings', family == 'gemma')),
        embed_scale=hidden ** 0.5 if family == 'gemma' else None,
        moe=_moe_from_hf(data, family))


def _window(data: Mapping[str, Any]) -> int | None:
    return None if data.get('sliding_window') is None else whole(data, 'sliding_window')


def _moe_from_hf(data: Mapping[str, Any], family: str) -> MoeConfig | None:
    if family == 'mixtral':  # router_jitter_noise is training's
        return MoeConfig(whole(data, 'num_local_experts'), whole(data, 'num_experts_per_tok'))
    if family != 'olmoe':
        return None
    if data.get('clip_qkv') is not None:
        raise ValueError(f'clip_qkv = {data["clip_qkv"]!r} is not supported')
    return MoeConfig(whole(data, 'num_experts'), whole(data, 'num_experts_per_tok'),
                     norm_topk=bool(data.get('norm_topk_prob', False)))


def _opt_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    hidden, heads = whole(data, 'hidden_size'), whole(data, 'num_attention_heads')
    before = bool(data.get('do_layer_norm_before', True))
    for key, usual in (('enable_bias', True), ('layer_norm_elementwise_affine', True),
                       ('_remove_final_layer_norm', False)):
        if data.get(key, usual) != usual:
            raise ValueError(f'{key} = {data[key]!r} is not supported')
    width = whole(data, 'word_embed_proj_dim', hidden)
    return ModelConfig(
        family='opt',
        vocab_size=whole(data, 'vocab_size'),
        hidden_size=hidden,
        num_layers=whole(data, 'num_hidden_layers'),
        max_seq_len=whole(data, 'max_position_embeddings', _DEFAULT_CONTEXT['opt']),
        attention=AttentionConfig(heads, heads, hidden // heads, qkv_bias=True, out_bias=True, position='learned'),
        mlp=MlpConfig(whole(data, 'ffn_dim'), _activation(data.get('activation_function', 'relu')),
                      gated=False, bias=True),
        norm='layer', norm_placement='pre' if before else 'post',
        tie_embeddings=bool(data.get('tie_word_embeddings', True)),
        embed_size=None if width == hidden else width, position_offset=2)


def _activation(name: Any) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f'unknown activation {name!r}')
    return _ACTIVATIONS[name]


def _rope_from_hf(data: Mapping[str, Any], usual: float) -> tuple[float, RopeScaling | None]:
    rope = {**(data.get('rope_scaling') or {}), **(data.get('rope_parameters') or {})}
    theta = float(rope.get('rope_theta') or data.get('rope_theta') or usual)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if rope.get('partial_rotary_factor', 1.0) != 1.0:
        raise ValueError('partial_rotary_factor is not supported')
    if kind == 'default':
        return theta, None
    if kind != 'llama3':
        raise ValueError(f'rope type {kind!r} is not supported, only default and llama3')
    return theta, RopeScaling(float(rope['factor']), float(rope['low_freq_factor']), float(rope['high_freq_factor']),
                              whole(rope, 'original_max_position_embeddings'))


def _refuse_windows(data: Mapping[str, Any]) -> None:
    """Qwen2 configs carry a `sliding_window` that counts only when switched on."""
    windowed = data.get('use_sliding_window', False) and any(
        kind == 'sliding_attention' for kind in data.get('layer_types') or ['sliding_attention'])
    if windowed:
        raise ValueError('sliding windows in some layers are not supported')


def to_hf(cfg: ModelConfig, dtype: str, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """config.json as transformers wants it. dtype: 'float32', 'float16' or 'bfloat16'.

    Errors: FormatError where transformers' class for the family cannot be set that way.
    """
    attention, mlp = cfg.attention, cfg.mlp
    common = {
        'architectures': [_ARCHITECTURES[cfg.family]], 'model_type': cfg.family, 'torch_dtype': dtype,
        'vocab_size': cfg.vocab_size, 'hidden_size': cfg.hidden_size, 'num_hidden_layers': cfg.num_layers,
        'num_attention_heads': attention.num_heads, 'max_position_embeddings': cfg.max_seq_len,
        'tie_word_embeddings': cfg.tie_embeddings, 'bos_token_id': bos_id, 'pad_token_id': None,
        'eos_token_id': None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)}
    if cfg.family == 'opt':
        found = common | {'ffn_dim': mlp.intermediate_size, 'activation_function': _TO_HF[mlp.activation],
                          'do_layer_norm_before': cfg.norm_placement == 'pre',
                          'word_embed_proj_dim': cfg.embed_size or cfg.hidden_size, 'dropout': 0.0}
    else:
        found = common | {
            'num_key_value_heads': attention.num_kv_heads, 'head_dim': attention.head_dim,
            'intermediate_size': mlp.intermediate_size, 'hidden_act': _TO_HF[mlp.activation],
            'rms_norm_eps': cfg.norm_eps, 'rope_theta': attention.rope_theta}
        if attention.rope_scaling is not None:
            scaling = attention.rope_scaling
            found['rope_scaling'] = {
                'rope_type': 'llama3', 'factor': scaling.factor, 'low_freq_factor': scaling.low_freq_factor,
                'high_freq_factor': scaling.high_freq_factor,
                'original_max_position_embeddings': scaling.original_max_seq_len}
        if cfg.family == 'llama':
            found |= {'attention_bias': attention.qkv_bias, 'mlp_bias': mlp.bias}
        if cfg.family == 'mixtral':
            found |= {'num_local_experts': cfg.moe.num_experts, 'num_experts_per_tok': cfg.moe.experts_per_token,
                      'sliding_window': attention.window}
        if cfg.family == 'olmoe':
            found |= {'num_experts': cfg.moe.num_experts, 'num_experts_per_tok': cfg.moe.experts_per_token,
                      'norm_topk_prob': cfg.moe.norm_topk, 'attention_bias': attention.qkv_bias}
        if cfg.family == 'gemma':
            found['hidden_activation'] = found['hidden_act']
    back = from_hf(found, 'config.json')
    if back != cfg:
        lost = [key for key, value in cfg.to_dict().items() if back.to_dict()[key] != value]
        raise FormatError(f'{cfg.family}: config.json cannot express {", ".join(lost)} of this model')
    return found
