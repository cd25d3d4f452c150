"""One token a row through all stacks at once: layer k of every stack, then layer k + 1.

Nothing inside the loop over layers depends on another stack. What the stacks said is handed over after it: their keys
and values, for all layers of whoever reads them in one product, are written where the next step will look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.layers import Context, attend, make_context, mlp, norm, out, qkv, read_write
from stagformer import state as states
from stagformer.config import StagFormerConfig
from stagformer.model import CrossState, context_of, cross, cross_rope
from stagformer.passes import published, seen_by, token_rows

Array = jax.Array
Side = Any  # one value a stack, side by side: a tuple of them, or a pytree with a leading stack axis


def each(fn: Callable, first: Side, *rest: Side) -> Side:
    """fn of every stack's values, side by side. first says which form they have."""
    if isinstance(first, tuple):
        return tuple(fn(*args) for args in zip(first, *rest, strict=True))
    return jax.vmap(fn)(first, *rest)


def weigh(layer: Any, fn: Callable, x: Side, shared: bool) -> Side:
    """fn(a stack's layer, its x [B, 1, ...]); where they share one layer its weights are read once for all of them."""
    if not shared:
        return each(lambda x, p: fn(p, x), x, layer)
    tupled = isinstance(x, tuple)
    rows = jnp.concatenate(x) if tupled else x.reshape(-1, *x.shape[2:])
    stacks = len(x)
    split = jax.tree.map(lambda a: a.reshape(stacks, -1, *a.shape[1:]), fn(layer, rows))
    return tuple(jax.tree.map(lambda a: a[s], split) for s in range(stacks)) if tupled else split


def run(cfg: StagFormerConfig, params: dict, tokens: Array, cache: caches.Cache,
        form: str) -> tuple[Side, dict[str, Any]]:
    """tokens [B, 1] -> (residual [B, 1, d] of every stack, state). form: 'tuple' or 'arrays'."""
    ctx = make_context(cfg.base, cache.pos, 1, cache.tokens.shape[1] - 1, native=form == 'tuple')
    x = token_rows(cfg, params, tokens, ctx.positions)
    steps = in_arrays if form == 'arrays' else _in_tuples
    return steps(cfg, params, x, cache, ctx)


def _in_tuples(cfg, params, x, cache, ctx):
    outputs = [x] * cfg.stacks
    own = [list(stack) for stack in cache.layers['self']]
    read = [[list(source) for source in stack] for stack in cache.layers['cross']]
    for k in range(max(cfg.depths)):
        deep = [s for s in range(cfg.stacks) if cfg.depths[s] > k]
        above = [s for s in deep if s > 0]
        found, memory = layer_of_all(
            cfg, params['base']['layers'][k], params['stagformer']['cross'][k] if above else (),
            tuple(outputs[s] for s in deep), tuple(own[s][k] for s in deep),
            tuple(tuple(source[k] for source in read[s - 1]) for s in above), ctx)
        for s, h, m in zip(deep, found, memory, strict=True):
            outputs[s], own[s][k] = h, m
    for s in range(1, cfg.stacks):
        for at, source in enumerate(cfg.sources(s)):
            context = context_of(cfg, params, source, outputs[source])
            new = published(cfg, params['stagformer']['publish'][s - 1][at], context, cross_rope(cfg, ctx.rope))
            read[s - 1][at] = [states.write(m, kv, cache.pos, cache.pos, ctx.native)
                               for m, kv in zip(read[s - 1][at], new, strict=True)]
    return tuple(outputs), {'self': tuple(map(tuple, own)), 'cross': tuple(tuple(map(tuple, r)) for r in read)}


def in_arrays(cfg: StagFormerConfig, params: dict, x: Array, cache: caches.Cache, ctx: Context,
              hand: Callable[[Array], Array] = lambda h: h[:-1]) -> tuple[Array, dict[str, Any]]:
    """x [B, 1, d], the embedding -> (residual [p, B, 1, d], state); parameters and state have a leading stack axis.

    hand: outputs [p, B, 1, d] -> what each cross-attending stack reads next, in their order: without stages the output
    of the stack below, with them a shift between neighbours (pipeline.py).
    """
    own, read, mine = list(cache.layers['self']), list(cache.layers['cross']), params['stagformer']
    x = jnp.broadcast_to(x, (own[0].k.shape[0], *x.shape))
    for k, layer in enumerate(params['base']['layers']):
        x, own[k] = layer_of_all(cfg, layer, mine['cross'][k], x, own[k], (read[k],), ctx)
    context = hand(x)
    if cfg.context_norm:
        context = jax.vmap(lambda p, h: norm(cfg.base, p, h))(mine['context_norm'], context)
    new = jax.vmap(lambda p, h: published(cfg, p, h, cross_rope(cfg, ctx.rope)))(mine['publish'], context)
    write = jax.vmap(lambda memory, kv: states.write(memory, kv, cache.pos, cache.pos))
    return x, {'self': tuple(own), 'cross': tuple(map(write, read, new))}


def layer_of_all(cfg: StagFormerConfig, layer: Any, crosses: Side, x: Side, own: Side, read: Any,
                 ctx: Context) -> tuple[Side, Side]:
    """Layer k of the stacks that have one, side by side. x [B, 1, d] and own (KVState) of each; crosses (parameters)
    and read (what they attend to) of the last of them that cross-attend. Returns x and own."""
    base = cfg.base
    wide = ctx if not cfg.shared or ctx.rope is None else ctx.replace(
        rope=jax.tree.map(lambda a: jnp.tile(a, (len(x), 1, 1, 1)), ctx.rope))

    def projections(p, x):
        return dict(zip('qkv', qkv(base, p['attn'], norm(base, p['attn_norm'], x), wide), strict=True))

    def attention(new, memory):
        keys, values, memory = read_write(memory, new['k'], new['v'], ctx)
        return {'heads': attend(new['q'], keys, values, ctx), 'memory': memory}

    done = each(attention, weigh(layer, projections, x, cfg.shared), own)
    heads, own = _part(done, 'heads'), _part(done, 'memory')
    x = _plus(x, weigh(layer, lambda p, h: out(base, p['attn'], h), heads, cfg.shared))
    count = len(crosses) if isinstance(crosses, tuple) else jax.tree.leaves(crosses)[0].shape[0]
    if count:
        rest = len(x) - count
        delta = each(lambda x, p, memory: cross(cfg, p, x, *seen_by(cfg, CrossState(memory), ctx), ctx),
                     x[rest:], crosses, read)
        upper = _plus(x[rest:], delta)
        x = upper if not rest else x[:rest] + upper if isinstance(x, tuple) else jnp.concatenate([x[:rest], upper])
    return _plus(x, weigh(layer, lambda p, x: mlp(base, p['mlp'], norm(base, p['mlp_norm'], x)), x, cfg.shared)), own


def _part(side: Side, name: str) -> Side:
    return tuple(item[name] for item in side) if isinstance(side, tuple) else side[name]


def _plus(a: Side, b: Side) -> Side:
    return jax.tree.map(jnp.add, a, b)
