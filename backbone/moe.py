"""A mixture of experts in the place of an MLP: a router sends each token to some of many small MLPs.

Dropless: there is no capacity and no token is ever left out. What a token gets does not depend on its neighbours, but
for the rounding of products of another size.

Parameters of a layer: {'router': {'kernel' [d, E]}, 'experts': {'gate', 'up' [E, d, f], 'down' [E, f, d]}, 'shared': a
plain MLP's tree, where there is a shared expert}. Shazeer et al., 2017; routing as in Mixtral (Jiang et al., 2024) and
OLMoE (Muennighoff et al., 2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from backbone import matmul
from backbone.config import ModelConfig, MoeConfig
from backbone.errors import ConfigError
from backbone.mlp import Dense, Mlp, activate, glu, mlp

Array = jax.Array


@struct.dataclass
class Routing:
    """ids [..., K] int32: a token's experts, likeliest first. weights [..., K], logits [..., E]: at least float32."""

    ids: Array
    weights: Array
    logits: Array


class Moe(nn.Module):
    """One layer's parameters; only `init` is used, the forward pass is `apply` below."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        Dense(self.cfg.moe.num_experts, name='router')(x)
        Experts(self.cfg, name='experts')()
        if self.cfg.moe.shared_size:
            Mlp(_shared(self.cfg).mlp, self.cfg.hidden_size, name='shared')(x)
        return x


class Experts(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        e, d, f = self.cfg.moe.num_experts, self.cfg.hidden_size, self.cfg.mlp.intermediate_size
        normal = nn.initializers.lecun_normal(batch_axis=(0,))
        for name in ('gate', 'up') if self.cfg.mlp.gated else ('up',):
            self.param(name, normal, (e, d, f))
        self.param('down', normal, (e, f, d))


def _shared(cfg: ModelConfig) -> ModelConfig:
    return cfg.replace(mlp=dataclasses.replace(cfg.mlp, intermediate_size=cfg.moe.shared_size))


def route(moe: MoeConfig, router: dict, x: Array) -> Routing:
    """x [..., d] -> where each token goes. In (at least) float32 whatever the parameters are: a choice that rounding
    flips is another model's."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum('...d,de->...e', x.astype(wide), router['kernel'].astype(wide),
                        precision=jax.lax.Precision.HIGHEST)
    return choose(moe, logits)


def choose(moe: MoeConfig, logits: Array) -> Routing:
    """Routing by logits [..., E]: softmax over all experts, then the best K; of equals the lower id."""
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), moe.experts_per_token)
    if moe.norm_topk:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routing(ids.astype(jnp.int32), weights, logits)


def expert(cfg: ModelConfig, weights: dict, x: Array) -> Array:
    """One expert's MLP on x [..., d] -> [..., d]. weights: {'gate', 'up' [d, f], 'down' [f, d]}."""
    return _glu_mlp(cfg, weights, x, lambda a, kernel: matmul.dense({'kernel': kernel}, a))


def _glu_mlp(cfg: ModelConfig, weights: dict, x: Array, product: Any) -> Array:
    up = product(x, weights['up'])
    neurons = glu(cfg.mlp, product(x, weights['gate']), up) if cfg.mlp.gated else activate(cfg.mlp, up)
    return product(neurons, weights['down'])


def dense(cfg: ModelConfig, params: dict, x: Array, routing: Routing | None = None) -> Array:
    """The routed experts' sum, x [..., d] -> [..., d]: every expert on every token. The reference."""
    routing = route(cfg.moe, params['router'], x) if routing is None else routing
    every = jax.vmap(lambda weights: expert(cfg, weights, x))(params['experts'])
    share = (jax.nn.one_hot(routing.ids, cfg.moe.num_experts) * routing.weights[..., None]).sum(-2)
    return jnp.einsum('e...d,...e->...d', every.astype(share.dtype), share).astype(x.dtype)


def grouped(cfg: ModelConfig, params: dict, x: Array, routing: Routing | None = None) -> Array:
    """The same, each token through its own experts only: tokens sorted by expert, one ragged product a matrix.

    Under a mesh (`jax.set_mesh`) each device runs the tokens of its part of the batch through its own experts, and the
    contributions are summed: no expert's weights move.
    """
    routing = route(cfg.moe, params['router'], x) if routing is None else routing
    axes = _axes(cfg, x)
    if not axes:
        return _own(cfg, params['experts'], x, routing.ids, routing.weights)
    rows = P(axes.get('data'))
    into, out_of = (P(axes.get('expert'), None, axes.get('model')), P(axes.get('expert'), axes.get('model'), None))
    summed = tuple(a for a in ('expert', 'model') if a in axes)

    def local(experts: dict, x: Array, ids: Array, weights: Array) -> Array:
        own = experts['down'].shape[0]
        first = jax.lax.axis_index('expert') * own if 'expert' in axes else 0
        # Before the psum in float32: parts of one token's sum come from several devices.
        y = _own(cfg, experts, x, ids - first, weights, wide=True)
        return (jax.lax.psum(y, summed) if summed else y).astype(x.dtype)

    specs = {name: out_of if name == 'down' else into for name in params['experts']}
    return jax.shard_map(local, in_specs=(specs, rows, rows, rows), out_specs=rows, axis_names=set(axes))(
        params['experts'], x, routing.ids, routing.weights)


def _axes(cfg: ModelConfig, x: Array) -> dict[str, str]:
    """Which axes of the mesh in force split the work here: those that divide it and that nobody has taken yet."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    sizes = {'data': x.shape[0] if x.ndim > 1 else 1, 'expert': cfg.moe.num_experts,
             'model': cfg.mlp.intermediate_size}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis: axis for axis, size in sizes.items()
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 and kinds[axis] == AxisType.Auto}


def _own(cfg: ModelConfig, experts: dict, x: Array, ids: Array, weights: Array, wide: bool = False) -> Array:
    """What these experts [n, ...] add for x [..., d]; ids outside 0..n-1 are somebody else's and add nothing.

    wide: give the sum in float32, not in x's dtype.
    """
    count, k = experts['down'].shape[0], ids.shape[-1]
    tokens, flat = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
    mine = (flat >= 0) & (flat < count)
    flat = jnp.where(mine, flat, count)
    # Not argsort: its indices come from an iota, which shard_map takes to be the same on every device even when sorted
    # by what is not; gradients would be summed in one device's order.
    order = jax.lax.sort((flat, jnp.arange(flat.size) + 0 * flat), num_keys=1)[1]
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)

    def product(a: Array, kernel: Array) -> Array:
        out = jnp.promote_types(kernel.dtype, jnp.float32)
        return jax.lax.ragged_dot(a.astype(kernel.dtype), kernel, sizes, preferred_element_type=out).astype(x.dtype)

    done = _glu_mlp(cfg, experts, tokens[order // k], product)
    done = jnp.zeros_like(done).at[order].set(done, unique_indices=True)
    # What lies past the last group is not defined.
    done = jnp.where(mine[:, None], done, 0).reshape(*ids.shape, -1).astype(weights.dtype)
    y = jnp.einsum('...kd,...k->...d', done, weights)
    return y if wide else y.astype(x.dtype)


def gathered(cfg: ModelConfig, params: dict, x: Array, routing: Routing | None = None) -> Array:
    """The same for a few tokens: one chosen expert after the other, whose weights alone are read."""
    routing = route(cfg.moe, params['router'], x) if routing is None else routing
    k = cfg.moe.experts_per_token
    tokens = x.reshape(-1, x.shape[-1])

    def one(pair: tuple[Array, Array]) -> Array:
        i, e = pair
        return expert(cfg, jax.tree.map(lambda a: a[e], params['experts']), tokens[i // k, None])[0]

    ids = routing.ids.reshape(-1)
    done = jax.lax.map(one, (jnp.arange(ids.size), ids)).reshape(*routing.ids.shape, -1)
    return jnp.einsum('...kd,...k->...d', done.astype(routing.weights.dtype), routing.weights).astype(x.dtype)


IMPLEMENTATIONS = {'dense': dense, 'grouped': grouped, 'gathered': gathered}


def fitting(cfg: ModelConfig, x: Array) -> str:
    """The implementation for x [..., d]: 'gathered' where its tokens choose at most half of the experts, for a ragged
    product may read them all (XLA:CPU's does)."""
    pairs = x.size // x.shape[-1] * cfg.moe.experts_per_token
    return 'gathered' if 2 * pairs <= cfg.moe.num_experts and not _axes(cfg, x) else 'grouped'


def apply(cfg: ModelConfig, params: dict, x: Array, implementation: str = 'grouped',
          routing: Routing | None = None) -> Array:
    """The whole layer's mixture, x [..., d] -> [..., d]. routing: where it is known already.

    Errors: ConfigError for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f'implementation: unknown {implementation!r}, one of {", ".join(IMPLEMENTATIONS)}')
    y = IMPLEMENTATIONS[implementation](cfg, params, x, routing)
    return y + mlp(_shared(cfg), params['shared'], x) if 'shared' in params else y


def balance_loss(logits: Array, ids: Array, weights: Array | None = None) -> Array:
    """E * sum_e f_e P_e of one layer: f_e the share of tokens that went to expert e, P_e its mean probability.

    logits [..., E], ids [..., K], over the whole batch (under jit arrays are global, however they are spread); weights
    [...]: which tokens count. K where all experts are used alike, up to E. Fedus et al., 2021 (Switch Transformer,
    K = 1); OLMoE has the same with K > 1.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights = jnp.ones(ids.shape[:-1]) if weights is None else weights.astype(probabilities.dtype)
    total = jnp.maximum(weights.sum(), 1e-9)
    routed = (jax.nn.one_hot(ids, logits.shape[-1]).sum(-2) * weights[..., None]).reshape(-1, logits.shape[-1])
    likely = (probabilities * weights[..., None]).reshape(routed.shape)
    return logits.shape[-1] * ((routed.sum(0) / total) * (likely.sum(0) / total)).sum()
