"""The parts of a transformer layer: Linen leaf modules, and the pure pieces every layer is composed of.

`qkv`, `attend`, `out`, `mlp`, `norm` take one layer's part, `feed` the whole layer. A method composes its
own layer from them (see `block`, the plain one) and hands it to `model.run_layers`; nobody copies a block.

Dtypes: matrix products run in the kernel's dtype, the residual stream keeps its own, and norms, softmax
and rotations run in at least float32.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from backbone import moe, native
from backbone.cache import KVState, write_kv
from backbone.config import AttentionConfig, ModelConfig, RopeScaling
from backbone.errors import ConfigError
from backbone.matmul import dense
from backbone.mlp import Dense, Mlp, mlp

Array = jax.Array


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, over the last axis (Zhang and Sennrich, 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        wide = _wide(x)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps) * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        wide = _wide(x)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


class Attention(nn.Module):
    """Projections of grouped-query attention. q: [d, H*hd], k and v: [d, KH*hd], o: [H*hd, d].

    With qk_norm also the scales q_norm [H*hd] and k_norm [KH*hd], which the function `qkv` applies.
    """

    cfg: AttentionConfig
    hidden_size: int

    def setup(self):
        cfg = self.cfg
        self.q = Dense(cfg.num_heads * cfg.head_dim, cfg.qkv_bias)
        self.k = Dense(cfg.num_kv_heads * cfg.head_dim, cfg.qkv_bias)
        self.v = Dense(cfg.num_kv_heads * cfg.head_dim, cfg.qkv_bias)
        self.o = Dense(self.hidden_size, cfg.out_bias)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(0.0), RMSNorm(0.0)

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        return self.q(x), self.k(x), self.v(x)

    def __call__(self, x: Array) -> Array:
        """Touches every projection once: for `init` only."""
        q, k, v = self.qkv(x)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o(q) + k.sum() + v.sum()


class Block(nn.Module):
    """One layer's parameters; only `init` is used, the forward pass is `block` below."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        make_norm = LayerNorm if self.cfg.norm == 'layer' else RMSNorm
        x = x + Attention(self.cfg.attention, self.cfg.hidden_size, name='attn')(
            make_norm(self.cfg.norm_eps, name='attn_norm')(x))
        normed = make_norm(self.cfg.norm_eps, name='mlp_norm')(x)
        if self.cfg.moe is not None:
            return x + moe.Moe(self.cfg, name='moe')(normed)
        return x + Mlp(self.cfg.mlp, self.cfg.hidden_size, name='mlp')(normed)


# --- rotary positions -------------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Array:
    """Radians per position, [hd/2]; Llama-3 scaling stretches the slow ones and blends in between."""
    freqs = theta ** (-jnp.arange(0, head_dim, 2, dtype=float) / head_dim)  # as wide as the process is
    if scaling is None:
        return freqs
    turns = scaling.original_max_seq_len * freqs / (2 * jnp.pi)  # full turns within the original context
    blend = jnp.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return blend * freqs + (1 - blend) * freqs / scaling.factor


def rope_tables(cfg: AttentionConfig, positions: Array) -> tuple[Array, Array]:
    """cos, sin [B, S, 1, hd/2] for positions [B, S]."""
    angles = positions[..., None, None] * rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Half-split rotation of x [B, S, H, hd] (Su et al., 2021, in the Hugging Face layout)."""
    a, b = jnp.split(_wide(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


# 'dense': the einsum below; 'xla', 'cudnn': jax.nn.dot_product_attention, cudnn being the fused kernel of NVIDIA GPUs.
ATTENTION = ('dense', 'xla', 'cudnn')

# --- the pieces -------------------------------------------------------------------------------------------


@struct.dataclass
class Context:
    """What every layer of one pass shares.

    positions [B, S]: of the queries. mask [B, S, C]: True where query s may read slot c.
    rope: (cos, sin) or None. pos [B]: slot of the block's first token. native: packed for one CPU, so
    attention may run in C (backbone/native). attention: how whole sequences attend, see ATTENTION.
    query_chunk: attend to so many queries at a time, and again in the backward pass: S x S scores never exist.
    """

    positions: Array
    mask: Array
    rope: tuple[Array, Array] | None
    pos: Array | None = None
    native: bool = struct.field(pytree_node=False, default=False)
    attention: str = struct.field(pytree_node=False, default='dense')
    query_chunk: int = struct.field(pytree_node=False, default=0)


def make_context(cfg: ModelConfig, pos: Array, size: int, capacity: int, native: bool = False) -> Context:
    """Context of a block of `size` tokens at slots pos[b].. of a cache with `capacity` slots."""
    positions = pos[:, None] + jnp.arange(size)
    slots = jnp.arange(capacity)
    mask = slots <= positions[..., None]
    if cfg.attention.window is not None:
        mask &= slots > positions[..., None] - cfg.attention.window
    return Context(positions, mask, make_rope(cfg, positions), pos, native)


def make_rope(cfg: ModelConfig, positions: Array) -> tuple[Array, Array] | None:
    return rope_tables(cfg.attention, positions) if cfg.attention.position == 'rope' else None


def norm(cfg: ModelConfig, p: dict, x: Array) -> Array:
    module = LayerNorm(cfg.norm_eps) if cfg.norm == 'layer' else RMSNorm(cfg.norm_eps)
    return module.apply({'params': p}, x)


def qkv(cfg: ModelConfig, p: dict, x: Array, ctx: Context) -> tuple[Array, Array, Array]:
    """x [B, S, d] -> rotated q [B, S, H, hd], rotated k and v [B, S, KH, hd]. p: a layer's 'attn'."""
    att = cfg.attention
    if 'qkv' in p:  # fused for decoding, see backbone/layout.py
        h, kh = att.num_heads * att.head_dim, att.num_kv_heads * att.head_dim
        q, k, v = jnp.split(dense(p['qkv'], x), (h, h + kh), axis=-1)
    else:
        q, k, v = Attention(att, cfg.hidden_size).apply({'params': p}, x, method='qkv')
    if att.qk_norm:  # over the whole projection, before it is split into heads (OLMoE)
        q, k = (RMSNorm(cfg.norm_eps).apply({'params': p[name]}, a) for name, a in (('q_norm', q), ('k_norm', k)))
    q, k, v = (a.reshape(*a.shape[:2], -1, att.head_dim) for a in (q, k, v))
    if ctx.rope is not None:
        q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
    return q, k, v


def attend(q: Array, k: Array, v: Array, ctx: Context) -> Array:
    """q [B, S, H, hd] over k, v [B, KH, C, hd] under ctx.mask [B, S, C] -> [B, S, H, hd].

    A slot no query may read contributes nothing, even if it holds NaN.
    """
    if ctx.native and native.takes_attention(q, k):
        return jax.lax.platform_dependent(q, k, v, ctx.mask, cpu=native.attend, default=_attend)
    if ctx.attention != 'dense':
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return jax.nn.dot_product_attention(q, k, v, mask=ctx.mask[:, None], implementation=ctx.attention)
    size = q.shape[1]
    if not 0 < ctx.query_chunk < size:
        return _attend(q, k, v, ctx.mask)
    if size % ctx.query_chunk:
        raise ConfigError(f'query_chunk {ctx.query_chunk} does not divide {size} tokens')
    parts = jax.tree.map(lambda a: _chunks(a, ctx.query_chunk), (q, ctx.mask))
    some = jax.checkpoint(lambda part: _attend(part[0], k, v, part[1]), prevent_cse=False)
    return jax.lax.map(some, parts).swapaxes(0, 1).reshape(q.shape)


def _chunks(a: Array, size: int) -> Array:
    """[B, S, ...] -> [S/size, B, size, ...]."""
    return a.reshape(a.shape[0], -1, size, *a.shape[2:]).swapaxes(0, 1)


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    b, s, h, hd = q.shape
    kh = k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(b, s, kh, h // kh, hd).transpose(0, 2, 3, 1, 4).reshape(b, kh, -1, hd)
    scores = jnp.einsum('bkmh,bkch->bkmc', grouped.astype(k.dtype), k, preferred_element_type=wide) * hd**-0.5
    scores = jnp.where(mask[:, None, None], scores.reshape(b, kh, h // kh, s, -1), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, kh, -1, k.shape[2])
    live = mask.any(1)[:, None, :, None]
    heads = jnp.einsum('bkmc,bkch->bkmh', weights.astype(v.dtype), jnp.where(live, v, 0), preferred_element_type=wide)
    return heads.reshape(b, kh, h // kh, s, hd).transpose(0, 3, 1, 2, 4).reshape(b, s, h, hd).astype(q.dtype)


def out(cfg: ModelConfig, p: dict, heads: Array) -> Array:
    """heads [B, S, H, hd] -> [B, S, d]. p: a layer's 'attn'."""
    return dense(p['o'], heads.reshape(*heads.shape[:2], -1))


def feed(cfg: ModelConfig, p: dict, x: Array, neuron_mask: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """A whole layer's p: its MLP or its mixture of experts on x [B, S, d] -> [B, S, d], and its taps.

    Taps: of a mixture 'router' [B, S, E], float32 logits. neuron_mask: see `mlp`. Errors: ConfigError for a mask on a
    mixture, whose neurons have no single order.
    """
    if 'moe' not in p:
        return mlp(cfg, p['mlp'], x, neuron_mask), {}
    if neuron_mask is not None:
        raise ConfigError("masks['neurons']: not for a layer with a mixture of experts")
    routing = moe.route(cfg.moe, p['moe']['router'], x)
    return moe.apply(cfg, p['moe'], x, moe.fitting(cfg, x), routing), {'router': routing.logits}


def read_write(state: KVState | None, k: Array, v: Array, ctx: Context) -> tuple[Array, Array, KVState | None]:
    """Writes the block into `state` and gives the k, v [B, KH, C, hd] to attend over.

    Without a state the block attends over itself.
    """
    if state is None:
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), None
    state = write_kv(state, k, v, ctx.pos, ctx.native)
    return state.k, state.v, state


def block(cfg: ModelConfig, p: dict, x: Array, state: KVState | None, ctx: Context,
          extra: Any = None) -> tuple[Array, KVState | None, dict[str, Array]]:
    """The plain layer, and the model of a layer function for `run_layers`.

    x: the residual, any pytree a method likes (here [B, S, d]). extra: this layer's slice of what the
    caller stacked by layer (here the optional masks {'heads' [..., H], 'neurons' [..., F]}).
    Returns the residual, the state and the taps of this layer.
    """
    masks = extra or {}
    pre = cfg.norm_placement == 'pre'
    q, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], x) if pre else x, ctx)
    keys, values, state = read_write(state, k, v, ctx)
    heads = attend(q, keys, values, ctx)
    if 'heads' in masks:
        heads = heads * masks['heads'][..., None].astype(heads.dtype)
    mixed = out(cfg, p['attn'], heads)
    x = x + mixed if pre else norm(cfg, p['attn_norm'], x + mixed)
    y, seen = feed(cfg, p, norm(cfg, p['mlp_norm'], x) if pre else x, masks.get('neurons'))
    x = x + y if pre else norm(cfg, p['mlp_norm'], x + y)
    return x, state, {'attention': heads, 'mixer': mixed, **seen}
