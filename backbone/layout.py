"""From storage to the layout that decodes fastest: unstacked layers, fused q/k/v and gate/up.

Storage is stacked and unfused: it is what trains, shards and converts. Packing happens once at load.
`docs/performance.md` holds the measurements behind the choice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def pack(params: dict, dtype: Any = jnp.float32) -> dict:
    """Base parameters -> the same model for decoding, matrices in `dtype`, norms and biases in float32.

    The result runs everywhere the stacked tree does; its cache must be unstacked too
    (`PlainTarget(cfg, stacked=False)`). Works on arrays and, under jax.eval_shape, on shapes.
    """
    stacked = params['layers']
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    layers = tuple(_cast(_fuse(jax.tree.map(lambda a: a[l], stacked)), dtype)  # noqa: B023
                   for l in range(num_layers))
    rest = _cast({k: v for k, v in params.items() if k != 'layers'}, dtype)
    return rest | {'layers': layers}


def _fuse(layer: dict) -> dict:
    attn, mlp = dict(layer['attn']), dict(layer['mlp'])
    attn['qkv'] = _join([attn.pop(n) for n in ('q', 'k', 'v')])
    if 'gate' in mlp:
        mlp['gate_up'] = _join([mlp.pop(n) for n in ('gate', 'up')])
    return layer | {'attn': attn, 'mlp': mlp}


def _join(parts: list[dict]) -> dict:
    return {name: jnp.concatenate([jnp.asarray(p[name]) for p in parts], axis=-1) for name in parts[0]}


def _cast(tree: dict, dtype: Any) -> dict:
    """Matrices in `dtype`; vectors (norm scales, biases) in float32, which also keeps the residual wide."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if a.ndim > 1 else jnp.float32), tree)
