"""What early exit remembers besides keys and values, and what of it is read out after a call.

Stretches: s = 0..J-1 are the intervals that end at the exits, s = J the layers behind the last exit.

Deferred positions. Where a token leaves at exit j, the stretches behind it have no keys and values of its position yet.
`done[s-1]` is how many positions of a row stretch s has run: always the first ones, for whenever a token enters a
stretch, all positions it lacks enter with it. What they need is the slow stream where the stretch begins: `ring[s-1]`
keeps it for the latest P + 1 positions, position t at t mod (P + 1). Nothing here counts calls: a token that is
rejected, or run again, leaves `done` to be cut to `pos`, and everything else is written by position. (One that had to
go through because too many were owed finds them run when it comes again, and may leave.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone import cache as caches
from backbone.config import ModelConfig
from m2r2.config import M2R2Config

Array = jax.Array


@struct.dataclass
class ExitState:
    """The `layers` of an early-exit cache. B rows, C slots, J exits, P pending positions.

    kv: the base's own. done [J, B], ring J times [B, P+1, d]: see above; empty but for kv_fill 'defer'.
    exit [B, C]: after how many layers the token of a slot left, num_layers if it did not, 0 for the prompt.
    score [B, C]: the gate's confidence where it left, or at the last gate it passed; 0 where none was asked.
    filled [B, C], for 'drop': layers that have keys and values of the slot. memory: the gates' own. prompt [B]: tokens
    of the prompt.
    ran, wide [J+1]: single-token steps that ran each stretch, and those that ran it with pending positions beside.
    """

    kv: Any
    done: Array
    ring: tuple[Array, ...]
    exit: Array
    score: Array
    filled: Any
    memory: Any
    prompt: Array
    ran: Array
    wide: Array


def init(cfg: ModelConfig, m: M2R2Config, batch: int, capacity: int, dtype: str, stacked: bool, pending: int,
         drops: bool, memory: Any) -> ExitState:
    """pending: P; 0 where nothing is deferred. drops: kv_fill is 'drop'."""
    count = len(m.exits) if pending else 0
    ring = tuple(jnp.zeros((batch, pending + 1, cfg.hidden_size)) for _ in range(count))
    log = lambda dtype: jnp.zeros((batch, capacity), dtype)
    counts = lambda: jnp.zeros((len(m.exits) + 1,), jnp.int32)  # a donated cache holds no array twice
    return ExitState(caches.init_kv(cfg, batch, capacity, dtype, stacked), jnp.zeros((count, batch), jnp.int32), ring,
                     log(jnp.int8), log(jnp.float32), log(jnp.int8) if drops else (), memory,
                     jnp.zeros((batch,), jnp.int32), counts(), counts())


def ring_read(ring: Array, start: Array, size: int) -> Array:
    """Positions start[b]..start[b]+size-1 -> [B, size, d]. Those past the latest hold something of no meaning."""
    slots = (start[:, None] + jnp.arange(size)) % ring.shape[1]
    return jnp.take_along_axis(ring, slots[..., None], axis=1)


def ring_write(ring: Array, block: Array, start: Array, last: Array, live: Array) -> Array:
    """Positions start[b]..last[b] of block [B, S, d], which begins at start[b]; rows that are not live stay."""
    slots = jnp.arange(ring.shape[1])
    held = last[:, None] - (last[:, None] - slots) % ring.shape[1]  # the latest position each slot may hold
    new = jnp.take_along_axis(block, jnp.clip(held - start[:, None], 0, block.shape[1] - 1)[..., None], axis=1)
    fresh = live[:, None] & (held >= start[:, None])
    return jnp.where(fresh[..., None], new.astype(ring.dtype), ring)


def put(log: Array, at: Array, values: Array) -> Array:
    """log [B, C] with values [B, S] from slot at[b] on; what falls outside is dropped."""
    rows, slots = jnp.arange(log.shape[0])[:, None], at[:, None] + jnp.arange(values.shape[1])
    return log.at[rows, slots].set(values.astype(log.dtype), mode='drop')


# --- read out on the host -----------------------------------------------------------------------------------


def generated_exits(cache: caches.Cache) -> list[np.ndarray]:
    """A row's exit layers, one for each token run after its prompt."""
    state: ExitState = cache.layers
    exits, begin, end = (np.asarray(a) for a in (state.exit, state.prompt, cache.pos))
    return [exits[row, begin[row]:end[row]].astype(int) for row in range(len(end))]


def layer_costs(cfg: ModelConfig, m: M2R2Config, head: bool, gate_weights: tuple[int, ...] = ()) -> dict[str, Any]:
    """Multiply-adds of the parts, in layers of the base. Attention's scores are left out: they are the same for both
    streams. 'fast': what the fast stream adds to a layer; 'test' (J): an exit adapter and the gate's own weights;
    'head': an unembedding, where the gate asks for one."""
    att, d = cfg.attention, cfg.hidden_size
    q, kv = att.num_heads * att.head_dim, att.num_kv_heads * att.head_dim
    ffn = cfg.feed_scalars()
    layer = 2 * d * (q + kv) + ffn
    fast = 2 * d * q + (ffn if m.ffn else 0) + 2 * d * m.rank + 2 * m.qo_rank * (d + q) if m.stream == 'fast' else 0
    adapter = 2 * d * m.exit_rank if m.stream == 'exit' else 0
    tests = [(adapter + weights) / layer for weights in gate_weights or (0,) * len(m.exits)]
    return {'fast': fast / layer, 'test': tests, 'head': d * cfg.vocab_size / layer if head else 0.0}


def statistics(cfg: ModelConfig, m: M2R2Config, cache: caches.Cache, head: bool = False,
               gate_weights: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of a finished call, over the tokens run after the prompts. All in layers a token.

    mean_exit_layer: depth of exit. equivalent_layers: that plus the fast stream, the exits' tests, and the unembeddings
    that were asked for and not used (the one a token is taken from is the plain model's too). layers_run: what a step
    really ran: a stretch runs for the whole batch while one row needs it (finished rows included), so this and not the
    mean is what saves time for more than one row. wide_share: of the stretches behind an exit that ran, those that also
    ran pending positions. exits: tokens by exit layer.
    """
    state: ExitState = cache.layers
    depth = np.concatenate(generated_exits(cache))
    costs = layer_costs(cfg, m, head, gate_weights)
    ends = np.array([*m.exits, cfg.num_layers])
    extra = np.zeros(len(depth))
    for j, end in enumerate(m.exits):
        tested = depth >= end
        extra += tested * (costs['fast'] * (end - m.starts[j]) + costs['test'][j] + costs['head'])
        extra -= (depth == end) * costs['head']
    ran, wide = np.asarray(state.ran), np.asarray(state.wide)
    lengths = np.diff(ends, prepend=0)
    mean = lambda a: float(a.mean()) if len(depth) else float(cfg.num_layers)
    return {'tokens': len(depth), 'mean_exit_layer': mean(depth), 'equivalent_layers': mean(depth + extra),
            'layers_run': float((ran * lengths).sum() / max(ran[0], 1)),
            'wide_share': float(wide.sum() / max(ran[1:].sum(), 1)),
            'exits': {int(end): int((depth == end).sum()) for end in ends}}
