"""One layer on one token a row, with some heads and neurons only, of which nothing else is read.

Keys and values are made for every head, always: a head that is dropped now may be read later, at this position too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from backbone import layers
from backbone.cache import KVState
from backbone.config import ModelConfig
from backbone.layers import Context
from backbone.mlp import activate, glu
from sparsity.config import SparsityConfig
from sparsity.gather import rows_in, rows_out

Array = jax.Array


@struct.dataclass
class Picked:
    """What is loaded of one part of one layer for the whole batch, and what of it each row goes through.

    ids [K], active [1 number]: as of select.to_ids. own [B, K]: 0 or 1. Without any of them (None) the part is whole.
    """

    ids: Array
    active: Array
    own: Array


def gathered(cfg: ModelConfig, p: dict, x: Array, state: KVState, ctx: Context, picked: dict[str, Picked | None], *,
             s: SparsityConfig, implementation: str | None) -> tuple[Array, KVState, dict]:
    """A layer function of `run_layers` for x [B, 1, d] and parameters of layout.pack."""
    heads, neurons = picked['heads'], picked['neurons']
    normed = layers.norm(cfg, p['attn_norm'], x)
    if heads is None:
        q, k, v = layers.qkv(cfg, p['attn'], normed, ctx)
        keys, values, state = layers.read_write(state, k, v, ctx)
        x = x + layers.out(cfg, p['attn'], layers.attend(q, keys, values, ctx))
    else:
        mixed, state = _mix(cfg, s, p['attn'], normed, state, ctx, heads, implementation)
        x = x + mixed
    normed = layers.norm(cfg, p['mlp_norm'], x)
    if neurons is None:
        return x + layers.feed(cfg, p, normed)[0], state, {}
    return x + _feed(cfg, s, p['mlp'], normed, neurons, implementation), state, {}


def _mix(cfg, s, p, x, state, ctx, picked, implementation):
    """Attention through some heads: [B, 1, d], state."""
    att, batch = cfg.attention, x.shape[0]
    kv, each = att.num_kv_heads, att.num_heads // s.units(cfg)
    ids = (picked.ids[:, None] * each + jnp.arange(each)).reshape(-1)  # by query head
    active = picked.active * each
    # One product: the rows of all keys and values first, then those of the queries that are wanted.
    wanted = jnp.concatenate([att.num_heads + jnp.arange(2 * kv, dtype=jnp.int32), ids])
    y = rows_in(x[:, 0], p['qkv']['kernel_t'], wanted, 2 * kv + active, att.head_dim, implementation)
    if 'bias' in p['qkv']:
        y = y + p['qkv']['bias'].reshape(-1, att.head_dim)[wanted].reshape(-1)
    k, v, q = jnp.split(y.astype(x.dtype).reshape(batch, 1, -1, att.head_dim), (kv, 2 * kv), axis=2)
    if ctx.rope is not None:
        q, k = layers.rotate(q, *ctx.rope), layers.rotate(k, *ctx.rope)
    keys, values, state = layers.read_write(state, k, v, ctx)
    if s.head_unit == 'kv_group':
        heads = layers.attend(q, keys[:, picked.ids], values[:, picked.ids], ctx)
    else:  # single heads share keys and values with heads that are not wanted: those ask nothing
        at = jnp.where(jnp.arange(ids.shape[0]) < active, ids, att.num_heads)
        whole = jnp.zeros((batch, 1, att.num_heads, att.head_dim), q.dtype).at[:, :, at].set(q, mode='drop')
        heads = layers.attend(whole, keys, values, ctx)[:, :, ids]
    own = jnp.repeat(picked.own, each, axis=1)
    heads = jnp.where(own[:, None, :, None] > 0, heads, 0).reshape(batch, -1)
    return _added(p['o'], rows_out(heads, p['o']['kernel'], ids, active, att.head_dim, implementation), x), state


def _feed(cfg, s, p, x, picked, implementation):
    """The MLP through some blocks of neurons: [B, 1, d]."""
    batch, block = x.shape[0], s.block
    ids, active = picked.ids, picked.active
    name = 'gate_up' if cfg.mlp.gated else 'up'
    if cfg.mlp.gated:  # a block of the gate and the same of up, in turn
        ids, active = jnp.stack([ids, s.blocks(cfg) + ids], axis=1).reshape(-1), 2 * active
    y = rows_in(x[:, 0], p[name]['kernel_t'], ids, active, block, implementation)
    if 'bias' in p[name]:
        y = y + p[name]['bias'].reshape(-1, block)[ids].reshape(-1)
    y = y.astype(x.dtype).reshape(batch, picked.ids.shape[0], -1, block)
    h = glu(cfg.mlp, y[:, :, 0], y[:, :, 1]) if cfg.mlp.gated else activate(cfg.mlp, y[:, :, 0])
    h = jnp.where(picked.own[:, :, None] > 0, h, 0).reshape(batch, -1)
    return _added(p['down'], rows_out(h, p['down']['kernel'], picked.ids, picked.active, block, implementation), x)


def _added(p: dict, y: Array, x: Array) -> Array:
    """The sum of what is kept, and the whole bias, as x [B, 1, d] is."""
    return (y + p['bias'] if 'bias' in p else y).astype(x.dtype)[:, None]
