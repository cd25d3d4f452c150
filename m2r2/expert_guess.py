"""Which experts a later layer will want: what the two runtimes ask, and predictors that need no training.

After the attention of layer l, a predictor scores the experts of each layer in `targets(l)`. Predictions only move
bytes: routing is always the slow stream's, so a wrong one costs time and never a bit of the output.

One protocol serves the runtime that Python drives (m2r2/expert_runtime.py) and the one inside a jit
(m2r2/expert_mesh.py): everything below is traced, and a predictor is a frozen static argument. Our reading of
Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not public in full.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import moe
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, norm

Array = jax.Array


@struct.dataclass
class View:
    """What a prediction may look at. slow [B, S, d]: the residual after the attention of this layer. stream: the
    predictor's own, beside it. memory: of the target layer. positions [B, S]. layer: number of the target, traced."""

    slow: Array
    stream: Any
    memory: Any
    positions: Array
    layer: Array


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Looks `lead` layers ahead. Subclasses give `scores`; the rest is for those with a stream or a memory."""

    lead: int = 1

    def __post_init__(self):
        if self.lead < 1:
            raise ConfigError(f'predictor.lead must be at least 1, got {self.lead}')

    def targets(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Layers scored after the attention of `layer`; static."""
        return (layer + self.lead,) if layer + self.lead < num_layers else ()

    def init(self, cfg: ModelConfig, mine: Any, batch: int, capacity: int) -> tuple:
        """Memory before the first token, one pytree a layer. mine: params.get('prefetch')."""
        del mine, batch, capacity
        return ((),) * cfg.num_layers

    def restarts(self, layer: int) -> bool:
        """Whether the stream begins anew with this layer; static."""
        del layer
        return False

    def layer_params(self, mine: Any, layer: int) -> Any:
        """The predictor's parameters of one layer."""
        del mine, layer
        return ()

    def begin(self, mine: Any, slow: Array) -> Any:
        """The stream at the input of a layer that restarts it, from the slow one [B, S, d]."""
        del mine, slow
        return ()

    def beside(self, cfg: ModelConfig, p: dict, mine: Any, stream: Any, keys: Array, values: Array,
               ctx: Context) -> Any:
        """One layer of the stream, on the slow stream's keys and values [B, KH, C, hd]. p: the layer without its
        experts. mine: `layer_params`."""
        del cfg, p, mine, keys, values, ctx
        return stream

    def scores(self, cfg: ModelConfig, target: dict, mine: Any, view: View) -> Array:
        """[B, S, E], higher is likelier. target: {'mlp_norm', 'router'} of the target layer. mine: `layer_params`."""
        raise NotImplementedError

    def remember(self, memory: Any, ids: Array, live: Array) -> Any:
        """Memory of a layer after it has routed to ids [B, S, K]; live [B, S]: tokens that count."""
        del ids, live
        return memory


@dataclasses.dataclass(frozen=True)
class NextRouter(Predictor):
    """The target's own norm and router on this layer's residual: residuals change slowly. Untrained."""

    def scores(self, cfg, target, mine, view):
        return moe.route(cfg.moe, target['router'], norm(cfg, target['mlp_norm'], view.slow)).logits


def _counts(ids: Array, live: Array, num_experts: int) -> Array:
    return (jax.nn.one_hot(ids, num_experts, dtype=jnp.float32) * live[..., None, None]).sum((0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Previous(Predictor):
    """What the layer wanted in the pass before. decay: how much older passes still count (0: not at all)."""

    decay: float = 0.0

    def init(self, cfg, mine, batch, capacity):
        return tuple(jnp.zeros((cfg.moe.num_experts,), jnp.float32) for _ in range(cfg.num_layers))

    def scores(self, cfg, target, mine, view):
        return jnp.broadcast_to(jnp.log(view.memory + 1e-3), (*view.positions.shape, cfg.moe.num_experts))

    def remember(self, memory, ids, live):
        return self.decay * memory + _counts(ids, live, memory.shape[0])


def frequency(lead: int = 1) -> Previous:
    """What the layer has wanted most often so far."""
    return Previous(lead, decay=1.0)


@dataclasses.dataclass(frozen=True)
class Random(Predictor):
    """Any experts, by token position and layer."""

    seed: int = 0

    def scores(self, cfg, target, mine, view):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), view.layer), view.positions[0, 0])
        return jax.random.normal(key, (*view.positions.shape, cfg.moe.num_experts))


@dataclasses.dataclass(frozen=True)
class Recorded(Predictor):
    """An oracle: the recorded ids of the very tokens being run, mine = {'trace': [L, B, C, K] by position}.

    worst: an adversary, which asks for every expert but these.
    """

    worst: bool = False

    def init(self, cfg, mine, batch, capacity):
        trace = jnp.asarray((mine or {}).get('trace', jnp.zeros((0,))))
        if trace.ndim != 4 or trace.shape[:2] != (cfg.num_layers, batch):
            raise ConfigError(f"predictor recorded: params['prefetch']['trace'] must be [{cfg.num_layers}, {batch}, "
                              f'positions, experts_per_token], got {list(trace.shape)}')
        return tuple(trace)

    def scores(self, cfg, target, mine, view):
        rows = jnp.arange(view.positions.shape[0])[:, None]
        ids = view.memory[rows, jnp.minimum(view.positions, view.memory.shape[1] - 1)]  # -1: not recorded
        chosen = 20.0 * jax.nn.one_hot(ids, cfg.moe.num_experts, dtype=jnp.float32).sum(-2)
        return -chosen if self.worst else chosen


def pick(scores: Array, live: Array, count: int) -> tuple[Array, Array]:
    """scores [B, S, E] -> the `count` experts that the live tokens together want most: ids [count], weights [count]."""
    share = jnp.where(live[..., None], jax.nn.softmax(scores.astype(jnp.float32), -1), 0).sum((0, 1))
    weights, ids = jax.lax.top_k(share, count)
    return ids.astype(jnp.int32), weights


def look_ahead(cfg: ModelConfig, predictor: Predictor, mine: Any, targets: tuple, slow: Array, stream: Any,
               ctx: Context, live: Array, count: int) -> tuple[tuple[Array, Array], ...]:
    """`pick` for each target. targets: (parameters {'mlp_norm', 'router'}, memory, layer number)."""
    views = (View(slow, stream, memory, ctx.positions, layer) for _, memory, layer in targets)
    return tuple(pick(predictor.scores(cfg, p, mine, view), live, count)
                 for (p, _, _), view in zip(targets, views, strict=True))
