"""GGUF files: read F32, F16, BF16 and the common quantisations, write F32, F16 and Q8_0.

Metadata keys and their meaning are those of llama.cpp; `gguf_header` reads them safely, the `gguf` package
dequantises, quantises and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from backbone import tokenizer as tokenizers
from backbone import vocabulary
from backbone.config import AttentionConfig, MlpConfig, ModelConfig, RopeScaling
from backbone.errors import FormatError
from backbone.formats import dequantised
from backbone.formats.gguf_header import read_header
from backbone.formats.hf_config import faults_of, whole
from backbone.formats.names import table
from backbone.formats.staging import staged
from backbone.formats.tensors import (
    QUANTISED,
    Loaded,
    Outgoing,
    Stored,
    block_size,
    check_sizes,
    encoded_bytes,
    narrow,
    outgoing,
    plan,
)
from backbone.formats.tensors import read as read_leaves

_ACTIVATIONS = {'llama': 'silu', 'qwen2': 'silu', 'gemma': 'gelu_tanh'}
DTYPES = {'f32': gguf.LlamaFileType.ALL_F32, 'f16': gguf.LlamaFileType.MOSTLY_F16,
               'q8_0': gguf.LlamaFileType.MOSTLY_Q8_0}
_FREQUENCIES = 'rope_freqs.weight'
_NO_TOKENIZER = 'none'  # llama.cpp refuses a file that does not say so
# Ours, for a Llama-3 scaling other than the released models' own; other readers pass over unknown keys.
_SCALING = 'headway.rope_scaling.'
# What every released Llama 3.x has; its file holds only the resulting factors.
_LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_seq_len': 8192}


def from_metadata(metadata: Mapping[str, Any], stored: Mapping[str, Stored], where: str) -> ModelConfig:
    """Errors: FormatError for an unknown architecture or a feature that is not modelled here."""
    family = metadata.get('general.architecture')
    if not isinstance(family, str) or family not in _ACTIVATIONS:
        raise FormatError(f'{where}: unknown architecture {family!r}, one of {", ".join(_ACTIVATIONS)}')
    with faults_of(where):
        own = {key.removeprefix(f'{family}.'): value for key, value in metadata.items()
               if key.startswith(f'{family}.')}
        return _from_own(family, own, metadata, stored)


def _from_own(family: str, own: Mapping[str, Any], metadata: Mapping[str, Any],
              stored: Mapping[str, Stored]) -> ModelConfig:
    hidden, heads = whole(own, 'embedding_length'), whole(own, 'attention.head_count')
    head_dim = whole(own, 'attention.key_length', hidden // heads)
    for key, usual in (('expert_count', 0), ('attention.value_length', head_dim), ('rope.dimension_count', head_dim),
                       ('rope.scaling.type', 'none'), ('attention.sliding_window', 0)):
        if own.get(key, usual) != usual:
            raise ValueError(f'{key} = {own[key]!r} is not supported')
    theta = _short(own.get('rope.freq_base', 10_000.0))
    vocabulary = stored['token_embd.weight'].shape[0] if 'token_embd.weight' in stored else whole(own, 'vocab_size')
    if whole(own, 'vocab_size', vocabulary) != vocabulary:
        raise ValueError(f'vocab_size is {own["vocab_size"]}, the embedding has {vocabulary} rows')
    return ModelConfig(
        family=family, vocab_size=vocabulary, hidden_size=hidden, num_layers=whole(own, 'block_count'),
        max_seq_len=whole(own, 'context_length'),
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=whole(own, 'attention.head_count_kv', heads), head_dim=head_dim,
            qkv_bias='blk.0.attn_q.bias' in stored, out_bias='blk.0.attn_output.bias' in stored,
            rope_theta=theta, rope_scaling=_read_scaling(metadata, stored, head_dim, theta)),
        mlp=MlpConfig(whole(own, 'feed_forward_length'), _ACTIVATIONS[family], bias='blk.0.ffn_up.bias' in stored),
        norm_eps=_short(own['attention.layer_norm_rms_epsilon']),
        tie_embeddings='output.weight' not in stored,
        embed_scale=hidden ** 0.5 if family == 'gemma' else None)


def _short(value: Any) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError(f'{value!r} is not a number')
    return float(str(np.float32(value)))


def _factors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """What each rotary frequency is divided by: the tensor a GGUF keeps in place of the scaling. [head_dim / 2]"""
    from backbone.layers import rope_frequencies

    return np.asarray(rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling), np.float32)


def _read_scaling(metadata: Mapping[str, Any], stored: Mapping[str, Stored], head_dim: int,
                  theta: float) -> RopeScaling | None:
    if _FREQUENCIES not in stored:
        return None
    if stored[_FREQUENCIES].shape != (head_dim // 2,):
        raise ValueError(f'{_FREQUENCIES} is {list(stored[_FREQUENCIES].shape)}, expected {[head_dim // 2]}')
    found = stored[_FREQUENCIES].rows()
    if np.array_equal(found, np.ones_like(found)):
        return None
    values = {name: metadata.get(_SCALING + name, usual) for name, usual in _LLAMA3.items()}
    factor = _short(metadata.get(_SCALING + 'factor', float(found.max())))
    scaling = RopeScaling(factor, _short(values['low_freq_factor']), _short(values['high_freq_factor']),
                          whole(values, 'original_max_seq_len'))
    if not np.allclose(_factors(scaling, head_dim, theta), found, rtol=1e-4, atol=0):
        raise ValueError(f'{_FREQUENCIES} is not a Llama-3 scaling with the released settings')
    return scaling


def to_metadata(cfg: ModelConfig, where: str) -> dict[str, Any]:
    """The `<family>.*` keys of a model, and the scaling's own. Errors: FormatError where GGUF cannot express it."""
    table('gguf', cfg.family)
    attention = cfg.attention
    own = {
        'vocab_size': cfg.vocab_size, 'context_length': cfg.max_seq_len, 'embedding_length': cfg.hidden_size,
        'block_count': cfg.num_layers, 'feed_forward_length': cfg.mlp.intermediate_size,
        'attention.head_count': attention.num_heads, 'attention.head_count_kv': attention.num_kv_heads,
        'attention.key_length': attention.head_dim, 'attention.value_length': attention.head_dim,
        'attention.layer_norm_rms_epsilon': cfg.norm_eps, 'rope.dimension_count': attention.head_dim,
        'rope.freq_base': attention.rope_theta}
    found = {'general.architecture': cfg.family} | {f'{cfg.family}.{key}': value for key, value in own.items()}
    if attention.rope_scaling is not None:
        scaling = attention.rope_scaling
        found |= {f'{_SCALING}{name}': getattr(scaling, name) for name in ('factor', *_LLAMA3)}
    expressible = cfg.norm == 'rms' and cfg.mlp.activation == _ACTIVATIONS[cfg.family] and cfg.mlp.gated \
        and attention.window is None and attention.position == 'rope' and cfg.embed_size is None \
        and cfg.embed_scale == (cfg.hidden_size ** 0.5 if cfg.family == 'gemma' else None)
    if not expressible:
        raise FormatError(f'{where}: GGUF cannot express this variant of {cfg.family}')
    return found


def read(path: str | Path, dtype: Any = np.float32, cache: bool = True) -> Loaded:
    """A .gguf file. params: numpy arrays in `dtype`.

    cache: a quantised file is unpacked to disk once, then mapped (`dequantised`).

    Errors: FormatError (damaged, unknown architecture, vocabulary mismatch), TensorMismatch (listed).
    """
    path = Path(path)
    header = read_header(path)
    cfg = from_metadata(header.metadata, header.tensors, str(path))
    check_sizes(cfg, header.tensors, str(path))
    leaves = plan(cfg, table('gguf', cfg.family), header.tensors, str(path), lambda name: name == _FREQUENCIES)
    tokenizer = _tokenizer(header.metadata, cfg, str(path))
    packed = any(tensor.encoding in QUANTISED for tensor in header.tensors.values())
    params, digest = dequantised.read(path, leaves, dtype) if packed and cache else read_leaves(leaves, dtype)
    return Loaded(cfg, params, tokenizer, path.stem, digest)


def _tokenizer(metadata: Mapping[str, Any], cfg: ModelConfig, where: str) -> tokenizers.Tokenizer | None:
    if metadata.get('tokenizer.ggml.model', _NO_TOKENIZER) == _NO_TOKENIZER:
        return None
    for key in ('tokens', 'merges'):
        if not isinstance(metadata.get(f'tokenizer.ggml.{key}', []), list):
            raise FormatError(f'{where}: tokenizer.ggml.{key} is not a list of strings')
    with faults_of(where):
        found = tokenizers.from_gguf_metadata(metadata)
        found.check_model(cfg.vocab_size)
        return found


def _padded(metadata: dict[str, Any], size: int) -> dict[str, Any]:
    """llama.cpp wants a token for every row of the embedding."""
    first = len(metadata['tokenizer.ggml.tokens'])
    filler = {'tokens': [f'[PAD{i}]' for i in range(first, size)], 'token_type': [vocabulary.UNUSED] * (size - first),
              'scores': [-float(size)] * (size - first)}
    return metadata | {f'tokenizer.ggml.{key}': [*metadata[f'tokenizer.ggml.{key}'], *more]
                       for key, more in filler.items() if f'tokenizer.ggml.{key}' in metadata}


def write(loaded: Loaded, dst: str | Path, dtype: str = 'f32', overwrite: bool = False) -> None:
    """A file that llama.cpp and its kin read. dtype: 'f32', 'f16' or 'q8_0' (matrices; vectors stay float32).

    A matrix whose rows do not divide into q8_0's blocks of 32 is written in f16, as llama.cpp does.
    Errors: FormatError when `dst` exists, the model has no GGUF form, a value does not fit, or the disk refuses.
    """
    cfg = loaded.config
    metadata = to_metadata(cfg, str(dst)) | {'general.name': loaded.name}
    if loaded.tokenizer is None:
        metadata['tokenizer.ggml.model'] = _NO_TOKENIZER
    else:
        metadata |= _padded(loaded.tokenizer.gguf_metadata(), cfg.vocab_size)
    tensors = outgoing(cfg, table('gguf', cfg.family), loaded.params, str(dst))
    if cfg.attention.rope_scaling is not None:
        factors = _factors(cfg.attention.rope_scaling, cfg.attention.head_dim, cfg.attention.rope_theta)
        tensors.insert(0, Outgoing(_FREQUENCIES, factors.shape, factors, None, 0.0))
    with staged(dst, overwrite) as temporary:
        writer = _Writer(None, cfg.family)
        writer.add_file_type(DTYPES[dtype])
        if dtype == 'q8_0':
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            if key != 'general.architecture':  # the writer has put it first
                _add(writer, key, value)
        kinds = [_kind(dtype, tensor) for tensor in tensors]
        for tensor, kind in zip(tensors, kinds, strict=True):
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32),
                                   encoded_bytes(kind.name, tensor.shape), raw_dtype=kind)
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            for tensor, kind in zip(tensors, kinds, strict=True):
                writer.write_padding(file, file.tell())
                for block in tensor.blocks():
                    file.write(_encode(block, kind, tensor.name).reshape(-1).view(np.uint8).data)
            writer.write_padding(file, file.tell())
        finally:
            writer.close()


def _kind(dtype: str, tensor: Outgoing) -> gguf.GGMLQuantizationType:
    if len(tensor.shape) == 1 or dtype == 'f32':
        return gguf.GGMLQuantizationType.F32
    if dtype == 'q8_0' and tensor.shape[-1] % block_size('Q8_0')[0] == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _encode(block: np.ndarray, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray:
    block = np.ascontiguousarray(block, np.float32)
    if kind == gguf.GGMLQuantizationType.F16:
        return narrow(block, np.dtype(np.float16), name)
    return gguf.quants.quantize(block, kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY)


class _Writer(gguf.GGUFWriter):
    """The package's own leaves out an empty list; but llama.cpp wants merges, also of a vocabulary that has none."""

    def _pack_val(self, val: Any, vtype: gguf.GGUFValueType, add_vtype: bool, *rest: Any, **named: Any) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            return self._pack('I', vtype) * add_vtype + self._pack('I', gguf.GGUFValueType.STRING) + self._pack('Q', 0)
        return super()._pack_val(val, vtype, add_vtype, *rest, **named)
