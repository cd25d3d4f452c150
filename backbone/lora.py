"""Low-rank adapters (Hu et al., 2021): a matrix W [in, out] becomes W + alpha/r * A B, A [in, r], B [r, out].

The adapters are a tree of their own beside the base. A task holds params = {'base': ..., 'lora': ...} with
trainable = ('lora/.*',) and takes its loss on `merge(params['base'], params['lora'], alpha)`: one code path trains
them and exports them, and no layer knows of them.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from backbone.errors import ConfigError
from backbone.formats.tensors import flatten, unflatten

Array = jax.Array

ATTENTION = (r'layers/attn/(q|k|v|o)/kernel',)


def init(params: dict, rng: Array, rank: int, targets: tuple[str, ...] = ATTENTION, last: int | None = None) -> dict:
    """Adapters for the matrices of `params` whose '/'-joined path fully matches one of `targets`.

    The same tree with {'a': [.., in, r], 'b': [.., r, out]} at each of those paths; a ~ N(0, 1/in), b = 0, so that
    at first nothing changes. Stacked layers [L, in, out] get one adapter a layer, or only the `last` so many of them.
    Errors: ConfigError for a target that matches nothing or no matrix, a rank or `last` outside its range.
    """
    leaves = flatten(params)
    chosen = [path for path in leaves if any(re.fullmatch(target, path) for target in targets)]
    for target in targets:
        if not any(re.fullmatch(target, path) for path in chosen):
            raise ConfigError(f'lora.targets: {target!r} matches no parameter')
    adapters = {}
    for path, key in zip(chosen, jax.random.split(rng, max(len(chosen), 1)), strict=False):
        shape = leaves[path].shape
        stacked = path.startswith('layers/')
        if len(shape) != 2 + stacked:
            raise ConfigError(f'lora.targets: {path} {list(shape)} is not a matrix')
        *layers, rows, columns = shape
        if not 1 <= rank <= min(rows, columns):
            raise ConfigError(f'lora.rank {rank} is outside 1..{min(rows, columns)} of {path} {list(shape)}')
        if stacked and last is not None:
            if not 1 <= last <= layers[0]:
                raise ConfigError(f'lora.last {last} is outside 1..{layers[0]}, the layers there are')
            layers = [last]
        adapters[f'{path}/a'] = jax.random.normal(key, (*layers, rows, rank)) * rows ** -0.5
        adapters[f'{path}/b'] = jnp.zeros((*layers, rank, columns))
    return unflatten(adapters)


def merge(params: dict, lora: dict, alpha: float) -> dict:
    """The base with its adapters in it: same tree, same shapes, same dtypes. Products in at least float32.

    Fewer adapters than stacked layers belong to the last layers. Errors: ConfigError for an adapter whose matrix is
    not there.
    """
    leaves: dict[str, Any] = flatten(params)
    adapters = flatten(lora)
    for path in sorted({name.rpartition('/')[0] for name in adapters}):
        if path not in leaves:
            raise ConfigError(f'the adapter {path} belongs to no parameter of this model')
        a, b, base = adapters[f'{path}/a'], adapters[f'{path}/b'], leaves[path]
        wide = jnp.promote_types(base.dtype, jnp.float32)
        change = alpha / a.shape[-1] * jnp.einsum('...ir,...ro->...io', a.astype(wide), b.astype(wide),
                                                  precision='highest')
        missing = base.shape[0] - change.shape[0] if base.ndim == 3 else 0
        if missing:
            change = jnp.pad(change, ((missing, 0), (0, 0), (0, 0)))
        leaves[path] = (base.astype(wide) + change).astype(base.dtype)
    return unflatten(leaves)
