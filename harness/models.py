"""Models by any name: what backbone.formats reads, the working directory of a training run, a model of the zoo.

    load('smollm2-135m')      # catalogue key, file or directory: backbone.formats.load
    load('out/enwik8')        # a working directory: its newest sound checkpoint
    load('out/enwik8@1200')   # the checkpoint of that step
    load('stagformer_tiny')   # an artefact of the zoo that is a model
    load('out/hybrid')        # the same, of any size, in a folder of its own

    target(loaded, 'bfloat16')   # what decodes it, and its parameters packed for that

A model may be more than a plain base. The task that trained it says what decodes it, by dotted paths, and the card of
an artefact repeats that (so the harness needs to know no method):

    Task.decodes() -> {'factory': makes the Target from `kwargs`, cache_dtype and packed, 'kwargs': {...},
                       'pack': packs the whole parameter tree from `kwargs`, params and dtype,
                       'params': names of the parts of the tree beside 'base'}

Where the file holds less than the whole tree, the card's 'model' also has `restore`, a path of (tree, kwargs) -> tree.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from backbone import formats, layout, tokenizer
from backbone.config import ModelConfig
from backbone.contract import Target
from backbone.errors import FormatError, NoValidCheckpoint
from backbone.formats.hf_config import faults_of
from backbone.formats.tensors import Loaded, check_leaves, check_shapes, flatten, unflatten
from harness import components, zoo

CONFIG, TOKENIZER, CHECKPOINTS = 'config.json', 'tokenizer', 'checkpoints'
FORMAT = 1  # of config.json


def load(spec: str | Path, dtype: Any = np.float32, cache: bool = True) -> Loaded:
    """A model by catalogue key, path, name of the zoo, or working directory with or without @STEP. params: numpy arrays
    in `dtype`. Where a name means several things a path comes before the zoo, and the zoo before the catalogue.

    Of a working directory: the averaged parameters where the run keeps an average (ema_decay > 0); what was frozen
    comes from the task again. A task whose base is more than its params['base'] (adapters) has
    `merged(params) -> base parameters`. base_hash is taken before rounding to `dtype`; of a model with parameters
    beside the base it is that of all of them.
    Errors: those of backbone.formats.load; NoValidCheckpoint (none yet, or not that step), FormatError, TensorMismatch.
    """
    folder, step = split(str(spec))
    if is_workdir(folder):
        return _from_workdir(folder, step, dtype)
    if not Path(spec).exists() and str(spec) in zoo.names():
        return _from_zoo(str(spec), zoo.ROOT, dtype)
    if (Path(spec) / zoo.CARD).is_file():
        whole = Path(spec).resolve()
        return _from_zoo(whole.name, whole.parent, dtype, limit=None)
    if step is not None:
        raise FormatError(f'{folder} is not the working directory of a training run: @{step} means nothing there')
    return formats.load(spec, dtype, cache)


def target(loaded: Loaded, dtype: str = 'float32', packed: bool = True) -> tuple[Target, dict[str, Any]]:
    """(what decodes the model with a cache in `dtype`, the whole tree {'base': ..., parts beside it} for it).

    packed: matrices in `dtype`, in the layout that decodes fastest; else the parameters as they are, stacked.
    Errors: ConfigError names a factory that is not there or does not take its arguments.
    """
    return make_target(loaded, dtype, packed), pack(loaded, dtype) if packed else loaded.tree


def make_target(loaded: Loaded, cache_dtype: str = 'float32', packed: bool = True,
                arguments: Mapping[str, Any] | None = None) -> Target:
    """What decodes the model. arguments: more of the factory's, an approximate mode, say. Errors: as `target`."""
    if loaded.decodes is None:
        plain = {'cfg': loaded.config, 'cache_dtype': cache_dtype, 'stacked': not packed}
        return components.build('backbone.model.PlainTarget', arguments or {}, plain, loaded.name)
    spec = loaded.decodes
    return components.build(spec['factory'], {**spec['kwargs'], **(arguments or {})},
                            {'cache_dtype': cache_dtype, 'packed': packed}, loaded.name)


def pack(loaded: Loaded, dtype: str = 'float32') -> dict[str, Any]:
    """The whole tree for decoding. Errors: as `target`."""
    if loaded.decodes is None:
        return {'base': layout.pack(loaded.params, dtype)}
    return components.build(loaded.decodes['pack'], loaded.decodes['kwargs'],
                            {'params': loaded.tree, 'dtype': dtype}, loaded.name)


def split(spec: str) -> tuple[Path, int | None]:
    """'out/x@1200' -> (out/x, 1200), unless a path is really called so or there is no such directory."""
    name, _, step = spec.rpartition('@')
    if name and step.isdigit() and not Path(spec).exists() and Path(name).is_dir():
        return Path(name), int(step)
    return Path(spec), None


def is_workdir(path: str | Path) -> bool:
    """True for what headway-train made. A Hugging Face directory has a config.json too, but of other keys."""
    path = Path(path) / CONFIG
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return (path.parent / CHECKPOINTS).is_dir()  # then `read_config` says what is wrong with it
    config = found.get('config') if isinstance(found, dict) else None
    return isinstance(config, Mapping) and {'task', 'data', 'optimizer'} <= set(config)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a working directory: {'format', 'config', 'fingerprint', ...}. Errors: FormatError."""
    path = Path(folder) / CONFIG
    try:
        found = json.loads(path.read_text())
        version = found['format']
        if not {'task', 'data', 'optimizer'} <= set(found['config']) or 'fingerprint' not in found:
            raise FormatError(f'{path} is not the config of a training run')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f'{path} cannot be read ({error!r})') from error
    if version != FORMAT:
        raise FormatError(f'{path}: version {version} is not read, only {FORMAT}')
    return found


def read_run(folder: Path, step: int | None) -> tuple[Any, dict[str, Any], int]:
    """(task, whole parameter tree of numpy arrays, step) of a working directory. Errors: as `load`."""
    from harness import checkpoint, train_step  # after it is known to be a run: they bring orbax and optax

    config = ml_collections.ConfigDict(read_config(folder)['config'])
    there = checkpoint.steps_in(folder / CHECKPOINTS)
    if not there:
        raise NoValidCheckpoint(f'{folder} has no checkpoint yet')
    if step is not None and step not in there:
        raise NoValidCheckpoint(f'{folder} has no checkpoint of step {step}, only of {", ".join(map(str, there))}')
    task = train_step.build_task(config)
    part = 'ema' if config.ema_decay > 0 else 'params'
    step, leaves = checkpoint.read_part(folder / CHECKPOINTS, part, step)
    return task, unflatten(_frozen(task, config.seed, leaves) | leaves), step


def of_run(folder: Path, step: int | None) -> tuple[Any, dict[str, Any], dict[str, Any] | None, int]:
    """(task, {'base': ..., parts beside it}, Task.decodes() or None, step) of the model a run trains, numpy arrays.

    Errors: as `load`.
    """
    task, params, step = read_run(folder, step)
    base = task.merged(params) if hasattr(task, 'merged') else params['base']
    decodes = task.decodes() if hasattr(task, 'decodes') else None
    # A part without leaves is not in a file.
    tree = {'base': base} | {part: params.get(part, {}) for part in (decodes or {}).get('params', ())}
    if decodes:
        expected = jax.eval_shape(task.init, jax.random.key(0))
        wanted, found = ({path: np.shape(leaf) for path, leaf in flatten({part: whole.get(part, {}) for part in tree
                                                                          if part != 'base'}).items()}
                         for whole in (expected, tree))
        check_shapes(wanted, found, f'{folder}@{step}')
    return task, jax.tree.map(np.asarray, tree), decodes, step


def _from_workdir(folder: Path, step: int | None, dtype: Any) -> Loaded:
    task, tree, decodes, step = of_run(folder, step)
    return _loaded(task.cfg, tree, decodes, folder / TOKENIZER, f'{folder.resolve().name}@{step}', f'{folder}@{step}',
                   dtype)


def _from_zoo(name: str, root: Path, dtype: Any, limit: int | None = zoo.MAX_BYTES) -> Loaded:
    card, where = zoo.read_card(name, root), str(root / name / zoo.CARD)
    if 'target' in card:
        base = formats.load(card['base'], dtype)
        tree, _ = zoo.load(name, base.base_hash, root, limit)
        extra = jax.tree.map(lambda a: a.astype(dtype, copy=False), tree)
        return dataclasses.replace(base, name=name, decodes=card['target'], extra=extra,
                                   base_hash=hash_of({'base': base.params, **tree}, card['target']))
    if 'model' not in card:
        raise FormatError(f'{name}: this artefact drafts for {card["base"]}, it is not a model')
    tree, _ = zoo.load(name, None, root, limit)
    with faults_of(where):
        cfg, decodes = ModelConfig.from_dict(card['model']['config']), card['model']['decodes']
        tokens = None if card['model']['tokenizer'] == 'bytes' else root / name / zoo.TOKENIZER
        for key in ('factory', 'kwargs', 'pack', 'params') if decodes is not None else ():
            decodes[key]  # KeyError names what the card lacks
    if restore := card['model'].get('restore'):
        tree = components.build(restore, decodes['kwargs'], {'tree': tree}, where)
    return _loaded(cfg, tree, decodes, tokens, name, where, dtype)


def _loaded(cfg: ModelConfig, tree: dict[str, Any], decodes: Mapping[str, Any] | None, tokens: Path | None, name: str,
            where: str, dtype: Any) -> Loaded:
    """tree: numpy arrays. tokens: folder of the tokenizer; None: bytes. where: what errors name."""
    check_leaves(cfg, {path: leaf.shape for path, leaf in flatten(tree.get('base', {})).items()}, where)
    found = tokenizer.of_bytes() if tokens is None else tokenizer.from_hf_directory(tokens)
    found.check_model(cfg.vocab_size)
    digest = hash_of(tree, decodes)
    cast = jax.tree.map(lambda a: a.astype(dtype, copy=False), tree)
    extra = {part: cast.get(part, {}) for part in (decodes or {}).get('params', ())}
    return Loaded(cfg, cast['base'], found, name, digest, decodes, extra)


def hash_of(tree: Mapping[str, Any], decodes: Mapping[str, Any] | None) -> str:
    """`Loaded.base_hash`: of the base alone where that is the whole model."""
    return formats.params_hash(tree['base'] if decodes is None else tree)


def _frozen(task: Any, seed: int, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves a checkpoint leaves out, as the run had them: from the task's files, else from its init."""
    expected = jax.eval_shape(lambda: flatten(task.init(jax.random.key(seed))))
    missing = [path for path in expected if path not in trained]
    if not missing:
        return {}
    loaded = flatten(task.load()) if hasattr(task, 'load') else {}
    if not all(path in loaded for path in missing):
        made = jax.jit(lambda: {path: a for path, a in flatten(task.init(jax.random.key(seed))).items()
                                if path in missing and path not in loaded})()
        loaded = {**jax.tree.map(np.asarray, made), **loaded}
    return {path: np.asarray(loaded[path]) for path in missing}
