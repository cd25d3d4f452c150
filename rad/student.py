"""The student's whole parameters, from the base and what was trained of it.

params['rad'] holds exactly what is trained; the base beside it stays what it was, so that one tree is the hybrid and
the model it drafts for:

    mixers    {leaf [k, ...]}: of the replaced layers. Without out_proj they share W_O of the attention they replace
    layers    {'attn_norm' | 'mlp_norm' | 'attn': leaves [k, ...]}: parts of those layers that differ from the base's
    whole     a base of its own, where everything is trained
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from backbone.contract import Output
from backbone.model import PlainTarget

Array = jax.Array


def whole(layers: tuple[int, ...], params: dict) -> dict:
    """{'base', 'rad': {'mixers'}} of the student, stacked, as it runs; params themselves where they are that already.

    layers: numbers of the layers that 'mixers' and 'layers' are about.
    """
    base, mine = params['base'], params['rad']
    mixers = mine.get('mixers', {})
    packed = isinstance(mixers, tuple)  # rad/export.py
    if packed or not {'whole', 'layers'} & set(mine) and (not mixers or 'out_proj' in mixers):
        return params
    at = jnp.array(layers, jnp.int32)
    base = mine.get('whole', base)
    if 'layers' in mine:
        put = lambda a, b: jnp.asarray(a).at[at].set(jnp.asarray(b, a.dtype))
        changed = {name: jax.tree.map(put, base['layers'][name], part) for name, part in mine['layers'].items()}
        base = base | {'layers': base['layers'] | changed}
    if mixers and 'out_proj' not in mixers:
        mixers = mixers | {'out_proj': {'kernel': base['layers']['attn']['o']['kernel'][at]}}
    return {'base': base, 'rad': {'mixers': mixers} if mixers else {}}


def count(mine: Any) -> int:
    """Scalars in params['rad']: what is trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(mine))


@dataclasses.dataclass(frozen=True)
class InPlaceTarget(PlainTarget):
    """A plain model of which parts are trained (the task's `in_place`), from the whole tree: {'base', 'rad'}."""

    layers: tuple[int, ...] = ()

    def forward(self, params: dict, *args: Any, **options: Any) -> Output:
        return super().forward(whole(self.layers, params), *args, **options)
