"""What a sparse target keeps in its cache beside keys and values, and how it is read on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone import cache as caches
from sparsity import account
from sparsity.account import Reads
from sparsity.config import PARTS
from sparsity.step import first_choice, loaded

if TYPE_CHECKING:
    from sparsity.target import SparseTarget

Array = jax.Array


@struct.dataclass
class SparseState:
    """The `layers` of a sparse cache. B rows, C slots, R = C / refresh entries of the log.

    kv: the base's own. choice: what is kept now. prompt: Seen.prompt, {} where the selector asks for none. begin [B]:
    tokens of the prompt. reads: the account. log: {} or {'at' [B, R]: slot of a choice or -1, 'heads', 'neurons':
    [B, R, L, bytes]: what it keeps, a bit a unit}.
    """

    kv: Any
    choice: Any
    prompt: dict[str, Array]
    begin: Array
    reads: Reads
    log: dict[str, Array]


def init(t: SparseTarget, batch: int, capacity: int) -> SparseState:
    cfg, sizes = t.cfg, t.s.sizes(t.cfg)
    choice = () if t.by_value else first_choice(cfg, t.s, t.compute, batch)
    prompt, log = {}, {}
    if not t.by_value and t.selector.reads_prompt:
        prompt = {part: jnp.zeros((batch, cfg.num_layers, n)) for part, n in sizes.items()}
    if t.logged and not t.by_value:
        entries = -(-capacity // t.s.refresh)
        log = {part: jnp.zeros((batch, entries, cfg.num_layers, -(-n // 8)), jnp.uint8) for part, n in sizes.items()}
        log['at'] = jnp.full((batch, entries), -1, jnp.int32)
    kv = caches.init_kv(cfg, batch, capacity, t.cache_dtype, t.stacked)
    return SparseState(kv, choice, prompt, jnp.zeros((batch,), jnp.int32), account.nothing(cfg), log)


def noted(t: SparseTarget, params: Any, s: SparseState, pos: Array, anew: Array) -> SparseState:
    """The state after a step at pos [B] with s.choice, which the rows `anew` [B] made in it."""
    units = loaded(t.s, s.choice.units)
    any_row = {part: a.any(0).mean(-1) for part, a in units.items()}  # [L]
    sparse = jnp.array([l in t.s.sparse_layers(t.cfg) for l in range(t.cfg.num_layers)])
    heads, neurons = (jnp.where(sparse, any_row[part], 1.0) for part in PARTS)
    share = {'q': heads, 'o': heads, 'gate': neurons, 'up': neurons, 'down': neurons}
    groups = heads if t.s.head_unit == 'kv_group' else jnp.ones_like(heads)
    reads = account.add(s.reads, share, groups, pos, anew.any(), t.selector.size(params))
    return s.replace(reads=reads, log=_logged(t, s, pos, anew) if s.log else s.log)


def _logged(t: SparseTarget, s: SparseState, pos: Array, anew: Array) -> dict[str, Array]:
    """Choices of one row are `refresh` slots apart, so each has an entry of its own."""
    rows, entries = jnp.arange(pos.shape[0]), s.log['at'].shape[1]
    entry = jnp.where(anew, pos // t.s.refresh, entries)  # past the end: dropped
    put = lambda log, value: log.at[rows, entry].set(value, mode='drop')
    log = {part: put(s.log[part], jnp.packbits(s.choice.units[part], axis=-1)) for part in PARTS}
    return log | {'at': put(s.log['at'], pos)}


def read(t: SparseTarget, cache: caches.Cache) -> dict[str, np.ndarray]:
    """SparseTarget.audit."""
    state: SparseState = cache.layers
    sizes, log = t.s.sizes(t.cfg), {name: np.asarray(a) for name, a in state.log.items()}
    begin, end = np.asarray(state.begin), np.asarray(cache.pos)
    skipped = np.full((len(end), cache.tokens.shape[1] - 1), None, object)
    for row, entry in np.argwhere(log['at'] >= 0):
        slot = log['at'][row, entry]
        if begin[row] <= slot < end[row]:
            left_out = {part: 1 - np.unpackbits(log[part][row, entry], axis=-1, count=sizes[part]) for part in PARTS}
            skipped[row, slot] = {part: [np.flatnonzero(layer).tolist() for layer in a] for part, a in left_out.items()}
    return {'skipped': skipped}
