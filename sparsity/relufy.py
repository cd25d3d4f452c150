"""A gated MLP with ReLU in the place of SiLU: most neurons are then exactly zero, and which ones depends on the input.

    down(relu(gate x) * up x)        where it was        down(silu(gate x) * up x)

The same weights, another function: the model has to be healed after the swap (relufy_task.py). What is natural about
its sparsity: a neuron that is zero may be left out and nothing changes, so a predictor has something true to predict.
Mirzadeh et al., 2023 (arXiv 2310.04564, "ReLU strikes back") swap and go on training; that it is healed by distillation
from the model it was, on that model's own text, is ours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, block, norm
from backbone.mlp import neurons
from backbone.model import embed, finish, run_layers, sequence_context

Array = jax.Array


def config(dense: ModelConfig) -> ModelConfig:
    """The shape of the relufied model: the same but for `mlp.activation`.

    Errors: ConfigError for a mixture of experts and for a model that has ReLU already."""
    if dense.moe is not None:
        raise ConfigError('moe: a mixture of experts is not relufied')
    if dense.mlp.activation == 'relu':
        raise ConfigError("mlp.activation: 'relu' already, there is nothing to swap")
    return dense.replace(mlp=dataclasses.replace(dense.mlp, activation='relu'))


def watched(cfg: ModelConfig, p: dict, x: dict[str, Array], state: Any, ctx: Context,
            extra: Array) -> tuple[dict[str, Array], Any, dict[str, Array]]:
    """A layer function: the plain layer, and what its neurons did, added up in the residual's own tree.

    x: 'hidden' [B, S, d]; 'zeros' and 'size' [B, S, L], the share of neurons that are exactly zero and their mean size.
    extra [L]: one at this layer. The neurons are made from the same values as in the layer: one computation for XLA.
    """
    hidden, state, seen = block(cfg, p, x['hidden'], state, ctx)
    pre = cfg.norm_placement == 'pre'
    mixed = x['hidden'] + seen['mixer']
    units = neurons(cfg, p['mlp'], norm(cfg, p['mlp_norm'] if pre else p['attn_norm'], mixed)).astype(jnp.float32)
    zeros, size = jnp.mean(units == 0, -1), jnp.mean(jnp.abs(units), -1)
    return {'hidden': hidden, 'zeros': x['zeros'] + zeros[..., None] * extra,
            'size': x['size'] + size[..., None] * extra}, state, {}


def run(cfg: ModelConfig, base: dict, tokens: Array, segments: Array | None = None, positions: Array | None = None,
        layer_fn: Any = watched, attention: str = 'dense', query_chunk: int = 0) -> tuple[Array, Array, Array]:
    """(final hidden states [B, S, d], zeros [B, S, L], size [B, S, L]) of whole sequences [B, S], see `watched`, which
    `layer_fn` may wrap."""
    ctx = sequence_context(cfg, tokens.shape, segments, positions, attention, query_chunk)
    nothing = jnp.zeros((*tokens.shape, cfg.num_layers))
    x = {'hidden': embed(cfg, base, tokens, ctx.positions), 'zeros': nothing, 'size': nothing}
    x, _, _ = run_layers(cfg, base, x, None, ctx, layer_fn=layer_fn, extra=jnp.eye(cfg.num_layers))
    return finish(cfg, base, x['hidden']), x['zeros'], x['size']


@functools.partial(jax.jit, static_argnums=0)
def natural_sparsity(cfg: ModelConfig, base: dict, tokens: Array) -> Array:
    """Share of neurons that are exactly zero, by layer [L], mean over the tokens [B, S]. base: stacked."""
    return run(cfg, base, tokens)[1].mean((0, 1))
