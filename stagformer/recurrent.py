"""Recurrent decoding: after the prompt only the last pass runs, and its own outputs are its context.

Shared weights only; an approximation at inference of a model trained with two passes (StagFormer, section 3.2). What
the prompt left as context stays: pass 1's outputs. The first step after a prompt reads nothing else, so it is exact.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.cache import ahead
from backbone.layers import make_context
from backbone.model import run_layers
from stagformer import passes
from stagformer import state as states
from stagformer.config import StagFormerConfig
from stagformer.model import CrossState, context_of, staggered_layer

Array = jax.Array


def run(cfg: StagFormerConfig, params: dict, tokens: Array, cache: caches.Cache,
        form: str) -> tuple[list[Array], dict[str, Any]]:
    """tokens [B, S] -> (residual [B, S, d] of the last stack as the only one, state). A block is S steps: what a token
    reads is what the last pass said of the token before."""
    outputs, layers = [], cache.layers
    for i in range(tokens.shape[1]):
        h, layers = _step(cfg, params, tokens[:, i:i + 1], ahead(cache.replace(layers=layers), i), form)
        outputs.append(h)
    return [jnp.concatenate(outputs, axis=1)], layers


def _step(cfg, params, tokens, cache, form):
    ctx = make_context(cfg.base, cache.pos, 1, cache.tokens.shape[1] - 1, native=form == 'tuple')
    state = cache.layers if form != 'arrays' else states.to_tuple(cache.layers, cfg.stacks)
    last = cfg.stacks - 1
    layers = passes.stack_view(cfg, params, last, form)
    view = cfg.base.replace(num_layers=cfg.depths[last])
    x = passes.token_rows(cfg, params, tokens, ctx.positions)
    own, read = list(state['self']), list(state['cross'])
    both = passes.together(form, own[last], CrossState(read[last - 1]))
    h, both, _ = run_layers(view, {'layers': layers}, x, both, ctx,
                            layer_fn=staggered_layer(cfg, lambda p, seen: passes.seen_by(cfg, seen, ctx)))
    own[last] = passes.own_part(form, both)
    # It stands where the pass below stood: under that one's norm.
    new = passes.publish(cfg, params, last, layers, [context_of(cfg, params, last - 1, h)], ctx, form)
    read[last - 1] = passes.write(form, read[last - 1], new, cache.pos, cache.pos, ctx.native)
    state = {'self': tuple(own), 'cross': tuple(read)}
    return h, state if form != 'arrays' else states.to_arrays(state)
