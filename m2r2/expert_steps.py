"""What the device does between two decisions of the host: one layer's attention and routing, and a few experts.

The first is one program for all layers, the second one for every K experts; which slots they read are arguments.
Sums over experts run in the order of their ids, one after another, so that no bit depends on which of them were run
together, nor on where they lay.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import moe
from backbone.cache import KVState
from backbone.config import ModelConfig
from backbone.layers import attend, make_context, mlp, norm, out, qkv, read_write
from backbone.model import embed, finish, unembed
from backbone.sampling import Sampling, choose
from m2r2.expert_guess import Predictor, look_ahead

Array = jax.Array


@struct.dataclass
class Routed:
    """After the attention of a layer. slow [B, S, d]: the residual; mixed: what the experts are added to, [B, S, d]
    (zero, or the shared expert); normed: what they read. ids, weights [B, S, K]. predicted: (ids, weights) for each
    target."""

    slow: Array
    mixed: Array
    normed: Array
    ids: Array
    weights: Array
    predicted: tuple[tuple[Array, Array], ...]


@functools.partial(jax.jit, static_argnames='cfg')
def begin(cfg: ModelConfig, base: dict, tokens: Array, pos: Array) -> tuple[Array, Array]:
    """tokens [B, S] at slots pos[b].. -> (residual, nothing to add to it yet), each [B, S, d]."""
    x = embed(cfg, base, tokens, pos[:, None] + jnp.arange(tokens.shape[1]))
    return x, jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnames=('cfg', 'predictor', 'count'), donate_argnames='state')
def attend_and_route(cfg: ModelConfig, predictor: Predictor | None, count: int, p: dict, mine: Any, own: Any,
                     slow: Array, add: Array, stream: Any, state: KVState, memory: Any, targets: tuple, pos: Array,
                     live: Array, forced: Array | None) -> tuple[Routed, KVState, Any, Any]:
    """One layer up to its experts, the predictor's stream beside it.

    p: the layer without experts. mine, own: the predictor's parameters, all and of this layer. add [B, S, d]: what the
    layer before still owes the residual. stream: None starts it. memory: of this layer, before the pass. targets: see
    `look_ahead`. live [B, S]: tokens that count. forced [B, S, K]: ids in the place of the router's choice (a replay).
    Returns what the experts need, the state, the stream and the memory.
    """
    ctx = make_context(cfg, pos, slow.shape[1], state.k.shape[2])
    slow = slow + add.astype(slow.dtype)
    if predictor is not None and stream is None:
        stream = predictor.begin(mine, slow)
    q, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], slow), ctx)
    keys, values, state = read_write(state, k, v, ctx)
    slow = slow + out(cfg, p['attn'], attend(q, keys, values, ctx))
    normed = norm(cfg, p['mlp_norm'], slow)
    ids, weights = route(cfg, p['moe']['router'], normed, forced)
    wide = jnp.promote_types(slow.dtype, jnp.float32)
    mixed = mlp(cfg, p['moe']['shared'], normed).astype(wide) if 'shared' in p['moe'] else jnp.zeros(slow.shape, wide)
    predicted = ()
    if predictor is not None:
        stream = predictor.beside(cfg, p, own, stream, keys, values, ctx)
        predicted = look_ahead(cfg, predictor, own, targets, slow, stream, ctx, live, count)
        memory = predictor.remember(memory, ids, live)
    return Routed(slow, mixed, normed, ids, weights, predicted), state, stream, memory


def route(cfg: ModelConfig, router: dict, normed: Array, forced: Array | None) -> tuple[Array, Array]:
    """ids, weights [B, S, K]; forced: these ids, with the router's own probabilities."""
    found = moe.route(cfg.moe, router, normed)
    if forced is None:
        return found.ids, found.weights
    weights = jnp.take_along_axis(jax.nn.softmax(found.logits, -1), forced, -1)
    return forced, weights / weights.sum(-1, keepdims=True) if cfg.moe.norm_topk else weights


@functools.partial(jax.jit, static_argnames='cfg')
def run_experts(cfg: ModelConfig, buffers: dict[str, Array], slots: Array, experts: Array, ids: Array, weights: Array,
                normed: Array, mixed: Array) -> Array:
    """Adds experts [K] lying in slots [K] to mixed [B, S, d]. experts: rising ids, -1 for none; its slot is not read
    from. A caller with more experts than K calls again."""
    for i in range(slots.shape[0]):
        one = {name: jax.lax.dynamic_index_in_dim(a, slots[i], keepdims=False) for name, a in buffers.items()}
        share = jnp.where((ids == experts[i]) & (experts[i] >= 0), weights, 0).sum(-1, keepdims=True)
        y = moe.expert(cfg, one, normed).astype(mixed.dtype)
        mixed = mixed + jnp.where(share > 0, share * y, 0)
    return mixed


@functools.partial(jax.jit, static_argnames=('cfg', 'sampling'))
def speak(cfg: ModelConfig, base: dict, slow: Array, add: Array, at: Array, rng: Array,
          sampling: Sampling) -> tuple[Array, Array]:
    """Residual after the last layer, what is owed to it, and the position [B] to read -> logits [B, V], token [B]."""
    hidden = finish(cfg, base, slow + add.astype(slow.dtype))
    hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
    logits = unembed(cfg, base, hidden)[:, 0]
    return logits, choose(logits, rng, sampling)
