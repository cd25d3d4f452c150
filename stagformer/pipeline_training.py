"""Training with one stack a stage: while stage s runs microbatch m, the stage below runs microbatch m + 1.

Every stage embeds the tokens itself, so the only thing that goes from stage to stage is the context: the residual
[rows, S, d] that the stage below ended with, a collective-permute a tick. M microbatches take M + p - 1 ticks; the
share (p - 1)/(M + p - 1) of them is idle, as in GPipe (Huang et al., 2019). The backward pass is what autodiff makes of
the schedule: the same one in reverse.

Stacks lie on a leading axis, which is the mesh's 'stage' axis where there is one (backbone/mesh.py puts a plain tree's
layers there); without one the same function gives the same numbers on one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from backbone.errors import ConfigError
from backbone.model import embed, run_layers, sequence_context
from stagformer import layout, pipeline
from stagformer.config import StagFormerConfig
from stagformer.model import Wrap, context_of, looking_at, sees, staggered_layer

Array = jax.Array


def check(cfg: StagFormerConfig, micro: int) -> None:
    """Errors: ConfigError for a model whose stacks cannot be stages, or no number of microbatches."""
    layout.check_form(cfg, 'staged')
    if micro < 1:
        raise ConfigError(f'microbatches must be at least 1, got {micro}')


def final_outputs(cfg: StagFormerConfig, params: dict, tokens: Array, micro: int, *, segments: Array | None = None,
                  positions: Array | None = None, attention: str = 'dense', query_chunk: int = 0,
                  wrap: Wrap = lambda layer: layer) -> Array:
    """What the final norm reads, [B, S, d], of whole sequences [B, S] in `micro` microbatches: model.mixed of
    model.stack_outputs. Other arguments: as there. Errors: ConfigError for rows that do not divide, a mesh whose stage
    axis is neither 1 nor the number of stacks."""
    rows, size = tokens.shape
    if rows % micro:
        raise ConfigError(f'{rows} rows are not {micro} microbatches of equal size')
    mesh = jax.sharding.get_abstract_mesh()
    staged = not mesh.empty and mesh.shape['stage'] > 1
    if staged and mesh.shape['stage'] != cfg.stacks:
        raise ConfigError(f'{cfg.stacks} stacks need a mesh of stage={cfg.stacks} or 1, got {mesh.shape["stage"]}')
    here = lambda a: jax.lax.with_sharding_constraint(a, P('stage', *(P.UNCONSTRAINED,) * (a.ndim - 1)))
    pin = here if staged else lambda a: a
    stages = jax.tree.map(pin, stage_params(cfg, params))
    view, index = cfg.base.replace(num_layers=cfg.depths[0]), jnp.arange(cfg.stacks)
    # Rows a, a + micro, ... make a microbatch: each device keeps its own rows.
    apart = lambda a: a.reshape(-1, micro, size).swapaxes(0, 1)
    batch = {name: apart(a) for name, a in (('tokens', tokens), ('segments', segments), ('positions', positions))
             if a is not None}

    def stage(p: dict, inbox: Array, turn: Array) -> Array:
        mine = {name: a[jnp.clip(turn, 0, micro - 1)] for name, a in batch.items()}
        ctx = sequence_context(cfg.base, mine['tokens'].shape, mine.get('segments'), mine.get('positions'), attention,
                               query_chunk)
        at = jnp.arange(size)
        mask = jnp.broadcast_to(sees(cfg, at[:, None], at), ctx.mask.shape)
        if segments is not None:
            mask &= mine['segments'][:, :, None] == mine['segments'][:, None, :]
        context = context_of(cfg, {'stagformer': p}, 0, inbox)
        x = embed(cfg.base, params['base'], mine['tokens'], ctx.positions)
        layer_fn = wrap(staggered_layer(cfg, looking_at(cfg, [context], mask, ctx)))
        return run_layers(view, p, x, None, ctx, layer_fn=layer_fn)[0]

    together = jax.vmap(stage, spmd_axis_name='stage' if staged else None)

    def tick(inbox: Array, t: Array) -> tuple[Array, Array]:
        h = pin(together(stages, inbox, t - index))
        return pin(pipeline.shifted(h)), h

    dtype = jax.tree.leaves(params['base']['layers']['attn_norm'])[0].dtype
    empty = pin(jnp.zeros((cfg.stacks, rows // micro, size, cfg.base.hidden_size), dtype))
    _, said = jax.lax.scan(tick, empty, jnp.arange(micro + cfg.stacks - 1))  # [ticks, p, rows / micro, S, d]
    # Stage s said microbatch m at tick m + s.
    outputs = pin(jax.vmap(lambda h, s: jax.lax.dynamic_slice_in_dim(h, s, micro, 0), (1, 0))(said, index))
    weights = params['stagformer']['mix'] if cfg.mix else jax.nn.one_hot(cfg.stacks - 1, cfg.stacks)
    total = jnp.einsum('s,smbtd->bmtd', weights.astype(dtype), outputs)
    return over_stages(total.reshape(rows, size, -1))


def stage_params(cfg: StagFormerConfig, params: dict) -> dict[str, Any]:
    """Parameters as they are stored, by stage: 'layers' [p, depth, ...] with their cross-attention (that of the first
    stage is zero and adds nothing) and 'context_norm' [p, 1, d], of what the stage is handed."""
    p, depth = cfg.stacks, cfg.depths[0]
    deal = (lambda a: jnp.broadcast_to(a, (p, *a.shape))) if cfg.shared else lambda a: a.reshape(p, depth, *a.shape[1:])
    own = jax.tree.map(deal, params['base']['layers'])
    cross = {name: jax.tree.map(lambda a: a.reshape(p - 1, depth, *(1,) * (name in 'kv'), *a.shape[1:]), tree)
             for name, tree in params['stagformer']['cross'].items()}
    cross = jax.tree.map(lambda a: jnp.pad(a, [(1, 0)] + [(0, 0)] * (a.ndim - 1)), cross)
    found = {'layers': own | {'cross': cross}}
    if cfg.context_norm:
        found['context_norm'] = jax.tree.map(lambda a: jnp.concatenate([a[:1], a])[:, None],
                                             params['stagformer']['context_norm'])
    return found


def over_stages(x: Array) -> Array:
    """Rows of x [B, ...] split over the stages too: what follows the stacks is then not done by each of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape['data'] * mesh.shape['stage']):
        return x
    return jax.lax.with_sharding_constraint(x, P(('data', 'stage'), *(P.UNCONSTRAINED,) * (x.ndim - 1)))
