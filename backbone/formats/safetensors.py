"""Hugging Face directories: config.json, *.safetensors (one file or shards with an index), tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from backbone import tokenizer as tokenizers
from backbone.config import ModelConfig
from backbone.errors import FormatError
from backbone.formats import hf_config
from backbone.formats.experts import unfused
from backbone.formats.names import table
from backbone.formats.staging import staged
from backbone.formats.tensors import PLAIN, Loaded, Stored, check_sizes, encoded_bytes, map_file, narrow, outgoing, plan
from backbone.formats.tensors import read as read_leaves

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# The format's own limit on a header (that of its reference reader).
_MAX_HEADER = 100_000_000
_MAX_JSON = 100_000_000
_MAX_NAME = 1024
_TOKENIZER_FILES = ('tokenizer.json', 'vocab.json')
DTYPES = {'f32': ('F32', 'float32', np.dtype('<f4')), 'f16': ('F16', 'float16', np.dtype('<f2')),
           'bf16': ('BF16', 'bfloat16', np.dtype(ml_dtypes.bfloat16))}
_BUFFERS = ('.rotary_emb.inv_freq', '.attn.masked_bias', '.attn.bias')


def read_json(path: Path) -> Any:
    """Errors: FormatError when the file is missing, too large or not JSON."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise FormatError(f'{path}: larger than {_MAX_JSON} bytes')
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f'{path}: cannot be read: {error.strerror}') from None
    except (ValueError, RecursionError):
        raise FormatError(f'{path}: not valid JSON') from None


def read_header(path: Path) -> dict[str, Stored]:
    """Tensor table of one .safetensors file; the data itself stays on disk (memory-mapped).

    Errors: FormatError names the file and what is wrong with it, before anything is allocated for it.
    """
    return _header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form `__metadata__` of a .safetensors file."""
    return _header(path)[1]


def _header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    data = map_file(path)
    size = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEADER):
        raise FormatError(f'{path}: header of {size} bytes in a file of {len(data)}')
    try:
        entries = json.loads(data[8:8 + size], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f'{path}: header is not valid: {error}') from None
    if not isinstance(entries, dict):
        raise FormatError(f'{path}: header is not a table')
    metadata = entries.pop('__metadata__', {})
    if not isinstance(metadata, dict):
        raise FormatError(f'{path}: __metadata__ is not a table')
    tensors = {name: _describe(path, data, 8 + size, name, entry) for name, entry in entries.items()}
    end = 8 + size
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset != end:
            raise FormatError(f'{path}: tensor {tensor.name} starts at {tensor.offset}, expected {end}')
        end += tensor.nbytes
    if end != len(data):
        raise FormatError(f'{path}: {len(data)} bytes, but its tensors end at {end}')
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError('a name is there twice')
    return found


def _describe(path: Path, data: Any, start: int, name: str, entry: Any) -> Stored:
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise FormatError(f'{path}: tensor name {ascii(name[:80])} is not a name')

    def counts(value: Any, length: int | None = None) -> bool:
        return isinstance(value, list) and (length is None or len(value) == length) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)

    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'} \
            or not counts(entry['shape']) or not counts(entry['data_offsets'], 2) or len(entry['shape']) > 8:
        raise FormatError(f'{path}: description of tensor {name} is not valid')
    dtype, shape, (first, last) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in PLAIN:
        raise FormatError(f'{path}: tensor {name} is of type {dtype}, read are {", ".join(PLAIN)}')
    if 0 in shape or last - first != encoded_bytes(dtype, shape) or start + last > len(data):
        raise FormatError(f'{path}: tensor {name} {dtype} {list(shape)} does not fit bytes {first}..{last}')
    return Stored(name, shape, dtype, data, start + first)


def read_directory(path: Path) -> dict[str, Stored]:
    """Tensors of all the weight files of a directory.

    Errors: FormatError for a shard that is missing, or does not hold what the index says.
    """
    if (path / INDEX).exists():
        return _read_shards(path)
    files = [path / SINGLE] if (path / SINGLE).exists() else sorted(path.glob('*.safetensors'))
    if not files:
        others = sorted(f.name for f in path.glob('*.bin'))
        raise FormatError(f'{path}: no .safetensors file' + (f' ({", ".join(others)} is not read)' if others else ''))
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise FormatError(f'{file}: tensor {name} is in another file too')
            found[name] = tensor
    return found


def _read_shards(path: Path) -> dict[str, Stored]:
    index = read_json(path / INDEX)
    weights = index.get('weight_map') if isinstance(index, dict) else None
    plain = isinstance(weights, dict) and all(isinstance(file, str) and file == Path(file).name
                                              for file in weights.values())
    if not plain:
        raise FormatError(f'{path / INDEX}: no usable weight_map')
    shards = {file: read_header(path / file) for file in sorted(set(weights.values()))}
    astray = [name for name, file in weights.items() if name not in shards[file]]
    astray += [name for file, tensors in shards.items() for name in tensors if weights.get(name) != file]
    if astray:
        raise FormatError(f'{path / INDEX}: does not match its shards at {", ".join(astray)}')
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def read(path: str | Path, dtype: Any = np.float32) -> Loaded:
    """A Hugging Face directory. params: numpy arrays in `dtype`.

    Errors: FormatError (damaged, unknown architecture, vocabulary mismatch), TensorMismatch (listed).
    """
    path = Path(path)
    cfg = hf_config.from_hf(read_json(path / 'config.json'), str(path / 'config.json'))
    stored = unfused(cfg, _with_prefix(read_directory(path)))
    check_sizes(cfg, stored, str(path))

    def ignore(name: str) -> bool:
        # A tied head may be stored a second time; transformers does not read it either.
        return name.endswith(_BUFFERS) or (cfg.tie_embeddings and name == 'lm_head.weight')

    leaves = plan(cfg, table('hf', cfg.family), stored, str(path), ignore)
    tokenizer = read_tokenizer(path, cfg)
    params, digest = read_leaves(leaves, dtype)
    return Loaded(cfg, params, tokenizer, path.resolve().name, digest)


def read_tokenizer(path: Path, cfg: ModelConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer of a directory, held against its model; None where it has none."""
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    with hf_config.faults_of(str(path)):
        found = tokenizers.from_hf_directory(path)
        found.check_model(cfg.vocab_size)
        return found


def _with_prefix(stored: dict[str, Stored]) -> dict[str, Stored]:
    """A checkpoint saved from the bare decoder lacks the leading 'model.' (OPT's first release does)."""
    if any(name.startswith('model.') for name in stored):
        return stored
    return {name if name.startswith('lm_head.') else f'model.{name}': tensor for name, tensor in stored.items()}


def write(loaded: Loaded, dst: str | Path, dtype: str = 'f32', overwrite: bool = False,
          max_shard_bytes: int = 5_000_000_000) -> None:
    """A directory that transformers loads. dtype: 'f32', 'f16' or 'bf16'.

    Errors: FormatError when `dst` exists, a value does not fit the dtype, or the disk refuses; nothing is left.
    """
    encoding, torch_name, numpy_dtype = DTYPES[dtype]
    tensors = outgoing(loaded.config, table('hf', loaded.config.family), loaded.params, str(dst))
    tokenizer = loaded.tokenizer
    config = hf_config.to_hf(loaded.config, torch_name, tokenizer and tokenizer.bos_id,
                             tuple(tokenizer.eos_ids) if tokenizer else ())
    with staged(dst, overwrite) as folder:
        folder.mkdir()
        shards = list(_shards(tensors, encoding, max_shard_bytes))
        names = [SINGLE] if len(shards) == 1 else [
            f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            blocks = (narrow(block, numpy_dtype, t.name) for t in shard for block in t.blocks())
            write_file(folder / name, {t.name: (encoding, t.shape) for t in shard}, blocks, {'format': 'pt'})
        if len(shards) > 1:
            total = sum(encoded_bytes(encoding, t.shape) for t in tensors)
            index = {'metadata': {'total_size': total},
                     'weight_map': {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        (folder / 'config.json').write_text(json.dumps(config, indent=2))
        if tokenizer is not None:
            tokenizer.save(folder)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a .safetensors file. tensors: {name: (encoding, shape)} in the order of the data."""
    header: dict[str, Any] = {'__metadata__': dict(metadata)}
    end = 0
    for name, (encoding, shape) in tensors.items():
        start, end = end, end + encoded_bytes(encoding, shape)
        header[name] = {'dtype': encoding, 'shape': list(shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    # Padded so that the data starts on a cache line: a mapped tensor can then be used where it lies.
    text += b' ' * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, 'little') + text


def write_file(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], blocks: Iterable[np.ndarray],
               metadata: Mapping[str, str]) -> None:
    """One .safetensors file; `blocks` brings the tensors' values one after the other."""
    with open(path, 'wb') as file:
        file.write(header_bytes(tensors, metadata))
        for block in blocks:
            file.write(block.reshape(-1).view(np.uint8).data)


def _shards(tensors: list, encoding: str, limit: int) -> Iterable[list]:
    shard, size = [], 0
    for tensor in tensors:
        nbytes = encoded_bytes(encoding, tensor.shape)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += nbytes
    yield shard
