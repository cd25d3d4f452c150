"""Checkpoints by any name: `load` finds out what a path is, `save` writes one of the three forms.

    loaded = load('smollm2-135m')             # a catalogue key, a .gguf file, a Hugging Face directory,
    save(loaded, 'out/smollm2', 'hf')         # a Headway checkpoint, or a llama2.c model.bin

Reading goes tensor by tensor into preallocated arrays; writing makes a temporary name and renames it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from backbone import catalogue
from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats import gguf, llama2c, orbax, safetensors
from backbone.formats.gguf_header import MAGIC
from backbone.formats.staging import refuse_existing
from backbone.formats.tensors import Loaded, params_hash

__all__ = ['KINDS', 'Loaded', 'check_request', 'load', 'load_shaped', 'params_hash', 'save', 'sniff']

_READERS = {'hf': safetensors.read, 'headway': orbax.read, 'llama2c': llama2c.read}
_WRITERS = {'gguf': gguf, 'hf': safetensors, 'headway': orbax}
KINDS = tuple(_WRITERS)


def load(spec: str | Path, dtype: Any = np.float32, cache: bool = True) -> Loaded:
    """A model by path or catalogue key (a path wins where both exist). params: numpy arrays in `dtype`.

    Large arrays may be read-only views of a file. `base_hash` is taken before rounding to `dtype`.
    cache: keep an unpacked copy of a quantised file on disk, for the next time.
    Errors: FetchError (no network, wrong hash), FormatError (damaged, unknown), TensorMismatch (tensors listed).
    """
    path, key = Path(spec), str(spec)
    named = not path.exists() and key in catalogue.ENTRIES
    if named:
        if catalogue.ENTRIES[key].kind != 'model':
            raise FormatError(f'{key}: this catalogue entry is not a model')
        path = catalogue.fetch(key)
    kind = sniff(path)
    loaded = gguf.read(path, dtype, cache) if kind == 'gguf' else _READERS[kind](path, dtype)
    return dataclasses.replace(loaded, name=key) if named else loaded


def load_shaped(spec: str | Path, cfg: ModelConfig) -> Loaded:
    """`load`, of the base that a task was built for. Errors: ConfigError where it has another shape than `cfg`."""
    loaded = load(spec)
    if loaded.config != cfg:
        raise ConfigError(f'{spec} has another shape than the task was built for')
    return loaded


def check_request(dst: str | Path, kind: str, dtype: str, overwrite: bool = False) -> None:
    """What `save` refuses without looking at a model. Errors: FormatError."""
    if kind not in _WRITERS:
        raise FormatError(f'{kind}: not a form that is written, one of {", ".join(_WRITERS)}')
    if dtype not in _WRITERS[kind].DTYPES:
        raise FormatError(f'dtype {dtype}: not one of {kind}\'s: {", ".join(_WRITERS[kind].DTYPES)}')
    refuse_existing(dst, overwrite)


def save(loaded: Loaded, dst: str | Path, kind: str, dtype: str = 'f32', overwrite: bool = False) -> None:
    """Writes 'gguf' (dtype f32, f16, q8_0), 'hf' or 'headway' (f32, f16, bf16).

    Errors: FormatError when `dst` exists and `overwrite` is False, or the form cannot hold the model.
    """
    check_request(dst, kind, dtype, overwrite)
    loaded.check_plain()
    _WRITERS[kind].write(loaded, dst, dtype, overwrite)


def sniff(path: str | Path) -> str:
    """'gguf', 'hf', 'headway' or 'llama2c', by what is there rather than by its name.

    Errors: FormatError when it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        for name, kind in ((orbax.MANIFEST, 'headway'), ('config.json', 'hf'), ('model.bin', 'llama2c')):
            if (path / name).exists():
                return kind
        raise FormatError(f'{path}: no {orbax.MANIFEST}, config.json or model.bin in this directory')
    if not path.exists():
        models = ', '.join(key for key, entry in catalogue.ENTRIES.items() if entry.kind == 'model')
        raise FormatError(f'{path}: no such file or directory, and not a model of the catalogue ({models})')
    with open(path, 'rb') as file:
        if file.read(len(MAGIC)) == MAGIC:
            return 'gguf'
    if path.suffix == '.bin':
        return 'llama2c'
    raise FormatError(f'{path}: neither a GGUF file nor a directory with a model')
