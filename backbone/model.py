"""A model as pure functions over its parameters: embed, run layers, unembed.

Parameters are a plain dict. Layers are stacked on a leading axis (`layers` is a dict: run_layers scans)
or unstacked for decoding (`layers` is a tuple of dicts: run_layers unrolls, see backbone/layout.py).
The cache follows: one stacked state, or a tuple of states.

Taps, static names: `hidden:l` residual after l layers (0 = embedding), `hidden:last` after the final
norm, `attention:l` [B, S, H, hd] before the output projection of layer l, `mixer:l` [B, S, d] after it, `router:l`
[B, S, E] the logits by which a mixture of experts chose (float32; `moe.choose` gives the choice).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone import native
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.layers import Block, Context, block, make_context, make_rope, norm
from backbone.matmul import contract, dense

Array = jax.Array


def init_params(cfg: ModelConfig, rng: Array, dtype=jnp.float32) -> dict:
    """Random parameters (lecun normal kernels, N(0, 0.02) embeddings)."""
    keys = jax.random.split(rng, 6)
    width = cfg.embed_size or cfg.hidden_size
    normal = jax.nn.initializers.normal(0.02)
    embed = {'tokens': normal(keys[0], (cfg.vocab_size, width))}
    if cfg.attention.position == 'learned':
        embed['positions'] = normal(keys[1], (cfg.max_seq_len + cfg.position_offset, cfg.hidden_size))
    if cfg.embed_size is not None:
        embed['project_in'] = {'kernel': normal(keys[2], (width, cfg.hidden_size))}
        embed['project_out'] = {'kernel': normal(keys[3], (cfg.hidden_size, width))}
    x = jnp.zeros((1, 1, cfg.hidden_size))
    layers = jax.vmap(lambda key: Block(cfg).init(key, x)['params'])(jax.random.split(keys[4], cfg.num_layers))
    params = {'embed': embed, 'layers': layers}
    if cfg.has_final_norm:
        params['final_norm'] = jax.tree.map(lambda a: a[0], layers['mlp_norm'])
    if not cfg.tie_embeddings:
        params['lm_head'] = {'kernel': normal(keys[5], (width, cfg.vocab_size))}
    return jax.tree.map(lambda a: a.astype(dtype), params)


def abstract_params(cfg: ModelConfig, dtype=jnp.float32) -> dict:
    """Shapes and dtypes of the parameters, at no cost in memory."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0), dtype))


def embed(cfg: ModelConfig, params: dict, tokens: Array, positions: Array) -> Array:
    """tokens, positions [B, S] -> residual [B, S, d], in the dtype of the norms."""
    table = params['embed']
    x = token_rows(params, tokens).astype(jax.tree.leaves(_any_norm(params))[0].dtype)
    if cfg.embed_scale is not None:
        x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    if 'project_in' in table:
        x = dense(table['project_in'], x)
    if 'positions' in table:
        x = x + table['positions'][positions + cfg.position_offset].astype(x.dtype)
    return x


def token_rows(params: dict, ids: Array) -> Array:
    """Embedding rows of ids [B, S]. Packed for a CPU they are taken in C: XLA:CPU gathers from bfloat16 by way of
    a float32 copy of the whole table."""
    table = params['embed']['tokens']
    packed = 'kernel_t' in params.get('lm_head', {})
    if not (packed and table.dtype == jnp.bfloat16 and native.available()):
        return table[ids]
    flat = jax.lax.platform_dependent(table, ids.reshape(-1), cpu=native.rows,
                                      default=lambda t, i: t[i].astype(jnp.float32))
    return flat.reshape(*ids.shape, -1)


def _any_norm(params: dict) -> dict:
    layers = params['layers']
    return (layers[0] if isinstance(layers, (tuple, list)) else layers)['attn_norm']


def finish(cfg: ModelConfig, params: dict, x: Array) -> Array:
    """Residual [..., d] -> the hidden state the head reads (final norm)."""
    return norm(cfg, params['final_norm'], x) if cfg.has_final_norm else x


def unembed(cfg: ModelConfig, params: dict, hidden: Array) -> Array:
    """Hidden state after `finish` [..., d] -> logits [..., V], at least float32."""
    if 'project_out' in params['embed']:
        hidden = dense(params['embed']['project_out'], hidden)
    if 'lm_head' in params:
        return dense(params['lm_head'], hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)))
    return contract(hidden, params['embed']['tokens'], 1)


def run_layers(cfg: ModelConfig, params: dict, x: Any, state: Any, ctx: Context, lo: int = 0, hi: int | None = None,
               skip: Any = (), layer_fn: Callable = block, extra: Any = None,
               taps: tuple[str, ...] = ()) -> tuple[Any, Any, dict[str, Array]]:
    """Layers lo..hi-1 on the residual x (any pytree the layer function takes).

    skip: a static tuple of layer numbers to leave out, or a traced bool vector [num_layers] (True = skip;
    the work is still done, but the compiled function serves every choice).
    extra: a pytree with a leading layer axis, handed slice by slice to layer_fn; for unstacked layers also a tuple with
    one a layer. It may end with layer hi-1.
    state: the cache's `layers`, or None. Returns residual, state and taps.
    """
    hi = cfg.num_layers if hi is None else hi
    if not 0 <= lo <= hi <= cfg.num_layers:
        raise ConfigError(f'layers {lo}..{hi} are outside 0..{cfg.num_layers}')
    wanted = _parse_taps(cfg, taps)
    if isinstance(params['layers'], (tuple, list)):
        return _unrolled(cfg, params['layers'], x, state, ctx, lo, hi, skip, layer_fn, extra, wanted)
    return _scanned(cfg, params['layers'], x, state, ctx, lo, hi, skip, layer_fn, extra, wanted)


def _parse_taps(cfg: ModelConfig, taps: tuple[str, ...]) -> list[tuple[str, str, int]]:
    wanted = []
    for tap in taps:
        kind, _, index = tap.partition(':')
        if tap == 'hidden:last':
            continue
        limit = cfg.num_layers if kind == 'hidden' else cfg.num_layers - 1
        kinds = ('hidden', 'attention', 'mixer') + (('router',) if cfg.moe is not None else ())
        if kind not in kinds or not index.isdigit() or int(index) > limit:
            raise ConfigError(f'unknown tap {tap!r} of a model with {cfg.num_layers} layers')
        wanted.append((tap, kind, int(index)))
    return wanted


def _unrolled(cfg, layers, x, state, ctx, lo, hi, skip, layer_fn, extra, wanted):
    found = {tap: x for tap, kind, l in wanted if kind == 'hidden' and l == lo}
    state = None if state is None else list(state)
    static = isinstance(skip, tuple)
    for l in range(lo, hi):
        if not (static and l in skip):
            before = x
            x, new, seen = layer_fn(cfg, layers[l], x, None if state is None else state[l], ctx,
                                    extra[l] if isinstance(extra, tuple) else _slice(extra, l))
            if not static:
                x = jax.tree.map(lambda a, b: jnp.where(skip[l], a, b), before, x)
            if state is not None:
                state[l] = new
            found |= {tap: seen[kind] for tap, kind, i in wanted if kind != 'hidden' and i == l}
        found |= {tap: x for tap, kind, i in wanted if kind == 'hidden' and i == l + 1}
    return x, None if state is None else tuple(state), found


def _slice(tree: Any, l: int) -> Any:
    return jax.tree.map(lambda a: a[l], tree)


def _scanned(cfg, layers, x, state, ctx, lo, hi, skip, layer_fn, extra, wanted):
    static = isinstance(skip, tuple)
    runs = _runs(lo, hi, skip if static else ())
    kinds = sorted({kind for _, kind, _ in wanted})
    found = {tap: x for tap, kind, l in wanted if kind == 'hidden' and l == lo}

    def step(x, per_layer):
        p, s, e, skipped = per_layer
        y, s, seen = layer_fn(cfg, p, x, s, ctx, e)
        if not static:
            y = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), x, y)
        seen = seen | {'hidden': y}
        return y, (s, {kind: seen[kind] for kind in kinds})

    for first, last, run in runs:
        if run:
            part = lambda tree: jax.tree.map(lambda a: a[first:last], tree)
            flags = None if static else skip[first:last]
            x, (new, seen) = jax.lax.scan(step, x, (part(layers), part(state), part(extra), flags))
            if state is not None:
                whole = (first, last) == (0, cfg.num_layers)
                state = new if whole else jax.tree.map(lambda a, b: a.at[first:last].set(b), state, new)
        for tap, kind, l in wanted:
            at = l - 1 if kind == 'hidden' else l
            if first <= at < last and (run or kind == 'hidden'):
                found[tap] = jax.tree.map(lambda a: a[at - first], seen[kind]) if run else x
    return x, state, found


def _runs(lo: int, hi: int, skip: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Splits layers lo..hi-1 into (first, last, run?): neighbours that are all run or all skipped."""
    runs = []
    for run, group in itertools.groupby(range(lo, hi), lambda l: l not in skip):
        numbers = list(group)
        runs.append((numbers[0], numbers[-1] + 1, run))
    return runs


def hidden_states(cfg: ModelConfig, params: dict, tokens: Array, *, segments: Array | None = None,
                  positions: Array | None = None, layer_fn: Callable = block, extra: Any = None,
                  attention: str = 'dense', query_chunk: int = 0) -> Array:
    """Final hidden states [B, S, d] of whole sequences [B, S], without a cache: what `unembed` takes.

    segments [B, S]: document ids; a token attends within its own document. positions [B, S]: default 0..S-1.
    attention, query_chunk: see layers.Context.
    """
    return hidden_and_taps(cfg, params, tokens, (), segments=segments, positions=positions, layer_fn=layer_fn,
                           extra=extra, attention=attention, query_chunk=query_chunk)[0]


def hidden_and_taps(cfg: ModelConfig, params: dict, tokens: Array, taps: tuple[str, ...], *,
                    segments: Array | None = None, positions: Array | None = None, layer_fn: Callable = block,
                    extra: Any = None, attention: str = 'dense',
                    query_chunk: int = 0) -> tuple[Array, dict[str, Array]]:
    """`hidden_states`, and what the taps saw on the way."""
    ctx = sequence_context(cfg, tokens.shape, segments, positions, attention, query_chunk)
    x = embed(cfg, params, tokens, ctx.positions)
    x, _, found = run_layers(cfg, params, x, None, ctx, layer_fn=layer_fn, extra=extra, taps=taps)
    return finish(cfg, params, x), found


def sequence_context(cfg: ModelConfig, shape: tuple[int, int], segments: Array | None = None,
                     positions: Array | None = None, attention: str = 'dense', query_chunk: int = 0) -> Context:
    """Context of whole sequences of `shape` [B, S]; arguments as in `hidden_states`."""
    batch, size = shape
    ctx = make_context(cfg, jnp.zeros((batch,), jnp.int32), size, size)
    ctx = ctx.replace(attention=attention, query_chunk=query_chunk)
    if positions is not None:
        ctx = ctx.replace(positions=positions, rope=make_rope(cfg, positions))
    if segments is not None:
        ctx = ctx.replace(mask=ctx.mask & (segments[:, :, None] == segments[:, None, :]))
    return ctx


def forward(cfg: ModelConfig, params: dict, tokens: Array, **options: Any) -> Array:
    """Logits [B, S, V] of whole sequences [B, S], without a cache. options: those of `hidden_states`."""
    return unembed(cfg, params, hidden_states(cfg, params, tokens, **options))


@dataclasses.dataclass(frozen=True)
class PlainTarget:
    """The model itself as a Target of the contract. `stacked` says how its parameters are laid out."""

    cfg: ModelConfig
    cache_dtype: str = 'float32'
    stacked: bool = True
    exact: bool = True
    reference: Any = None

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """max_len slots: what a block writes past them is dropped, and no kept token reads it."""
        del block  # only windowed and recurrent states need room for a rejected block
        kv = caches.init_kv(self.cfg, batch, max_len, self.cache_dtype, self.stacked)
        return caches.init_cache(kv, batch, max_len)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: dict[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        cfg, base = self.cfg, params['base']
        ctx = cache_context(cfg, cache, tokens.shape[1])
        if resume is None:
            x, lo = embed(cfg, base, tokens, ctx.positions), 0
        else:
            x, lo = resume.hidden, resume.layer
        x, layers, found = run_layers(cfg, base, x, cache.layers, ctx, lo=lo, extra=masks, taps=taps)
        hidden = finish(cfg, base, x)
        if 'hidden:last' in taps:
            found['hidden:last'] = hidden
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        cache = caches.write_tokens(cache.replace(layers=layers), tokens)
        return Output(tokens, unembed(cfg, base, hidden), cache, found)


def cache_context(cfg: ModelConfig, cache: caches.Cache, size: int) -> Context:
    """Context of the next `size` tokens of a cache."""
    unstacked = isinstance(cache.layers, tuple)  # packed for decoding on one device
    return make_context(cfg, cache.pos, size, cache.tokens.shape[1] - 1, native=unstacked)
