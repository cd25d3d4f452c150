"""How much each attention head and each neuron matters for a loss: one example, one number a unit.

    plainact   sum_t |dl/dm[t, n]|      m: a mask of ones on the unit's output at token t; = sum_t |value * gradient|
    plainact_w neurons sum_i |W[n, i] dW[n, i]| of the up projection (the released code's form); heads as plainact
    fisher     mean_t (h dh)^2; of a head, over its channels (A dA)^2, squared before they are added
    l2norm     sqrt(sum_t h^2), AFTER the activation (the released code takes it before, where a dead unit scores high)
    gradnorm   heads sqrt(sum dA^2); neurons sqrt(sum_i dW[n, i]^2) of the up projection

A: a head's context before the output projection. h: a neuron after activation and gate. l: the mean loss of a row's
continuation. After Akhauri et al., 2024 (ShadowLLM, arXiv 2406.16635) and the code released with it. Neurons by their
activation, SwiGLU, GQA and spans are ours.

Controls, for comparison only:
    snip   heads sum |dl/dOut| over H slices of the layer's attention output: after the projection a slice belongs to no
           head. Neurons sum_t |dz| before the activation: a gradient without the value says nothing of removal.
    grasp  -m (H g) of masks on whole rows, with the right second derivative (the released one is marked wrong by its
           authors). It asks how a removal changes the gradient's length, not the loss, and takes either sign.
    nwot   log of how many entries are not positive: a log-determinant over examples that one example degenerates; units
           that do nothing rank first.
The table's jacov and epenas have no value for one example, and synflow none that depends on the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, attend, block, norm, out, qkv
from backbone.losses import next_token_chunked
from backbone.matmul import dense
from backbone.mlp import activate
from backbone.model import embed, finish, run_layers, sequence_context, unembed
from sparsity.select import pool
from sparsity.spans import Spans

Array = jax.Array
CRITERIA = ('plainact', 'plainact_w', 'fisher', 'l2norm', 'gradnorm')
CONTROLS = ('snip', 'grasp', 'nwot')


@struct.dataclass
class Observed:
    """heads [B, C, L, H], neurons [B, C, L, F]: the scores of each span. context [B, C, L, H * hd]: every layer's
    attention before its output projection, residual [B, C, L, d]: what every layer was given, where a span asks."""

    heads: Array
    neurons: Array
    context: Array
    residual: Array


def score(cfg: ModelConfig, base: dict, batch: Mapping[str, Array], spans: Spans, criterion: str = 'plainact',
          **options: Any) -> Observed:
    """Of one criterion; arguments as `score_all`."""
    return score_all(cfg, base, batch, spans, (criterion,), **options)[criterion]


def score_all(cfg: ModelConfig, base: dict, batch: Mapping[str, Array], spans: Spans, names: Sequence[str] = CRITERIA,
              signed: bool = False, attention: str = 'dense', loss_chunk: int = 0) -> dict[str, Observed]:
    """Several criteria from one forward and one backward pass, by name.

    batch: rows as in docs/data.md ('tokens', 'targets', 'segments', 'positions' [B, T]).

    signed: of plainact, sum_t dl/dm without the absolute value: the loss that a unit's removal gains, to first order;
    tokens then cancel each other. Scores are per token only within one layer: [L, B, T, F] never exists.
    loss_chunk: so many positions at a time meet the vocabulary; 0: all. Errors: ConfigError.
    """
    if unknown := [name for name in names if name not in CRITERIA + CONTROLS]:
        raise ConfigError(f'criterion: unknown {unknown[0]!r}, one of {", ".join(CRITERIA + CONTROLS)}')
    if cfg.moe is not None or cfg.norm_placement != 'pre' or not isinstance(base['layers'], Mapping):
        raise ConfigError('criteria need plain layers, stacked, with norm_placement pre')
    if signed and tuple(names) != ('plainact',):
        raise ConfigError(f'signed is for plainact, not for {", ".join(names)}')
    ctx = sequence_context(cfg, batch['tokens'].shape, batch['segments'], batch['positions'], attention)

    def forward(cfg: ModelConfig, p: dict, x: Array, state: Array, ctx: Context, extra: None) -> tuple:
        y, _, seen = block(cfg, p, x, None, ctx)
        heads = seen['attention']
        taken = (x, _at(heads.reshape(*heads.shape[:2], -1), spans.at), _at(x, spans.at))
        return y, taken, {}

    nothing = jnp.zeros((cfg.num_layers, 0))  # a state, so that the scan hands each layer's out
    x = embed(cfg, base, batch['tokens'], ctx.positions)
    last, (inputs, context, residual), _ = run_layers(cfg, base, x, nothing, ctx, layer_fn=forward)

    share = spans.loss / jnp.maximum(spans.loss.sum(-1, keepdims=True), 1e-9)
    of_row = lambda h: next_token_chunked(lambda part: unembed(cfg, base, part), finish(cfg, base, h),
                                          batch['targets'], share, loss_chunk).nll  # sum over rows, which are apart
    by_values = tuple(name for name in names if name not in ('plainact', 'grasp'))

    def backward(g: Array, per_layer: tuple) -> tuple:
        p, x = per_layer
        found = {}
        if 'plainact' in names:
            before, found['plainact'] = _by_masks(cfg, p, x, ctx, g, spans.counted, signed)
        if by_values:
            before, more = _by_values(cfg, p, x, ctx, g, spans.counted, by_values)
            found |= more
        return before, found

    found = {}
    if set(names) != {'grasp'}:
        _, found = jax.lax.scan(backward, jax.grad(of_row)(last), (base['layers'], inputs), reverse=True)
    if 'grasp' in names:
        found['grasp'] = _grasp(cfg, base, batch, of_row, attention)
    by_span = lambda a: jnp.moveaxis(a, 0, 2)
    context, residual = by_span(context), by_span(residual)
    return {name: Observed(*map(by_span, found[name]), context, residual) for name in names}


def units(cfg: ModelConfig, seen: Observed, head_unit: str, block: int) -> dict[str, Array]:
    """{'heads': [B, C, L, H'], 'neurons': [B, C, L, NB]}: a group's score is the sum of its query heads', a block's of
    its neurons'."""
    group = cfg.attention.num_heads // cfg.attention.num_kv_heads if head_unit == 'kv_group' else 1
    return {'heads': pool(seen.heads, group), 'neurons': pool(seen.neurons, block)}


def _at(a: Array, at: Array) -> Array:
    """a [B, T, n] at positions [B, C] -> [B, C, n]."""
    return jnp.take_along_axis(a, at[..., None], 1)


def _wide(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _summed(a: Array, counted: Array) -> Array:
    """a [B, T, ...] summed over the tokens of each span -> [B, C, ...]."""
    return jnp.einsum('bt...,bct->bc...', a, counted.astype(a.dtype))


# One layer: x [B, T, d] is what it was given, g the gradient of what it gave -> (gradient of x, scores).


def _by_masks(cfg: ModelConfig, p: dict, x: Array, ctx: Context, g: Array, counted: Array, signed: bool
              ) -> tuple[Array, tuple[Array, Array]]:
    ones = {'heads': jnp.ones((*x.shape[:2], cfg.attention.num_heads), _wide(x).dtype),
            'neurons': jnp.ones((*x.shape[:2], cfg.mlp.intermediate_size), _wide(x).dtype)}
    _, back = jax.vjp(lambda x, masks: block(cfg, p, x, None, ctx, masks)[0], x, ones)
    g, by_mask = back(g)
    size = (lambda a: a) if signed else jnp.abs
    return g, (_summed(size(by_mask['heads']), counted), _summed(size(by_mask['neurons']), counted))


def _by_values(cfg: ModelConfig, p: dict, x: Array, ctx: Context, g: Array, counted: Array, names: tuple[str, ...]
               ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """From what is computed inside a layer, and its gradients: those of zeros added there."""
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype),
                         jax.eval_shape(lambda x: _opened(cfg, p, x, ctx, None)[1], x))
    _, back, values = jax.vjp(lambda x, probes: _opened(cfg, p, x, ctx, probes), x, zeros, has_aux=True)
    g, grads = back(g)
    values, grads = jax.tree.map(_wide, (values, grads))
    return g, {name: (_heads(cfg, name, values, grads, counted), _neurons(cfg, name, p, values, grads, counted))
               for name in names}


def _opened(cfg: ModelConfig, p: dict, x: Array, ctx: Context, probes: dict | None) -> tuple[Array, dict[str, Array]]:
    """The plain layer, and its insides: heads [B, T, H, hd], mixed and fed [B, T, d], gate and up (before activation)
    and neurons [B, T, F]. probes: added to them."""
    seen: dict[str, Array] = {}

    def here(name: str, a: Array) -> Array:
        seen[name] = a if probes is None else a + probes[name]
        return seen[name]

    q, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], x), ctx)
    heads = here('heads', attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), ctx))
    x = x + here('mixed', out(cfg, p['attn'], heads))
    normed = here('fed', norm(cfg, p['mlp_norm'], x))
    up = here('up', dense(p['mlp']['up'], normed))
    neurons = activate(cfg.mlp, here('gate', dense(p['mlp']['gate'], normed))) * up if cfg.mlp.gated else activate(
        cfg.mlp, up)
    return x + dense(p['mlp']['down'], here('neurons', neurons)), seen


def _heads(cfg: ModelConfig, criterion: str, value: dict, grad: dict, counted: Array) -> Array:
    """[B, C, H]."""
    a, da = value['heads'], grad['heads']
    if criterion == 'plainact_w':
        return _summed(jnp.abs((a * da).sum(-1)), counted)
    if criterion == 'fisher':
        return _summed(jnp.square(a * da).sum(-1), counted) / _count(counted)
    if criterion in ('l2norm', 'gradnorm'):
        return jnp.sqrt(_summed(jnp.square(a if criterion == 'l2norm' else da).sum(-1), counted))
    if criterion == 'nwot':
        return jnp.log(jnp.maximum(_summed((a <= 0).sum(-1).astype(a.dtype), counted), 0.5))
    if cfg.hidden_size % cfg.attention.num_heads:
        raise ConfigError(f'snip: {cfg.attention.num_heads} heads do not divide {cfg.hidden_size} channels')
    return _summed(pool(jnp.abs(grad['mixed']), cfg.hidden_size // cfg.attention.num_heads), counted)


def _neurons(cfg: ModelConfig, criterion: str, p: dict, value: dict, grad: dict, counted: Array) -> Array:
    """[B, C, F]."""
    h, before = value['neurons'], 'gate' if cfg.mlp.gated else 'up'
    if criterion == 'fisher':
        return _summed(jnp.square(h * grad['neurons']), counted) / _count(counted)
    if criterion == 'l2norm':
        return jnp.sqrt(_summed(jnp.square(h), counted))
    if criterion == 'nwot':
        return jnp.log(jnp.maximum(_summed((value[before] <= 0).astype(h.dtype), counted) / _count(counted), 1e-6))
    if criterion == 'snip':
        return _summed(jnp.abs(grad[before]), counted)
    kernel = _wide(p['mlp']['up']['kernel'])  # [d, F]
    measure = {'plainact_w': lambda dw: jnp.abs(kernel * dw).sum(0),
               'gradnorm': lambda dw: jnp.sqrt(jnp.square(dw).sum(0))}[criterion]
    # One matrix of weight gradients at a time: of one span.
    row = lambda x, du, spans: jax.lax.map(lambda some: measure((x * some[:, None]).T @ du), spans.astype(x.dtype))
    return jax.lax.map(lambda of_row: row(*of_row), (value['fed'], grad['up'], counted))


def _count(counted: Array) -> Array:
    return jnp.maximum(counted.sum(-1, keepdims=True), 1)


def _grasp(cfg: ModelConfig, base: dict, batch: Mapping[str, Array], of_row: Callable, attention: str
           ) -> tuple[Array, Array]:
    """[L, B, 1, H], [L, B, 1, F], of masks on whole rows: spans are not looked at."""
    rows = len(batch['tokens'])
    masks = tuple(jnp.ones((cfg.num_layers, rows, 1, n)) for n in (cfg.attention.num_heads, cfg.mlp.intermediate_size))

    def loss(masks: tuple[Array, Array]) -> Array:
        ctx = sequence_context(cfg, batch['tokens'].shape, batch['segments'], batch['positions'], attention)
        x = embed(cfg, base, batch['tokens'], ctx.positions)
        x, _, _ = run_layers(cfg, base, x, None, ctx, extra=dict(zip(('heads', 'neurons'), masks, strict=True)))
        return of_row(x)

    slope = jax.grad(loss)
    return jax.tree.map(jnp.negative, jax.jvp(slope, (masks,), (slope(masks),))[1])
