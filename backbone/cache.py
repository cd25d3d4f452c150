"""What a model remembers between calls. The only file that moves a position.

The rule, for every kind of state: `forward` writes the block at slots pos..pos+S-1 and leaves `pos`
alone; slots at or past `pos` are garbage that no later query sees before it is overwritten;
`commit` keeps the first n+1 tokens of the block. A recurrent state has no slots: its block is logged, and `commit`
replays what is kept. Writes are scatters that drop what falls outside: a dynamic_update_slice would clamp at the end of
the buffer and overwrite live slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import native as native_code
from backbone.config import ModelConfig, SsmConfig

Array = jax.Array


@struct.dataclass
class KVState:
    """Keys (rotated) and values of one layer [B, KH, C, hd], or of a stack [L, B, KH, C, hd].

    Heads come before slots so that both attention products batch over leading axes: no transposed copy.
    """

    k: Array
    v: Array


@struct.dataclass
class WindowState:
    """Keys and values of the latest positions, [B, KH, C, hd] or stacked: position j lies in slot j mod C.

    A query that sees w positions needs C >= w + K: K rejected tokens of a block overwrite only what is out of sight.
    """

    k: Array
    v: Array


@struct.dataclass
class SsmLog:
    """What a recurrent layer was fed at the R latest positions from a state on: x [B, R, G, P] and B [B, R, G, N] a
    group, step dt and log decay la [B, R, H], and the convolution's inputs conv [B, R, ch]."""

    x: Array
    B: Array
    dt: Array
    la: Array
    conv: Array


@struct.dataclass
class SsmState:
    """A recurrent layer (backbone/mamba2.py). A state has no slots to leave out, so a block goes into a log, and what
    is kept of it is replayed at `commit`.

    state [B, H, P, N] and tail [B, W-1, ch], the convolution's latest inputs, are those before position at [B]. Slot j
    of the log is position at + j, under the cache's rule: what lies at or past `pos` is garbage. After `commit` at is
    pos.
    """

    state: Array
    tail: Array
    at: Array
    log: SsmLog


@struct.dataclass
class Cache:
    """pos [B]: tokens run so far. tokens [B, C+1]: ids by slot, where tokens[b, pos[b]] is pending:
    chosen, not yet run. layers: one state for a stacked model, a tuple of states for an unstacked one.
    """

    pos: Array
    tokens: Array
    layers: Any

    @property
    def pending(self) -> Array:
        """The token each row runs next, [B]."""
        return jnp.take_along_axis(self.tokens, self.pos[:, None], axis=1)[:, 0]


def init_kv(cfg: ModelConfig, batch: int, capacity: int, dtype, stacked: bool) -> Any:
    """Empty KV for every layer; `stacked` chooses one array or a tuple, as the parameters are."""
    shape = (batch, cfg.attention.num_kv_heads, capacity, cfg.attention.head_dim)
    if stacked:
        shape = (cfg.num_layers, *shape)
        return KVState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return tuple(KVState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.num_layers))


def init_ssm(cfg: SsmConfig, batch: int, block: int, dtype) -> SsmState:
    """An empty recurrent layer for blocks of up to `block` drafted tokens; at least float32."""
    make = lambda *shape: jnp.zeros((batch, *shape), jnp.promote_types(dtype, jnp.float32))
    heads, groups, slots = cfg.num_heads, cfg.num_groups, block + 1
    log = SsmLog(make(slots, groups, cfg.head_dim), make(slots, groups, cfg.state_size), make(slots, heads),
                 make(slots, heads), make(slots, cfg.conv_channels))
    return SsmState(make(heads, cfg.head_dim, cfg.state_size), make(cfg.conv_width - 1, cfg.conv_channels),
                    jnp.zeros((batch,), jnp.int32), log)


def init_cache(layers: Any, batch: int, capacity: int) -> Cache:
    return Cache(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, capacity + 1), jnp.int32), layers)


def write_kv(state: KVState, k: Array, v: Array, pos: Array, native: bool = False) -> KVState:
    """Writes a block's k, v [B, S, KH, hd] of one layer at slots pos[b]..pos[b]+S-1.

    native: the cache of a model packed for one CPU; it may be written in C.
    """
    return KVState(_put(state.k, k, pos, native), _put(state.v, v, pos, native))


def _put(buffer: Array, new: Array, pos: Array, native: bool) -> Array:
    if native and native_code.takes_store(buffer, new):
        return jax.lax.platform_dependent(buffer, new, pos, cpu=native_code.store, default=_scatter)
    return _scatter(buffer, new, pos)


def _scatter(buffer: Array, new: Array, pos: Array) -> Array:
    rows, slots = _block_index(pos, new.shape[1])
    return buffer.at[rows, :, slots].set(new.astype(buffer.dtype), mode='drop')


def window_positions(state: WindowState, pos: Array) -> Array:
    """[B, C]: the position each slot of the ring holds before pos [B], negative where it holds none yet."""
    last = pos[:, None] - 1
    return last - (last - jnp.arange(state.k.shape[-2])) % state.k.shape[-2]


def write_window(state: WindowState, k: Array, v: Array, pos: Array, last: Array) -> WindowState:
    """Writes a block's k, v [B, S, KH, hd] at positions pos[b]..; what lies past position last[b] is padding, and what
    would be overwritten by a later token of the same block is not written."""
    capacity = state.k.shape[-2]
    rows, at = _block_index(pos, k.shape[1])
    kept = (at <= last[:, None]) & (at > last[:, None] - capacity)
    slots = jnp.where(kept, at % capacity, capacity)  # past the end: dropped
    put = lambda buffer, new: buffer.at[rows, :, slots].set(new.astype(buffer.dtype), mode='drop')
    return WindowState(put(state.k, k), put(state.v, v))


def write_tokens(cache: Cache, tokens: Array) -> Cache:
    """Writes the block's ids [B, S] at slots pos..pos+S-1."""
    rows, slots = _block_index(cache.pos, tokens.shape[1])
    return cache.replace(tokens=cache.tokens.at[rows, slots].set(tokens, mode='drop'))


def commit(cache: Cache, n: Array, next_token: Array) -> Cache:
    """Keeps block positions 0..n[B] (n = -1 keeps none); next_token [B] becomes pending."""
    pos = cache.pos + n + 1
    rows = jnp.arange(pos.shape[0])
    kept = jnp.where(n >= 0, next_token, cache.pending)
    is_ssm = lambda state: isinstance(state, SsmState)
    layers = jax.tree.map(lambda state: replay(state, pos) if is_ssm(state) else state, cache.layers, is_leaf=is_ssm)
    return cache.replace(pos=pos, tokens=cache.tokens.at[rows, pos].set(kept, mode='drop'), layers=layers)


def replay(state: SsmState, pos: Array) -> SsmState:
    """The state before pos [B] from the one it holds and the log behind it, all tokens at once:
    S_m = e^{cs_m} S_0 + sum over j < m of e^{cs_m - cs_j} dt_j x_j (outer) B_j, cs summing log decays.

    A prompt longer than the log has brought the state to its end already: then there is nothing left to replay. Where
    such a prompt was not kept after all, the row is at position 0 again, and at position 0 every state is empty.
    """
    m = pos - state.at
    heads, groups = state.state.shape[1], state.log.B.shape[2]
    u, B, la = held_inputs(state.log, jnp.arange(state.log.dt.shape[1]) < m[:, None], heads)
    total = jnp.cumsum(la, axis=1)
    u = u * jnp.exp(total[:, -1:] - total)[..., None]
    if u.shape[1] == 1:  # plain decoding: one pass over the state, no product of its own
        added = u[:, 0, ..., None] * jnp.repeat(B[:, 0], heads // groups, axis=1)[:, :, None]
    else:
        added = jnp.einsum('bjgrp,bjgn->bgrpn', u.reshape(*u.shape[:2], groups, -1, u.shape[-1]), B)
        added = added.reshape(state.state.shape)
    begun = (pos > 0)[:, None]
    kept = jnp.where(begun, jnp.exp(total[:, -1]), 0)
    tail = window_from(jnp.concatenate([state.tail, state.log.conv], axis=1), m, state.tail.shape[1])
    return state.replace(state=kept[..., None, None] * state.state + added, at=pos,
                         tail=jnp.where(begun[..., None], tail, 0))


def held_inputs(log: SsmLog, held: Array, heads: int) -> tuple[Array, Array, Array]:
    """dt x [B, R, H, P], B [B, R, G, N] and la [B, R, H]; zero, the identity, in slots that are not held [B, R], which
    may hold anything, NaN included."""
    x, B, dt, la = (jnp.where(held.reshape(*held.shape, *[1] * (a.ndim - 2)), a, 0)
                    for a in (log.x, log.B, log.dt, log.la))
    return jnp.repeat(x, heads // x.shape[2], axis=2) * dt[..., None], B, la


def window_from(rows: Array, first: Array, size: int) -> Array:
    """rows [B, S, ch] at first[b]..first[b]+size-1 (never below 0)."""
    at = jnp.maximum(first, 0)[:, None] + jnp.arange(size)
    return jnp.take_along_axis(rows, at[..., None], axis=1)


def ahead(cache: Cache, by: Array | int) -> Cache:
    """The same cache seen `by` slots further on: what a drafter steps on. The caller's `pos` does not move."""
    return cache.replace(pos=cache.pos + by)


def _block_index(pos: Array, size: int) -> tuple[Array, Array]:
    return jnp.arange(pos.shape[0])[:, None], pos[:, None] + jnp.arange(size)
