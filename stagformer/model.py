"""The staggered model as pure functions: its parameters, its layer, and a pass over whole sequences.

    stack 1:      u = layers(embedding)                                      h1 = u
    stack s > 1:  v = layers(embedding; cross-attention to h(s-1) at earlier positions)
    logits:       head(norm(h_p)), or of a learned sum of all h_s

Each layer of a stack above the first is self-attention, cross-attention, MLP, every one with its norm and its residual.
Position i reads context positions up to i - 1; the first token of a document has none, and gets exactly 0.
Cutler et al., StagFormer (2025, arXiv 2501.15665); what the paper leaves open is a field of StagFormerConfig.

Parameters: 'base' is a plain model's tree, and stack s a slice of its layers (all of them where shared), so whatever
reads, shards or stores plain models takes it. 'stagformer' is
    cross: norm {scale [N, d]}, q [N, d, H*hd], k and v [M, d, KH*hd], o [N, H*hd, d]
    context_norm: {scale [p - 1, d]}, one for each stack that others read       mix: [p], where cfg.mix
with N = cfg.cross_layers running stack by stack and M = cfg.cross_sources, within a stack, source by source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.cache import KVState
from backbone.layers import Context, Dense, attend, block, mlp, norm, out, qkv, read_write, rotate
from backbone.matmul import dense
from backbone.model import embed, finish, run_layers, sequence_context, unembed
from backbone.model import init_params as init_base
from stagformer.config import StagFormerConfig

Array = jax.Array
Wrap = Callable[[Callable], Callable]


def init_params(cfg: StagFormerConfig, rng: Array, dtype=jnp.float32) -> dict:
    """Random parameters, as the plain model's (backbone/model.py)."""
    base_rng, *keys = jax.random.split(rng, 5)
    base = init_base(cfg.base, base_rng, dtype)
    if cfg.stacks == 1:
        return {'base': base, 'stagformer': {}}
    att, d, layers = cfg.base.attention, cfg.base.hidden_size, cfg.cross_layers

    def kernels(key, count, into, out_of):
        init = lambda k: Dense(out_of).init(k, jnp.zeros((1, into)))['params']
        return jax.tree.map(lambda a: a.astype(dtype), jax.vmap(init)(jax.random.split(key, count)))

    def norms(count):
        one = jax.tree.map(lambda a: a[0], base['layers']['mlp_norm'])
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), one)

    width = cfg.kv_heads * att.head_dim
    cross = {'norm': norms(layers), 'q': kernels(keys[0], layers, d, att.num_heads * att.head_dim),
             'k': kernels(keys[1], cfg.cross_sources, d, width), 'v': kernels(keys[2], cfg.cross_sources, d, width),
             'o': kernels(keys[3], layers, att.num_heads * att.head_dim, d)}
    if cfg.zero_init:
        cross['o'] = jax.tree.map(jnp.zeros_like, cross['o'])
    found: dict[str, Any] = {'cross': cross}
    if cfg.context_norm:
        found['context_norm'] = norms(cfg.stacks - 1)
    if cfg.mix:
        found['mix'] = jnp.zeros((cfg.stacks,), dtype).at[-1].set(1)
    return {'base': base, 'stagformer': found}


def stack_layers(cfg: StagFormerConfig, params: dict, s: int) -> dict:
    """The layers of stack s, leading axis its depth; above the first stack each has 'cross', k and v [sources, ...]."""
    depths, depth = cfg.depths, cfg.depths[s]
    first = 0 if cfg.shared else sum(depths[:s])
    layers = jax.tree.map(lambda a: a[first:first + depth], params['base']['layers'])
    if s == 0:
        return layers
    at, sources = sum(depths[1:s]), len(cfg.sources(s))
    at_source = sum(depths[i] * len(cfg.sources(i)) for i in range(1, s))

    def by_layer(a: Array) -> Array:
        return a[at_source:at_source + depth * sources].reshape(sources, depth, *a.shape[1:]).swapaxes(0, 1)

    cross = params['stagformer']['cross']
    mine = {name: jax.tree.map(lambda a: a[at:at + depth], cross[name]) for name in ('norm', 'q', 'o')}
    return layers | {'cross': mine | {name: jax.tree.map(by_layer, cross[name]) for name in ('k', 'v')}}


# --- the pieces of a layer --------------------------------------------------------------------------------------------


@struct.dataclass
class CrossState:
    """What one layer knows of its context in a pass with a cache, one item for each stack it reads.

    memory: KVState, which has the block's own positions already, or WindowState, which has not. fresh: the block's
    own k and v [B, S, KH, hd], beside a ring.
    """

    memory: tuple[Any, ...]
    fresh: tuple[KVState, ...] = ()


def context_of(cfg: StagFormerConfig, params: dict, s: int, h: Array) -> Array:
    """Output h [B, S, d] of stack s as others read it."""
    if not cfg.context_norm:
        return h
    return norm(cfg.base, jax.tree.map(lambda a: a[s], params['stagformer']['context_norm']), h)


def cross_rope(cfg: StagFormerConfig, rope: tuple[Array, Array] | None) -> tuple[Array, Array] | None:
    return rope if cfg.cross_rope else None


def heads_of(cfg: StagFormerConfig, x: Array, rope: tuple[Array, Array] | None) -> Array:
    """[B, S, n*hd] -> [B, S, n, hd], rotated where there is a rope."""
    x = x.reshape(*x.shape[:2], -1, cfg.base.attention.head_dim)
    return x if rope is None else rotate(x, *rope)


def cross_keys(cfg: StagFormerConfig, p: dict, context: Array, rope: tuple[Array, Array] | None) -> KVState:
    """Keys and values [B, S, KH, hd] of a context [B, S, d]. p: k and v of one layer and source."""
    return KVState(heads_of(cfg, dense(p['k'], context), rope), heads_of(cfg, dense(p['v'], context), None))


def cross(cfg: StagFormerConfig, p: dict, x: Array, k: Array, v: Array, mask: Array, ctx: Context) -> Array:
    """Cross-attention of x [B, S, d] to k, v [B, KH, C, hd] under mask [B, S, C] -> [B, S, d].

    A query that sees nothing gets exactly 0, and no gradient: not the mean of what it may not see, which is what a
    softmax over equal masked scores would give it. p: a layer's 'cross'.
    """
    q = heads_of(cfg, dense(p['q'], norm(cfg.base, p['norm'], x)), cross_rope(cfg, ctx.rope))
    seen = mask.any(-1, keepdims=True)
    some = mask | (~seen & (jnp.arange(mask.shape[-1]) == 0))  # a softmax needs one slot; what comes of it is dropped
    heads = attend(q, k, v, ctx.replace(mask=some))
    return out(cfg.base, p, jnp.where(seen[..., None], heads, 0))


def staggered_layer(cfg: StagFormerConfig, look: Callable[[dict, Any], tuple[Array, Array, Array]]) -> Callable:
    """The layer function (backbone/layers.py, `block`) of the stacks above the first.

    look(p, state) -> k, v [B, KH, C, hd] and mask [B, S, C]: what the cross-attention of a layer sees.
    state: None, or {'self': KVState, 'cross': CrossState}.
    """

    def layer(base, p, x, state, ctx, extra=None):
        mine, theirs = (None, None) if state is None else (state['self'], state['cross'])
        q, k, v = qkv(base, p['attn'], norm(base, p['attn_norm'], x), ctx)
        keys, values, mine = read_write(mine, k, v, ctx)
        heads = attend(q, keys, values, ctx)
        mixed = out(base, p['attn'], heads)
        x = x + mixed
        x = x + cross(cfg, p['cross'], x, *look(p['cross'], theirs), ctx)
        x = x + mlp(base, p['mlp'], norm(base, p['mlp_norm'], x))
        return x, None if state is None else {'self': mine, 'cross': theirs}, {'attention': heads, 'mixer': mixed}

    return layer


# --- whole sequences --------------------------------------------------------------------------------------------------


def sees(cfg: StagFormerConfig, query: Array, key: Array) -> Array:
    """Whether position `query` reads context position `key` (broadcast)."""
    latest = query - cfg.lag
    return (key <= latest) if cfg.window is None else (key <= latest) & (key > latest - cfg.window)


def stack_outputs(cfg: StagFormerConfig, params: dict, tokens: Array, *, segments: Array | None = None,
                  positions: Array | None = None, attention: str = 'dense', query_chunk: int = 0,
                  wrap: Wrap = lambda layer: layer) -> list[Array]:
    """Final residual [B, S, d] of every stack, of whole sequences [B, S], one stack after the other.

    segments, positions, attention, query_chunk: as in backbone.model.hidden_states. wrap: of each layer function.
    """
    ctx = sequence_context(cfg.base, tokens.shape, segments, positions, attention, query_chunk)
    index = jnp.arange(tokens.shape[1])
    mask = jnp.broadcast_to(sees(cfg, index[:, None], index), ctx.mask.shape)
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    x = embed(cfg.base, params['base'], tokens, ctx.positions)
    found: list[Array] = []
    for s, depth in enumerate(cfg.depths):
        layer_fn = block if s == 0 else staggered_layer(cfg, looking_at(
            cfg, [context_of(cfg, params, i, found[i]) for i in cfg.sources(s)], mask, ctx))
        h, _, _ = run_layers(cfg.base.replace(num_layers=depth), {'layers': stack_layers(cfg, params, s)}, x, None, ctx,
                             layer_fn=wrap(layer_fn))
        found.append(h)
    return found


def looking_at(cfg: StagFormerConfig, contexts: Sequence[Array], mask: Array, ctx: Context) -> Callable:
    """The `look` of a pass without a cache: every layer projects the whole contexts."""
    mask = jnp.concatenate([mask] * len(contexts), -1)

    def look(p, state):
        del state
        found = [cross_keys(cfg, {name: jax.tree.map(lambda a: a[i], p[name]) for name in ('k', 'v')}, context,
                            cross_rope(cfg, ctx.rope)) for i, context in enumerate(contexts)]
        k, v = (jnp.concatenate(parts, 1).transpose(0, 2, 1, 3) for parts in
                ([kv.k for kv in found], [kv.v for kv in found]))
        return k, v, mask

    return look


def mixed(cfg: StagFormerConfig, params: dict, outputs: Sequence[Array] | Array) -> Array:
    """Outputs of all stacks, [p] of [..., d] -> what the head's norm reads."""
    if not cfg.mix:
        return outputs[-1]
    weights = params['stagformer']['mix'].astype(outputs[0].dtype)
    return sum(weights[s] * outputs[s] for s in range(cfg.stacks))


def hidden_states(cfg: StagFormerConfig, params: dict, tokens: Array, **options: Any) -> Array:
    """Final hidden states [B, S, d] of whole sequences: what `unembed` takes. options: those of stack_outputs."""
    return finish(cfg.base, params['base'], mixed(cfg, params, stack_outputs(cfg, params, tokens, **options)))


def forward(cfg: StagFormerConfig, params: dict, tokens: Array, **options: Any) -> Array:
    """Logits [B, S, V] of whole sequences [B, S], without a cache."""
    return unembed(cfg.base, params['base'], hidden_states(cfg, params, tokens, **options))
