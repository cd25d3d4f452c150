"""The hybrid outside of its training: packed for decoding, and as a model of its own on a disk.

In training one tree is the hybrid and its base. By itself a hybrid needs no attention that was replaced: `standalone`
leaves them out, and `restore` gives the tree back, with zeros in their place, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import layout
from backbone.config import ModelConfig
from rad import student, target
from rad.config import RadConfig


def pack(params: dict, dtype: Any, model: Mapping[str, Any], rad: Mapping[str, Any]) -> dict:
    """{'base', 'rad'} as trained or restored, as the hybrid alone decodes: without the attentions that were replaced.

    dtype: of matrices. model, rad: fields of ModelConfig and RadConfig. A base that is packed stays, for another model.
    """
    rcfg = RadConfig.of(ModelConfig.from_dict(dict(model)), rad)
    base, mine = params['base'], params['rad']
    if not isinstance(base['layers'], tuple):
        params = student.whole(rcfg.layers, params)
        base, mine = layout.pack(params['base'], dtype), params['rad']
    ready = drafting(rcfg, mine, base, dtype)
    base = ready.get('base', base)
    if not rcfg.parallel:
        bare = lambda layer: {name: part for name, part in layer.items() if name != 'attn'}
        base = base | {'layers': tuple(bare(p) if l in rcfg.layers else p for l, p in enumerate(base['layers']))}
    return {'base': base, 'rad': {'mixers': ready['mixers']}}


def drafting(rcfg: RadConfig, mine: dict, base: dict, dtype: Any = jnp.float32) -> dict:
    """params['rad'] for decoding beside a packed base, which the hybrid shares as far as it is its own: {'mixers': a
    tuple} and, where parts of the base were trained, 'base'. Beside a stacked base, and packed already: unchanged."""
    if not isinstance(base['layers'], tuple) or isinstance(mine.get('mixers'), tuple):
        return mine
    made: dict[str, Any] = {}
    if 'whole' in mine:
        made['base'] = layout.pack(mine['whole'], dtype, 'kernel_t' in base.get('lm_head', {}))
    if 'layers' in mine:
        layers = list(made.get('base', base)['layers'])
        for i, l in enumerate(rcfg.layers):
            layers[l] = layers[l] | jax.tree.map(lambda a, i=i: jnp.asarray(a[i], jnp.float32), mine['layers'])
        made['base'] = made.get('base', base) | {'layers': tuple(layers)}
    mixers = target.pack({'base': base, 'rad': {'mixers': mine['mixers']}}, dtype)['rad']['mixers']
    if 'out_proj' not in mine['mixers']:
        own = made.get('base', base)['layers']
        shared = lambda l: {name: a for name, a in own[l]['attn']['o'].items() if name != 'bias'}
        mixers = tuple(mixer | {'out_proj': shared(l)} for l, mixer in zip(rcfg.layers, mixers, strict=True))
    return made | {'mixers': mixers}


def standalone(rcfg: RadConfig, params: dict) -> dict:
    """{'base', 'rad'} stacked, as trained -> the hybrid's own, numpy arrays. The attention has the kept layers only."""
    whole = student.whole(rcfg.layers, params)
    layers = whole['base']['layers']
    if not rcfg.parallel:
        kept = np.setdiff1d(np.arange(len(layers['attn_norm']['scale'])), rcfg.layers)
        layers = layers | {'attn': jax.tree.map(lambda a: a[kept], layers['attn'])}
    return jax.tree.map(np.asarray, {'base': whole['base'] | {'layers': layers}, 'rad': whole['rad']})


def restore(tree: dict, model: Mapping[str, Any], rad: Mapping[str, Any]) -> dict:
    """What `standalone` made -> the whole tree again, attentions that were replaced zero."""
    cfg = ModelConfig.from_dict(dict(model))
    rcfg = RadConfig.of(cfg, rad)
    if rcfg.parallel:
        return tree
    kept = np.setdiff1d(np.arange(cfg.num_layers), rcfg.layers)

    def spread(a: np.ndarray) -> np.ndarray:
        full = np.zeros((cfg.num_layers, *a.shape[1:]), a.dtype)
        full[kept] = a
        return full

    layers = tree['base']['layers']
    layers = layers | {'attn': jax.tree.map(spread, layers['attn'])}
    return tree | {'base': tree['base'] | {'layers': layers}}
