"""What a staggered model remembers: keys and values of every stack, and of what each stack reads of others.

Both are written as the contract says (backbone/cache.py): at slots pos.., and nobody moves `pos` but `commit`. The
cross-attention's slot j holds what stack s - 1 said at position j, and is read by positions after j only; so the two
lengths differ by one and need no bookkeeping. With a window it is a ring.

    tuple form    self[stack][layer], cross[stack - 1][source][layer]
    storage form  self[stack], cross[stack - 1][source], their arrays with a leading layer axis
    arrays, staged  self[layer], cross[layer], their arrays with a leading stack axis
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone.cache import KVState, WindowState, window_positions, write_kv, write_window
from stagformer.config import StagFormerConfig
from stagformer.model import sees

Array = jax.Array


def init(cfg: StagFormerConfig, batch: int, max_len: int, block: int, dtype: Any, form: str) -> dict[str, Any]:
    """Empty state for max_len positions a row and blocks of up to `block` drafted tokens. form: see layout.py."""
    att = cfg.base.attention
    slots = max_len if cfg.window is None else min(cfg.window + block + 1, max_len)
    ring = KVState if cfg.window is None else WindowState

    def make(kind, heads, size, *lead):
        shape = (*lead, batch, heads, size, att.head_dim)
        return kind(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    own = lambda *lead: make(KVState, att.num_kv_heads, max_len, *lead)
    read = lambda *lead: make(ring, cfg.kv_heads, slots, *lead)
    above = range(1, cfg.stacks)
    if form == 'storage':
        return {'self': tuple(own(depth) for depth in cfg.depths),
                'cross': tuple(tuple(read(cfg.depths[s]) for _ in cfg.sources(s)) for s in above)}
    if form == 'tuple':
        return {'self': tuple(tuple(own() for _ in range(depth)) for depth in cfg.depths),
                'cross': tuple(tuple(tuple(read() for _ in range(cfg.depths[s])) for _ in cfg.sources(s))
                               for s in above)}
    layers = range(cfg.depths[0])
    return {'self': tuple(own(cfg.stacks) for _ in layers),
            'cross': tuple(read(cfg.stacks if form == 'staged' else cfg.stacks - 1) for _ in layers)}


def to_tuple(state: dict[str, Any], stacks: int) -> dict[str, Any]:
    """Arrays form (of a state that is not staged) -> tuple form."""
    take = lambda layers, s: tuple(jax.tree.map(lambda a: a[s], layer) for layer in layers)
    return {'self': tuple(take(state['self'], s) for s in range(stacks)),
            'cross': tuple((take(state['cross'], s),) for s in range(stacks - 1))}


def to_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of to_tuple."""
    join = lambda stacks: tuple(jax.tree.map(lambda *a: jnp.stack(a), *layers) for layers in zip(*stacks, strict=True))
    return {'self': join(state['self']), 'cross': join([sources[0] for sources in state['cross']])}


def remembered(cfg: StagFormerConfig, memory: KVState | WindowState, position: Array, pos: Array) -> Array:
    """[B, S, C]: which slots of a memory the queries at `position` [B, S] read; of a ring, as it was before pos [B]."""
    if isinstance(memory, WindowState):
        held = window_positions(memory, pos)[:, None]
        return sees(cfg, position[..., None], held) & (held >= 0)
    return sees(cfg, position[..., None], jnp.arange(memory.k.shape[-2]))


def write(memory: KVState | WindowState, new: KVState, pos: Array, last: Array,
          native: bool = False) -> KVState | WindowState:
    """Writes a block's k and v [B, S, KH, hd] of one layer; of a ring the positions up to last [B] only."""
    if isinstance(memory, WindowState):
        return write_window(memory, new.k, new.v, pos, last)
    return write_kv(memory, new.k, new.v, pos, native)
