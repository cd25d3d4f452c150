"""The hybrid: a base of which some attentions have given way to Mamba-2 mixers.

    kept layer       h + Attention(norm(h))     then  h + MLP(norm(h))
    replaced layer   h + Mixer(norm(h))         then  h + MLP(norm(h)), with the base's norms and MLP

After Hoshino et al., 2025 (arXiv 2505.22135), whose body could not be read. Parameters {'base': the whole base, 'rad':
{'mixers': ...}}, each leaf of the mixers with a leading axis in the order of RadConfig.layers, or as they decode
(rad/target.py) a tuple of mixers. The base keeps the attentions that were replaced: the same tree is the hybrid and the
model it came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.layers import Context, attend, block, feed, norm, out, qkv, read_write
from backbone.mamba2 import mix_and_heads
from backbone.model import embed, finish, run_layers, sequence_context, unembed
from rad.config import RadConfig

Array = jax.Array


def replaced_layer(rcfg: RadConfig, last: Array | None = None, segments: Array | None = None) -> Callable:
    """The layer function of a replaced layer: `extra` is its mixer, its state an SsmState ({'kv', 'ssm'} of the
    parallel control). last, segments: see backbone.mamba2.mix. Tap 'attention': what the output projection reads."""
    def layer(cfg: ModelConfig, p: dict, x: Array, state: Any, ctx: Context, mixer: dict):
        normed = norm(cfg, p['attn_norm'], x)
        own = state['ssm'] if rcfg.parallel and state is not None else state
        mixed, own, heads = mix_and_heads(rcfg.ssm, mixer, normed, own, pos=ctx.pos, last=last, segments=segments)
        if rcfg.parallel:
            q, k, v = qkv(cfg, p['attn'], normed, ctx)
            keys, values, kv = read_write(None if state is None else state['kv'], k, v, ctx)
            heads = attend(q, keys, values, ctx)
            mixed = out(cfg, p['attn'], heads) + mixed
            own = None if state is None else {'kv': kv, 'ssm': own}
        x = x + mixed
        y, seen = feed(cfg, p, norm(cfg, p['mlp_norm'], x))
        return x + y, own, {'attention': heads, 'mixer': mixed, **seen}

    return layer


def partly_replaced_layer(rcfg: RadConfig, segments: Array | None = None) -> Callable:
    """The same where `extra` is {'mixer', 'active'}: a traced `active` says whether the attention has given way yet.
    Both are run. Whole sequences only."""
    new_layer = replaced_layer(rcfg, segments=segments)

    def layer(cfg: ModelConfig, p: dict, x: Array, state: None, ctx: Context, extra: dict):
        new, _, said = new_layer(cfg, p, x, state, ctx, extra['mixer'])
        old, _, seen = block(cfg, p, x, state, ctx)
        pick = lambda a, b: jnp.where(extra['active'], a, b)
        return pick(new, old), None, {'mixer': pick(said['mixer'], seen['mixer'])}

    return layer


def run(cfg: ModelConfig, rcfg: RadConfig, params: dict, x: Array, state: tuple | None, ctx: Context, *, lo: int = 0,
        taps: tuple[str, ...] = (), last: Array | None = None, segments: Array | None = None, remat: bool = False,
        active: Array | None = None, wrap: Callable | None = None) -> tuple[Array, tuple | None, dict[str, Array]]:
    """Layers lo.. on the residual x [B, S, d] -> (residual, state, taps). state: one a layer, or None. remat: every
    layer runs again in the backward pass; or wrap: makes another layer function of one, in its place. active [k]: see
    partly_replaced_layer. Taps: those of backbone.model but 'hidden:last'; hidden:l from l = lo on."""
    layers = params['base']['layers']
    _, _, found = run_layers(cfg, params['base'], x, None, ctx, lo=lo, hi=lo, taps=taps)  # or says which tap is unknown
    stacked = not isinstance(layers, (tuple, list))
    if stacked and state is not None:  # states differ by layer, so the layers are run one by one
        layers, stacked = tuple(_part(layers, l) for l in range(cfg.num_layers)), False
    functions = {False: block, True: replaced_layer(rcfg, last, segments)}
    if active is not None:
        functions[True] = partly_replaced_layer(rcfg, segments)
    if wrap is not None:
        functions = {kind: wrap(f) for kind, f in functions.items()}
    elif remat:
        functions = {kind: jax.checkpoint(f, static_argnums=0, prevent_cse=not stacked)
                     for kind, f in functions.items()}
    for first, end, is_replaced in _runs(cfg, rcfg, lo):
        view = cfg.replace(num_layers=end - first)
        part = None if state is None else state[first:end]
        extra = mixers(rcfg, params, first, end) if is_replaced else None
        if is_replaced and active is not None:
            start = rcfg.layers.index(first)
            extra = {'mixer': extra, 'active': active[start:start + end - first]}
        names = {name: tap for tap in taps if (name := _within(tap, first, end)) is not None}
        x, part, seen = run_layers(view, {'layers': _part(layers, slice(first, end))}, x, part, ctx,
                                   layer_fn=functions[is_replaced], extra=extra, taps=tuple(names))
        found |= {names[name]: value for name, value in seen.items()}
        if state is not None:
            state = (*state[:first], *part, *state[end:])
    return x, state, found


def mixers(rcfg: RadConfig, params: dict, first: int, end: int) -> Any:
    """Those of layers first..end-1, all of them replaced: a leading axis, or a tuple."""
    start = rcfg.layers.index(first)
    return _part(params['rad']['mixers'], slice(start, start + end - first))


def _part(tree: Any, at: Any) -> Any:
    return tree[at] if isinstance(tree, (tuple, list)) else jax.tree.map(lambda a: a[at], tree)


def _runs(cfg: ModelConfig, rcfg: RadConfig, lo: int) -> list[tuple[int, int, bool]]:
    """(first, end, replaced?) of neighbours of one kind: stacked, each run is a scan."""
    runs = []
    for is_replaced, group in itertools.groupby(range(lo, cfg.num_layers), lambda l: l in rcfg.layers):
        numbers = list(group)
        runs.append((numbers[0], numbers[-1] + 1, is_replaced))
    return runs


def _within(tap: str, first: int, end: int) -> str | None:
    """The tap's name in a run of layers first..end-1; None where it lies in another."""
    if tap == 'hidden:last':
        return None
    kind, _, index = tap.partition(':')
    inside = first <= int(index) <= end if kind == 'hidden' else first <= int(index) < end
    return f'{kind}:{int(index) - first}' if inside else None


def hidden_states(cfg: ModelConfig, rcfg: RadConfig, params: dict, tokens: Array, *, segments: Array | None = None,
                  positions: Array | None = None, lo: int = 0, hidden: Array | None = None, remat: bool = False,
                  attention: str = 'dense', query_chunk: int = 0, active: Array | None = None,
                  wrap: Callable | None = None) -> Array:
    """Final hidden states [B, S, d] of whole sequences [B, S], without a cache: what `unembed` takes.

    segments [B, S]: document ids; attention, states and convolutions begin anew with each. positions: default 0..S-1.
    lo, hidden [B, S, d]: the residual after `lo` layers, where those have run already (below the first replaced layer
    they are the base's). attention, query_chunk: see layers.Context. remat, active, wrap: see `run`.
    """
    return hidden_and_taps(cfg, rcfg, params, tokens, (), segments=segments, positions=positions, lo=lo, hidden=hidden,
                           remat=remat, attention=attention, query_chunk=query_chunk, active=active, wrap=wrap)[0]


def hidden_and_taps(cfg: ModelConfig, rcfg: RadConfig, params: dict, tokens: Array, taps: tuple[str, ...], *,
                    segments: Array | None = None, positions: Array | None = None, lo: int = 0,
                    hidden: Array | None = None, remat: bool = False, attention: str = 'dense', query_chunk: int = 0,
                    active: Array | None = None, wrap: Callable | None = None) -> tuple[Array, dict[str, Array]]:
    """`hidden_states`, and what the taps saw on the way."""
    ctx = sequence_context(cfg, tokens.shape, segments, positions, attention, query_chunk)
    x = embed(cfg, params['base'], tokens, ctx.positions) if hidden is None else hidden
    x, _, found = run(cfg, rcfg, params, x, None, ctx, lo=lo, taps=taps, segments=segments, remat=remat, active=active,
                      wrap=wrap)
    return finish(cfg, params['base'], x), found


def forward(cfg: ModelConfig, rcfg: RadConfig, params: dict, tokens: Array, **options: Any) -> Array:
    """Logits [B, S, V] of whole sequences [B, S]. options: those of `hidden_states`."""
    return unembed(cfg, params['base'], hidden_states(cfg, rcfg, params, tokens, **options))
