"""Neurons in the order, and matrices in the layout, that let a block of them be read as one piece.

Which neuron stands where in an MLP is nobody's business: the columns of gate and up, their biases and the rows of down
may be permuted together. So neurons that are active together are put into the same block, offline: then a block that
is kept holds less of what nobody needs. Ours, after the remarks on block size in Akhauri et al., 2024 and the grouping
of neurons in Liu et al., 2023 (arXiv 2310.17157).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import layout
from backbone.errors import ConfigError

Array = jax.Array


def order(activity: np.ndarray, block: int) -> np.ndarray:
    """An order of F neurons [F] whose every `block` neighbours are active together. activity [N, F]: how strongly each
    was active at N tokens (what is kept of them: magnitudes, or 0 and 1).

    Greedy: a block starts with the busiest neuron that is left and takes up those most like the sum of its members
    (cosine). Ties go to the lower number: the same activity gives the same order. O(F^2 N).
    """
    count = activity.shape[1]
    if count % block:
        raise ConfigError(f'sparsity.block {block} does not divide {count} neurons')
    if block == 1:
        return np.arange(count)
    activity = np.abs(np.asarray(activity, np.float32))
    norms = np.sqrt(np.square(activity).sum(0))
    unit = (activity / np.maximum(norms, 1e-20)).T.copy()  # [F, N]
    left = np.ones(count, bool)
    placed = []
    for _ in range(count // block):
        first = int(np.argmax(np.where(left, norms, -1)))
        left[first] = False
        members, like = [first], unit @ unit[first]
        for _ in range(block - 1):
            best = int(np.argmax(np.where(left, like, -1)))
            left[best] = False
            members.append(best)
            like = like + unit @ unit[best]
        placed += sorted(members)
    return np.array(placed, np.int32)


def together(activity: np.ndarray, order: np.ndarray, block: int) -> float:
    """Of the squared activity, the share in the best half of the blocks, chosen anew for each of the N tokens: what
    an order is good for."""
    energy = np.square(activity[:, order]).reshape(len(activity), -1, block).sum(-1)
    best = np.sort(energy, -1)[:, energy.shape[1] // 2:]
    return float(best.sum() / max(energy.sum(), 1e-30))


def permute(base: dict, orders: Array) -> dict:
    """The same model (stacked, as stored) with the neurons of layer l in the order orders[l], [L, F]."""
    orders = jnp.asarray(orders)
    mlp = base['layers']['mlp']

    def columns(p: dict) -> dict:
        turned = {'kernel': jnp.take_along_axis(p['kernel'], orders[:, None, :], axis=2)}
        return turned | ({'bias': jnp.take_along_axis(p['bias'], orders, axis=1)} if 'bias' in p else {})

    moved = {name: columns(mlp[name]) for name in ('gate', 'up') if name in mlp}
    moved['down'] = mlp['down'] | {'kernel': jnp.take_along_axis(mlp['down']['kernel'], orders[:, :, None], axis=1)}
    return base | {'layers': base['layers'] | {'mlp': mlp | moved}}


def pack(base: dict, dtype: Any = jnp.float32, native: bool | None = None) -> dict:
    """layout.pack, with a unit's numbers side by side in every matrix: a head's rows of q and o, a neuron's of gate, up
    and down. What is unpacked already is only turned. The plain model decodes it, too."""
    packed = base if isinstance(base['layers'], tuple) else layout.pack(base, dtype, native)
    return packed | {'layers': tuple(_rows(layer) for layer in packed['layers'])}


def _rows(layer: dict) -> dict:
    turn = lambda p, wanted: _oriented(p, wanted, 'kernel' if wanted == 'kernel_t' else 'kernel_t')
    attn, mlp = dict(layer['attn']), dict(layer['mlp'])
    attn['qkv'], attn['o'] = turn(attn['qkv'], 'kernel_t'), turn(attn['o'], 'kernel')
    for name in ('gate_up', 'up'):
        if name in mlp:
            mlp[name] = turn(mlp[name], 'kernel_t')
    mlp['down'] = turn(mlp['down'], 'kernel')
    return layer | {'attn': attn, 'mlp': mlp}


def _oriented(p: dict, wanted: str, other: str) -> dict:
    if wanted in p:
        return p
    return {name: a for name, a in p.items() if name != other} | {wanted: jnp.asarray(p[other].T)}


def permute_packed(base: dict, orders: Array) -> dict:
    """`permute` of parameters that `pack` has made."""
    def turned(layer: dict, order: Array) -> dict:
        mlp, size = layer['mlp'], layer['mlp']['down']['kernel'].shape[0]
        name = 'gate_up' if 'gate_up' in mlp else 'up'
        rows = jnp.concatenate([order, size + order]) if name == 'gate_up' else order
        moved = {name: {key: a[rows] for key, a in mlp[name].items()},
                 'down': mlp['down'] | {'kernel': mlp['down']['kernel'][order]}}
        return layer | {'mlp': mlp | moved}
    return base | {'layers': tuple(turned(p, jnp.asarray(o)) for p, o in zip(base['layers'], orders, strict=True))}


def turned_rows(base: dict) -> tuple[dict, ...]:
    """Of each layer the matrices that `pack` would turn, turned: for a drafter beside a packed base that stays."""
    return tuple({part: {name: p for name, p in new[part].items() if p is not old[part].get(name)}
                  for part in ('attn', 'mlp')} for old, new in zip(base['layers'], pack(base)['layers'], strict=True))


def with_rows(base: dict, rows: tuple[dict, ...]) -> dict:
    """The base with the matrices of `turned_rows` in place."""
    return base | {'layers': tuple(layer | {part: layer[part] | own[part] for part in own}
                                   for layer, own in zip(base['layers'], rows, strict=True))}


def has_rows(base: dict) -> bool:
    """Whether the parameters are as `pack` leaves them."""
    layers = base['layers']
    if not isinstance(layers, tuple):
        return False
    mlp = layers[0]['mlp']
    return ('kernel_t' in layers[0]['attn'].get('qkv', {}) and 'kernel' in layers[0]['attn']['o']
            and 'kernel_t' in mlp.get('gate_up', mlp.get('up', {})) and 'kernel' in mlp['down'])
