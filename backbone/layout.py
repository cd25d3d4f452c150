"""From storage to the layout that decodes fastest: unstacked layers, fused q/k/v and gate/up.

Storage is stacked and unfused: it is what trains, shards and converts. Packing happens once at load.
`docs/performance.md` holds the measurements behind the choice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone import native as native_code


def pack(params: dict, dtype: Any = jnp.float32, native: bool | None = None) -> dict:
    """Base parameters -> the same model for decoding, matrices in `dtype`, norms and biases in float32. A mixture's
    experts stay as they are, its router in float32.

    native: store matrices as 'kernel_t' [out, in] for the C product (backbone/native); by default where
    the process runs on a CPU and can build it. The result runs everywhere the stacked tree does; its
    cache must be unstacked too (`PlainTarget(cfg, stacked=False)`).
    """
    if native is None:
        native = jax.default_backend() == 'cpu' and native_code.available()
    stacked = params['layers']
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    layers = [_fuse(jax.tree.map(lambda a: a[l], stacked)) for l in range(num_layers)]
    packed = {k: v for k, v in params.items() if k != 'layers'} | {'layers': tuple(layers)}
    packed = jax.tree_util.tree_map_with_path(lambda path, a: jnp.asarray(a, _dtype(path, a, dtype)), packed)
    if native:
        packed = transpose(packed)
        if 'lm_head' not in packed:  # tied: the table already is [out, in], and is shared
            packed['lm_head'] = {'kernel_t': packed['embed']['tokens']}
    return packed


def _fuse(layer: dict) -> dict:
    attn = dict(layer['attn'])
    attn['qkv'] = _join([attn.pop(n) for n in ('q', 'k', 'v')])
    fused = layer | {'attn': attn}
    if 'mlp' in layer:
        fused['mlp'] = _fuse_mlp(layer['mlp'])
    elif 'shared' in layer['moe']:
        fused['moe'] = layer['moe'] | {'shared': _fuse_mlp(layer['moe']['shared'])}
    return fused


def _fuse_mlp(mlp: dict) -> dict:
    if 'gate' not in mlp:
        return mlp
    rest = {name: p for name, p in mlp.items() if name not in ('gate', 'up')}
    return rest | {'gate_up': _join([mlp['gate'], mlp['up']])}


def _dtype(path: tuple, a: Any, matrices: Any) -> Any:
    """Vectors stay wide, and so do routers: they are small, and rounding one sends tokens to other experts."""
    return matrices if a.ndim > 1 and not _is_router(path) else jnp.float32


def _is_router(path: tuple) -> bool:
    return any(getattr(key, 'key', None) == 'router' for key in path)


def _join(parts: list[dict]) -> dict:
    return {name: jnp.concatenate([jnp.asarray(p[name]) for p in parts], axis=-1) for name in parts[0]}


def transpose(tree: Any) -> Any:
    """The same tree with every {'kernel': [in, out]} as {'kernel_t': [out, in]}.

    Not a mixture's router and experts: the native product is for matrices that every token goes through.
    """
    if isinstance(tree, tuple):
        return tuple(transpose(t) for t in tree)
    if not isinstance(tree, dict):
        return tree
    turn = lambda k, v: v if k in ('router', 'experts') else v.T if k == 'kernel' else transpose(v)
    return {'kernel_t' if k == 'kernel' else k: turn(k, v) for k, v in tree.items()}
