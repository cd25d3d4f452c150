"""What a prompt says of heads and neurons, gathered while it runs (for selectors.Griffin)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from backbone import layers
from backbone.config import ModelConfig
from backbone.layers import Context
from backbone.matmul import dense
from backbone.mlp import neurons
from backbone.model import run_layers
from sparsity.config import SparsityConfig
from sparsity.select import pool

Array = jax.Array


def run(cfg: ModelConfig, s: SparsityConfig, base: dict, x: Array, kv: Any, ctx: Context, last: Array,
        taps: tuple[str, ...] = ()) -> tuple[Array, Any, dict[str, Array], dict[str, Array]]:
    """The plain layers on a prompt x [B, S, d] of which 0..last[b] counts: residual, cache, {'heads': [B, L, H'],
    'neurons': [B, L, NB]} as selectors.Griffin says, and the taps."""
    counts = jnp.arange(x.shape[1]) <= last[:, None]
    sizes = s.sizes(cfg)
    state = join(kv, {part: jnp.zeros((cfg.num_layers, x.shape[0], n)) for part, n in sizes.items()})
    watched = functools.partial(layer, s=s, counts=counts)
    x, state, found = run_layers(cfg, base, x, state, ctx, layer_fn=watched, taps=taps)
    kv, seen = apart(state)
    return x, kv, jax.tree.map(lambda a: a.swapaxes(0, 1), seen), found


def join(kv: Any, seen: Any) -> Any:
    """The cache's layers with something beside each: the state of a layer function that keeps what it sees. seen: a
    tree with a leading layer axis."""
    if not isinstance(kv, tuple):
        return kv, seen
    return tuple((layer, jax.tree.map(lambda a: a[l], seen)) for l, layer in enumerate(kv))


def apart(state: Any) -> tuple[Any, Any]:
    """The inverse of `join`."""
    if isinstance(state[-1], dict):
        return state
    kv, seen = zip(*state, strict=True)
    return kv, jax.tree.map(lambda *a: jnp.stack(a), *seen)


def layer(cfg, p, x, state, ctx, extra, *, s, counts):
    """layers.block on state (the layer's cache, anything), which also keeps what it saw. counts [B, S]: the tokens that
    are summed up; None: each is kept by itself."""
    q, k, v = layers.qkv(cfg, p['attn'], layers.norm(cfg, p['attn_norm'], x), ctx)
    keys, values, kv = layers.read_write(state[0], k, v, ctx)
    heads = layers.attend(q, keys, values, ctx)
    mixed = layers.out(cfg, p['attn'], heads)
    x = x + mixed
    h = neurons(cfg, p['mlp'], layers.norm(cfg, p['mlp_norm'], x))
    seen = {'heads': pool(_share(jnp.linalg.norm(heads.astype(jnp.float32), axis=-1), counts),
                          cfg.attention.num_heads // s.units(cfg)),
            'neurons': pool(_share(h.astype(jnp.float32), counts), s.block)}
    return x + dense(p['mlp']['down'], h), (kv, seen), {'attention': heads, 'mixer': mixed}


def _share(values: Array, counts: Array | None) -> Array:
    """values [B, S, n] -> [B, n]: the L2 norm over the tokens that count of |value| / norm of the token's values; or
    [B, S, n] without it."""
    of_token = jnp.linalg.norm(values, axis=-1, keepdims=True)
    share = jnp.abs(values) / jnp.where(of_token > 0, of_token, 1)
    if counts is None:
        return share
    return jnp.sqrt(jnp.where(counts[:, :, None], jnp.square(share), 0).sum(1))
