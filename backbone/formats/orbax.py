"""Headway's own checkpoints: a directory with `params/` (orbax), `headway.json` and the tokenizer files.

headway.json holds the format's version, the ModelConfig, the parameters' dtype and their `params_hash`, which
is checked on reading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from backbone.config import ModelConfig
from backbone.errors import FormatError, TensorMismatch
from backbone.formats.hf_config import faults_of
from backbone.formats.safetensors import read_json, read_tokenizer
from backbone.formats.staging import staged
from backbone.formats.tensors import Digest, Loaded, check_leaves, flatten, leaf_shapes, narrow, unflatten

VERSION = 1
MANIFEST = 'headway.json'
DTYPES = {'f32': np.dtype(np.float32), 'f16': np.dtype(np.float16), 'bf16': np.dtype(ml_dtypes.bfloat16)}


def read(path: str | Path, dtype: Any = np.float32) -> Loaded:
    """params: numpy arrays in `dtype`.

    Errors: FormatError (damaged, another version, vocabulary mismatch), TensorMismatch (listed).
    """
    path = Path(path).resolve()
    where = str(path / MANIFEST)
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get('format') != 'headway':
        raise FormatError(f'{where}: not a Headway checkpoint')
    if manifest.get('version') != VERSION:
        raise FormatError(f'{where}: version {manifest.get("version")} is not read, only {VERSION}')
    with faults_of(where):
        cfg = ModelConfig.from_dict(manifest['config'])
        expected, name = str(manifest['params_hash']), str(manifest['name'])
    tokenizer = read_tokenizer(path, cfg)
    params, digest = _restore(path / 'params', cfg, dtype)
    if digest != expected:
        raise FormatError(f'{path}: parameters hash to {digest}, {MANIFEST} says {expected}')
    return Loaded(cfg, params, tokenizer, name, digest)


def _restore(path: Path, cfg: ModelConfig, dtype: Any) -> tuple[dict[str, Any], str]:
    """Leaf by leaf, so that no second copy of the model exists when it is read into a narrower dtype."""
    shapes, leaves, sha = leaf_shapes(cfg), {}, Digest()
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        found = flatten(jax.tree.map(lambda leaf: tuple(leaf.shape), checkpointer.metadata(path).item_metadata.tree))
        check_leaves(cfg, found, str(path))
        for leaf in shapes:
            only = {other: ocp.RestoreArgs(restore_type=np.ndarray) if other == leaf else ocp.PLACEHOLDER
                    for other in shapes}
            part = checkpointer.restore(path, args=ocp.args.PyTreeRestore(
                item=unflatten(only | {leaf: 0}), restore_args=unflatten(only)))
            whole = flatten(part)[leaf]
            sha.leaf(leaf, whole.shape)
            sha.values(whole)
            leaves[leaf] = whole.astype(dtype, copy=False)
    except TensorMismatch:
        raise
    except Exception as error:  # a damaged store surfaces as whatever its driver raises
        raise FormatError(f'{path}: cannot be read: {(str(error) or repr(error)).splitlines()[0]}') from error
    finally:
        checkpointer.close()
    return unflatten(leaves), sha.hexdigest()


def _without_copies():
    """Orbax copies every host array first, lest it changes while it is written; here it cannot, and may be large."""
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))


def write(loaded: Loaded, dst: str | Path, dtype: str = 'f32', overwrite: bool = False) -> None:
    """dtype: 'f32', 'f16' or 'bf16'.

    Errors: FormatError when `dst` exists, a value does not fit the dtype, or the disk refuses; nothing is left.
    """
    params = jax.tree.map(np.asarray, loaded.params)
    leaves = flatten(params)
    check_leaves(loaded.config, {path: np.shape(leaf) for path, leaf in leaves.items()}, str(dst))
    sha = Digest()
    for path, leaf in leaves.items():
        sha.leaf(path, np.shape(leaf))
        for layer in leaf:
            sha.values(narrow(layer, DTYPES[dtype], path))
    manifest = {'format': 'headway', 'version': VERSION, 'name': loaded.name, 'dtype': dtype,
                'params_hash': sha.hexdigest(), 'config': loaded.config.to_dict()}
    with staged(dst, overwrite) as folder:
        folder.mkdir()
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=_without_copies()))
        try:
            checkpointer.save(folder.resolve() / 'params', args=ocp.args.PyTreeSave(
                params, save_args=jax.tree.map(lambda _: ocp.SaveArgs(dtype=DTYPES[dtype]), params)))
        finally:
            checkpointer.close()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(folder)
