"""Dequantised models kept on disk: a quantised file is unpacked once, then memory-mapped.

An entry is a .safetensors file of the parameter tree in float32, named by the sha256 of its source and kept
in `<cache>/dequantised/`. Its metadata hold the `params_hash`; a file that does not hash to it is made anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbone.catalogue import cache_dir
from backbone.errors import FormatError
from backbone.formats import safetensors
from backbone.formats.staging import staged
from backbone.formats.tensors import Digest, Leaf, params_hash, unflatten
from backbone.formats.tensors import read as read_leaves

# Part of the file's name: raise it when dequantisation or the tree changes.
_VERSION = 1


def entry_path(source: Path) -> Path:
    """Where the entry of a source file lies, whether it is there or not."""
    with open(source, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return cache_dir() / 'dequantised' / f'{digest}.v{_VERSION}.safetensors'


def read(source: Path, leaves: Sequence[Leaf], dtype: Any = np.float32) -> tuple[dict[str, Any], str]:
    """(parameter tree, params_hash) of a quantised file. In float32 the arrays are read-only views of the entry.

    A cache that cannot be written is a warning, not an error: the model is then unpacked in memory.
    """
    path = entry_path(source)
    found = _mapped(path, leaves)
    if found is None:
        try:
            _make(path, leaves)
        except FormatError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            logging.warning('headway: %s; going on without the cache', error)
            return read_leaves(leaves, dtype)
        found = _mapped(path, leaves)
    if found is None:
        raise FormatError(f'{path}: does not read back as it was written')
    params, digest = found
    if np.dtype(dtype) != np.float32:
        params = {name: leaf.astype(dtype) for name, leaf in params.items()}
    return unflatten(params), digest


def _mapped(path: Path, leaves: Sequence[Leaf]) -> tuple[dict[str, np.ndarray], str] | None:
    """The entry, checked by its hash; None where it is missing or damaged."""
    if not path.exists():
        return None
    try:
        stored = safetensors.read_header(path)
        expected = safetensors.read_metadata(path).get('params_hash')
        shapes = {leaf.rule.leaf: leaf.shape for leaf in leaves}
        if {name: tensor.shape for name, tensor in stored.items()} != shapes:
            raise FormatError(f'{path}: holds another model')
        params = {name: np.frombuffer(tensor.buffer, np.float32, int(np.prod(tensor.shape)), tensor.offset)
                  .reshape(tensor.shape) for name, tensor in stored.items()}
        if params_hash(unflatten(params)) != expected:
            raise FormatError(f'{path}: damaged')
    except FormatError as error:
        logging.warning('headway: %s; making it anew', error)
        return None
    return params, expected


def _make(path: Path, leaves: Sequence[Leaf]) -> None:
    digest = Digest()
    tensors = {leaf.rule.leaf: ('F32', leaf.shape) for leaf in leaves}
    with staged(path, overwrite=True) as temporary, open(temporary, 'wb') as file:
        # The hash is known last but stands first: its place is kept by one of the same length.
        file.write(safetensors.header_bytes(tensors, {'params_hash': digest.hexdigest()}))
        for leaf in leaves:
            digest.leaf(leaf.rule.leaf, leaf.shape)
            for _, block in leaf.blocks():
                digest.values(block)
                file.write(block.reshape(-1).view(np.uint8).data)
        file.seek(0)
        file.write(safetensors.header_bytes(tensors, {'params_hash': digest.hexdigest()}))
