"""What a model remembers between calls. The only file that moves a position.

The rule, for every kind of state: `forward` writes the block at slots pos..pos+S-1 and leaves `pos`
alone; slots at or past `pos` are garbage that no later query sees before it is overwritten;
`commit` keeps the first n+1 tokens of the block. Writes are scatters that drop what falls outside:
a dynamic_update_slice would clamp at the end of the buffer and overwrite live slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import native as native_code
from backbone.config import ModelConfig

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
    return cache.replace(pos=pos, tokens=cache.tokens.at[rows, pos].set(kept, mode='drop'))


def ahead(cache: Cache, by: Array | int) -> Cache:
    """The same cache seen `by` slots further on: what a drafter steps on. The caller's `pos` does not move."""
    return cache.replace(pos=cache.pos + by)


def _block_index(pos: Array, size: int) -> tuple[Array, Array]:
    return jnp.arange(pos.shape[0])[:, None], pos[:, None] + jnp.arange(size)
