"""llama2.c's raw checkpoint (version 0): seven int32 and float32 weights in a fixed order, no names.

`model.bin` and its `tokenizer.bin` lie in one directory. Weights of one kind are stacked over the layers;
q and k are interleaved as llama.cpp's are, so the tensors are given llama.cpp's names and go the GGUF way.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from backbone import tokenizer as tokenizers
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import FormatError
from backbone.formats.hf_config import faults_of
from backbone.formats.names import table
from backbone.formats.tensors import Loaded, Stored, encoded_bytes, map_file, plan
from backbone.formats.tensors import read as read_leaves

_HEADER = struct.Struct('<7i')
# Larger than any model of this format, small enough that no product overflows a sane file.
_MAX_SIZE = 1 << 24


def read_header(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """Errors: FormatError when the seven numbers and the length of the file do not agree."""
    data = map_file(path)
    if len(data) < _HEADER.size:
        raise FormatError(f'{path}: {len(data)} bytes are too few for a llama2.c header')
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    tied, vocab = vocab > 0, abs(vocab)
    if not all(0 < n <= _MAX_SIZE for n in (dim, hidden, layers, heads, kv_heads, vocab, context)) or dim % heads:
        raise FormatError(f'{path}: not a llama2.c header')
    head_dim = dim // heads
    with faults_of(str(path)):
        cfg = ModelConfig('llama', vocab, dim, layers, context, AttentionConfig(heads, kv_heads, head_dim),
                          MlpConfig(hidden), tie_embeddings=tied)
    stored: dict[str, Stored] = {}
    at, kv = _HEADER.size, kv_heads * head_dim
    # (name, shape, copies, kept): the order of the file; the rotary tables are recomputed.
    for name, shape, copies, kept in (
            ('token_embd', (vocab, dim), 1, True), ('blk.{}.attn_norm', (dim,), layers, True),
            ('blk.{}.attn_q', (dim, dim), layers, True), ('blk.{}.attn_k', (kv, dim), layers, True),
            ('blk.{}.attn_v', (kv, dim), layers, True), ('blk.{}.attn_output', (dim, dim), layers, True),
            ('blk.{}.ffn_norm', (dim,), layers, True), ('blk.{}.ffn_gate', (hidden, dim), layers, True),
            ('blk.{}.ffn_down', (dim, hidden), layers, True), ('blk.{}.ffn_up', (hidden, dim), layers, True),
            ('output_norm', (dim,), 1, True), ('rotary_tables', (context, head_dim), 1, False),
            ('output', (vocab, dim), 0 if tied else 1, True)):
        size = encoded_bytes('F32', shape)
        if at + size * copies > len(data):
            raise FormatError(f'{path}: {name} lies outside the file ({at + size * copies} of {len(data)} bytes)')
        if kept:
            stored |= {f'{name.format(i)}.weight': Stored(f'{name.format(i)}.weight', shape, 'F32', data, at + i * size)
                       for i in range(copies)}
        at += size * copies
    if at != len(data):
        raise FormatError(f'{path}: {len(data)} bytes, but its weights end at {at}')
    return cfg, stored


def read(path: str | Path, dtype: Any = np.float32) -> Loaded:
    """A model.bin, or the directory it is in; tokenizer.bin beside it. params: numpy arrays in `dtype`.

    Errors: FormatError.
    """
    path = Path(path)
    path = path / 'model.bin' if path.is_dir() else path
    cfg, stored = read_header(path)
    leaves = plan(cfg, table('gguf', 'llama'), stored, str(path))
    tokenizer, beside = None, path.with_name('tokenizer.bin')
    if beside.exists():
        with faults_of(str(beside)):
            tokenizer = tokenizers.from_llama2c(beside.read_bytes())
            tokenizer.check_model(cfg.vocab_size)
    params, digest = read_leaves(leaves, dtype)
    return Loaded(cfg, params, tokenizer, path.parent.name, digest)
