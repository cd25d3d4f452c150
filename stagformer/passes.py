"""A block of tokens through a cache: one pass a stack, as in prefill and verification.

Stack s needs what the stack below says of earlier tokens of the same block, so the stacks follow one another here;
one token at a time they need not (step.py).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.cache import KVState
from backbone.layers import Context, make_context
from backbone.matmul import dense, product
from backbone.model import embed, run_layers
from stagformer import state as states
from stagformer.config import StagFormerConfig
from stagformer.model import CrossState, context_of, cross_keys, cross_rope, heads_of, stack_layers, staggered_layer

Array = jax.Array


def run(cfg: StagFormerConfig, params: dict, tokens: Array, cache: caches.Cache, form: str,
        last: Array | None = None) -> tuple[list[Array], dict[str, Any]]:
    """tokens [B, S] -> (residual [B, S, d] of every stack, state). last [B]: index of the block's last token that is
    no padding (default S - 1). form: of params and cache.layers (layout.py, state.py)."""
    ctx = make_context(cfg.base, cache.pos, tokens.shape[1], cache.tokens.shape[1] - 1, native=form == 'tuple')
    state = cache.layers if form != 'arrays' else states.to_tuple(cache.layers, cfg.stacks)
    end = cache.pos + (tokens.shape[1] - 1 if last is None else last)
    x = token_rows(cfg, params, tokens, ctx.positions)
    outputs: list[Array] = []
    own, read = list(state['self']), list(state['cross'])
    for s in range(cfg.stacks):
        layers = stack_view(cfg, params, s, form)
        view = cfg.base.replace(num_layers=cfg.depths[s])
        if s == 0:
            h, own[s], _ = run_layers(view, {'layers': layers}, x, own[s], ctx)
            outputs.append(h)
            continue
        contexts = [context_of(cfg, params, i, outputs[i]) for i in cfg.sources(s)]
        new = publish(cfg, params, s, layers, contexts, ctx, form)
        if cfg.window is None:  # the strict mask hides what the block should not see of itself
            read[s - 1] = write(form, read[s - 1], new, cache.pos, end, ctx.native)
        both = together(form, own[s], CrossState(read[s - 1], () if cfg.window is None else new))
        h, both, _ = run_layers(view, {'layers': layers}, x, both, ctx,
                                layer_fn=staggered_layer(cfg, lambda p, seen: seen_by(cfg, seen, ctx)))
        own[s] = own_part(form, both)
        if cfg.window is not None:  # a ring would lose what the block's first tokens still read
            read[s - 1] = write(form, read[s - 1], new, cache.pos, end, ctx.native)
        outputs.append(h)
    state = {'self': tuple(own), 'cross': tuple(read)}
    return outputs, state if form != 'arrays' else states.to_arrays(state)


def token_rows(cfg: StagFormerConfig, params: dict, tokens: Array, positions: Array) -> Array:
    """Embeddings [B, S, d]; the layers that backbone's `embed` looks at for its dtype may lie side by side here."""
    base = params['base']
    first = base['layers'] if isinstance(base['layers'], dict) else base['layers'][0]
    first = first[0] if isinstance(first, tuple) else first
    return embed(cfg.base, base | {'layers': (first,)}, tokens, positions)


def stack_view(cfg: StagFormerConfig, params: dict, s: int, form: str) -> Any:
    """Layers of stack s as run_layers takes them, with their cross-attention."""
    if form == 'storage':
        return stack_layers(cfg, params, s)
    pick = lambda side, at: side[at] if isinstance(side, tuple) else jax.tree.map(lambda a: a[at], side)
    found = []
    for k in range(cfg.depths[s]):
        # Uneven stacks: a layer's tuple holds only those that are so deep.
        at = sum(depth > k for depth in cfg.depths[:s])
        layer = params['base']['layers'][k]
        layer = layer if cfg.shared else pick(layer, at)
        if s:
            at = sum(depth > k for depth in cfg.depths[1:s])
            layer = layer | {'cross': pick(params['stagformer']['cross'][k], at)}
        found.append(layer)
    return tuple(found)


def publish(cfg: StagFormerConfig, params: dict, s: int, layers: Any, contexts: list[Array], ctx: Context,
             form: str) -> tuple[Any, ...]:
    """Keys and values of what stack s reads, one item a source: leading layer axis, or a tuple of layers."""
    rope = cross_rope(cfg, ctx.rope)
    if form == 'storage':
        kernels = {name: layers['cross'][name] for name in ('k', 'v')}
        return tuple(jax.vmap(lambda p, i=i, c=c: cross_keys(cfg, jax.tree.map(lambda a: a[i], p), c, rope))(kernels)
                     for i, c in enumerate(contexts))
    kernels = params['stagformer']['publish']
    if isinstance(kernels, tuple):
        return tuple(published(cfg, p, c, rope) for p, c in zip(kernels[s - 1], contexts, strict=True))
    return (published(cfg, jax.tree.map(lambda a: a[s - 1], kernels), contexts[0], rope),)


def published(cfg: StagFormerConfig, p: dict, context: Array, rope: tuple[Array, Array] | None) -> tuple[KVState, ...]:
    """Keys and values [B, S, KH, hd] of every layer of a stack, from context [B, S, d] in one product with
    p: kernel [d, depth * 2 * KH * hd], or [d, depth * 2, KH * hd]."""
    if 'kernel' in p and p['kernel'].ndim == 3:
        pairs = list(product('bsd,dlw->lbsw', context, p['kernel']).astype(context.dtype))
    else:
        pairs = jnp.split(dense(p, context), dense_width(p) // (cfg.kv_heads * cfg.base.attention.head_dim), axis=-1)
    return tuple(KVState(heads_of(cfg, k, rope), heads_of(cfg, v, None))
                 for k, v in zip(pairs[::2], pairs[1::2], strict=True))


def dense_width(p: dict) -> int:
    return p['kernel'].shape[-1] if 'kernel' in p else p['kernel_t'].shape[0]


def seen_by(cfg: StagFormerConfig, state: CrossState, ctx: Context) -> tuple[Array, Array, Array]:
    """k, v [B, KH, C, hd] and mask [B, S, C] of everything in a layer's state: its memories, then the block itself."""
    parts = [(m.k, m.v, states.remembered(cfg, m, ctx.positions, ctx.pos)) for m in state.memory]
    for new in state.fresh:
        dtype = parts[0][0].dtype
        visible = states.sees(cfg, ctx.positions[..., None], ctx.positions[:, None])
        parts.append((new.k.transpose(0, 2, 1, 3).astype(dtype), new.v.transpose(0, 2, 1, 3).astype(dtype), visible))
    if len(parts) == 1:
        return parts[0]
    k, v, mask = zip(*parts, strict=True)
    return jnp.concatenate(k, 2), jnp.concatenate(v, 2), jnp.concatenate(mask, -1)


def together(form: str, own: Any, cross: CrossState) -> Any:
    """A stack's state as run_layers takes it: {'self', 'cross'} with a leading layer axis, or one a layer."""
    if form == 'storage':
        return {'self': own, 'cross': cross}
    layers = range(len(own))
    return tuple({'self': own[k], 'cross': CrossState(tuple(m[k] for m in cross.memory),
                                                      tuple(f[k] for f in cross.fresh))} for k in layers)


def own_part(form: str, both: Any) -> Any:
    return both['self'] if form == 'storage' else tuple(layer['self'] for layer in both)


def write(form: str, memories: tuple[Any, ...], new: tuple[Any, ...], pos: Array, last: Array,
          native: bool) -> tuple[Any, ...]:
    """Writes what `publish` gave into a stack's memories, source by source and layer by layer."""
    put = lambda memory, kv: states.write(memory, kv, pos, last, native)
    layers = jax.vmap(put) if form == 'storage' else lambda memory, kv: tuple(map(put, memory, kv))
    return tuple(map(layers, memories, new))
