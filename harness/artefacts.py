"""A trained drafter by name: an artefact of the zoo, or the working directory of the run that trains it.

    drafter, ready = find('tensorhead_smollm2_r4', cfg, base_hash)
    params = {'base': packed} | ready(packed, 'bfloat16')

The task that trained it says what drafts with it, by dotted paths, and the card of an artefact repeats that:

    Task.drafter() -> {'factory': makes the Drafter from `kwargs` and cfg, 'kwargs': {...}, 'params': its part of the
                       parameter tree}

and such a drafter has `ready(that part, packed base, dtype) -> the same for decoding`. The harness so needs to know no
method.

What a run trains may instead be a model, plain or with Task.decodes() (harness/models.py). Its card has

    'model': {'decodes': Task.decodes() or None, 'config': ModelConfig,
              'tokenizer': 'bytes', or 'tokenizer', the folder that holds it}

and `models.load(name)` gives it. int8 makes it another model than the run's: `base_hash` is that of the artefact.

Or it is what decodes a base it does not hold, an approximation of it: its card has

    'target': {'factory', 'kwargs', 'pack', 'params'}        as Task.decodes() in harness/models.py

and `models.load(name)` gives the base, named by the card, with that around it. A card may have both 'target' and
'drafter', of one part of the tree: an approximation by itself, or one that drafts for what it approximates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from backbone.config import ModelConfig
from backbone.contract import Drafter, Target
from backbone.errors import FormatError
from backbone.formats.tensors import flatten, params_hash, unflatten
from harness import components, models, zoo
from harness.metrics import ROWS

LARGE = ('.*/kernel', '.*/embed/(tokens|positions)')  # a model's matrices, which are stored in int8


def is_artefact(name: str) -> bool:
    """True for a name of the zoo and for a working directory."""
    return name in zoo.names() or models.is_workdir(models.split(name)[0])


def find(name: str, cfg: ModelConfig, base_hash: str, arguments: Mapping[str, Any] | None = None
         ) -> tuple[Drafter, Callable[[Any, Any], dict[str, Any]]]:
    """(drafter, ready): ready(base, dtype) gives its parameters beside a base that is packed for decoding in dtype.

    arguments: replace those that the task gave. Errors: FormatError for an unknown name or another base (both named);
    ConfigError for an argument the drafter does not take.
    """
    if name in zoo.names():
        tree, card = zoo.load(name, base_hash)
        if 'drafter' not in card:
            raise FormatError(f'{name}: this artefact drafts nothing')
        spec = card['drafter']
        tree = tree[spec['params']] if 'target' in card else tree
    else:
        tree, spec, trained_on = from_workdir(name)
        if trained_on != base_hash:
            raise FormatError(f'{name}: trained on a base with parameters {trained_on}, the base given has {base_hash}')
    drafter = components.build(spec['factory'], {**spec['kwargs'], **(arguments or {})}, {'cfg': cfg}, name)
    return drafter, lambda base, dtype: {spec['params']: drafter.ready(tree, base, dtype)}


def find_target(name: str, base_hash: str, cache_dtype: str, arguments: Mapping[str, Any]
                ) -> tuple[Target, Callable[[Any, Any], dict[str, Any]]] | None:
    """What the artefact or run `name` decodes this base with, packed, and `ready` as of `find`; None where it drafts.

    arguments: replace those it says. Errors: as `find`.
    """
    if name in zoo.names():
        spec = zoo.read_card(name).get('target')
        tree = zoo.load(name, base_hash)[0] if spec else {}
    else:
        folder, step = models.split(name)
        task = _task(folder)
        spec = task.decodes() if hasattr(task, 'decodes') and not hasattr(task, 'drafter') else None
        if spec:
            _, tree, _, _ = models.of_run(folder, step)
            if (found := params_hash(tree.pop('base'))) != base_hash:
                raise FormatError(f'{name}: trained on a base with parameters {found}, the base given has {base_hash}')
    if not spec:
        return None
    kwargs = {**spec['kwargs'], **arguments}
    target = components.build(spec['factory'], kwargs, {'cache_dtype': cache_dtype, 'packed': True}, name)

    def ready(base: Any, dtype: Any) -> dict[str, Any]:
        return components.build(spec['pack'], kwargs, {'params': {'base': base, **tree}, 'dtype': dtype}, name)
    return target, ready


def from_workdir(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(parameters of the drafter, Task.drafter(), base_hash) of DIR or DIR@STEP."""
    task, params, _ = models.read_run(*models.split(name))
    if not hasattr(task, 'drafter'):
        raise FormatError(f'{name}: what this run trains drafts nothing')
    base = task.merged(params) if hasattr(task, 'merged') else params['base']
    spec = task.drafter()
    return jax.tree.map(np.asarray, params[spec['params']]), spec, params_hash(jax.tree.map(np.asarray, base))


def card_of(workdir: str) -> dict[str, Any]:
    """What a card says that the run itself knows: base, config, data, steps, seed, command, held-out metrics."""
    folder, step = models.split(workdir)
    run = models.read_config(folder)
    config = run['config']
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    held_out = [row for row in rows if row['kind'] == 'eval' and (step is None or row['step'] <= step)]
    if not held_out:
        raise FormatError(f'{workdir}: the run has measured nothing on held-out data yet')
    data = config['data']
    return {'base': config['task']['kwargs'].get('base') or 'trained with it', 'config': config,
            'data': f'{data["dataset"]}/{data["split"]}, rows of {data["seq_len"]} tokens; '
                    f'held out: {data["eval_split"]}',
            'steps': held_out[-1]['step'], 'seed': config['seed'], 'command': run['command'], 'git': run['git'],
            'versions': run['versions'], 'device': run['device'],
            'metrics': {k: v for k, v in held_out[-1].items() if k not in ('kind', 'step')}}


def to_zoo(name: str, workdir: str | Path, card: Mapping[str, Any], int8: tuple[str, ...] | None,
           root: Path | None = None, overwrite: bool = False) -> None:
    """Writes what a run trains, drafter or model, as an artefact. card: the fields the run's config does not give.

    int8: regexes of the matrices stored so; None: none of a drafter, LARGE of a model. Errors: FormatError.
    """
    folder, step = models.split(str(workdir))
    task = _task(folder)
    if hasattr(task, 'artefact_script'):
        raise FormatError(f'{workdir}: what this run trains is nothing without what another script adds: make '
                          f'the artefact with {task.artefact_script}')
    if hasattr(task, 'drafter'):
        tree, spec, base_hash = from_workdir(str(workdir))
        card = {'base_hash': base_hash, 'drafter': spec, **card}
        if decodes := task.decodes() if hasattr(task, 'decodes') else None:  # a model by itself, too
            tree, card = {spec['params']: tree}, card | {'target': decodes}
        zoo.save(name, tree, card, root, overwrite, int8 or ())
        return
    int8 = LARGE if int8 is None else int8
    task, tree, decodes, _ = models.of_run(folder, step)
    stored = unflatten(zoo.dequantise(zoo.quantise(flatten(tree), int8)))
    of_bytes = models.read_config(folder)['config']['data']['tokenizer'] == 'bytes'
    model = {'decodes': decodes, 'config': task.cfg.to_dict(), 'tokenizer': 'bytes' if of_bytes else zoo.TOKENIZER}
    zoo.save(name, tree, {**card, 'base': 'itself', 'base_hash': models.hash_of(stored, decodes), 'model': model}, root,
             overwrite, int8, None if of_bytes else folder / models.TOKENIZER)


def _task(folder: Path) -> Any:
    from harness import train_step

    return train_step.build_task(ml_collections.ConfigDict(models.read_config(folder)['config']))
