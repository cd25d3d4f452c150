"""Networks that say from little what matters in every layer.

    unified     s = W_out ReLU(W_in n(x) + b) + c     x: the context of layer 0 alone; one network for the heads of all
                layers, one for the neurons
    per_layer   the same network for each layer, from the layer's own context: as many parameters and more, and an input
                that only a dense model has in time (the `DejaVu-style` of Akhauri et al., 2024)
    dejavu      per layer W_out W_in x', no biases and nothing between them, x' the residual that the layer before was
                given (Liu et al., 2023, arXiv 2310.17157, and its code)

n(x) = (x - min x) / (max x - min x) over one token's values. Akhauri et al., 2024 (ShadowLLM, arXiv 2406.16635) for the
first two. Blocks, the losses besides the squared error and the scale of x' (its root mean square, for the residual
grows by the layer) are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.matmul import dense
from sparsity.config import HEAD_UNITS, PARTS, kept
from sparsity.select import Scores, best

Array = jax.Array
KINDS = ('unified', 'per_layer', 'dejavu')
LOSSES = ('mse', 'bce', 'rank')
TARGETS = ('layer', 'all')
MEMBERS = ('top', 'active')
PAIRS = 8  # comparisons of each unit in the rank loss


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """width_heads, width_neurons: of the hidden layers. head_unit, block: what a score is for (SparsityConfig).

    loss: 'mse' of scores brought to 0..1; 'bce', whether a unit is among the share it keeps; 'rank', which of two units
    of a layer scores higher. targets: brought to 0..1 by 'layer', or over 'all' of them together.
    keep_heads, keep_neurons: the share that counts as kept, for bce and for what is measured.
    members: 'top', the highest-scoring share; 'active': of the neurons those above 0, as a ReLU leaves them (dejavu).
    """

    kind: str = 'unified'
    width_heads: int = 256
    width_neurons: int = 256
    head_unit: str = 'kv_group'
    block: int = 1
    loss: str = 'mse'
    targets: str = 'layer'
    keep_heads: float = 0.5
    keep_neurons: float = 0.5
    members: str = 'top'

    def __post_init__(self):
        for name, known in (('kind', KINDS), ('head_unit', HEAD_UNITS), ('loss', LOSSES), ('targets', TARGETS),
                            ('members', MEMBERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f'predictor.{name}: unknown {getattr(self, name)!r}, one of {", ".join(known)}')
        for name in ('width_heads', 'width_neurons', 'block'):
            if getattr(self, name) < 1:
                raise ConfigError(f'predictor.{name} must be at least 1, got {getattr(self, name)}')
        for name in ('keep_heads', 'keep_neurons'):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f'predictor.{name} must be above 0 and at most 1, got {getattr(self, name)}')

    @classmethod
    def of(cls, base: ModelConfig, fields: Mapping[str, Any]) -> PredictorConfig:
        """Errors: ConfigError for an unknown field, and for a base it cannot be for."""
        if unknown := [key for key in fields if key not in {f.name for f in dataclasses.fields(cls)}]:
            raise ConfigError(f'predictor: unknown field {", ".join(unknown)}')
        made = cls(**fields)
        if base.mlp.intermediate_size % made.block:
            raise ConfigError(f'predictor.block {made.block} does not divide {base.mlp.intermediate_size} neurons')
        return made

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def sizes(self, base: ModelConfig) -> dict[str, int]:
        """Units of a layer: {'heads': H', 'neurons': NB}."""
        att = base.attention
        return {'heads': att.num_heads if self.head_unit == 'head' else att.num_kv_heads,
                'neurons': base.mlp.intermediate_size // self.block}

    def width(self, part: str) -> int:
        return self.width_heads if part == 'heads' else self.width_neurons

    def kept(self, base: ModelConfig, part: str) -> int:
        """Units of a layer that count as kept."""
        return kept(self.sizes(base)[part], self.keep_heads if part == 'heads' else self.keep_neurons)


def dejavu_widths(base: ModelConfig) -> dict[str, int]:
    """The ranks of the original, 512 for heads and 1000 for neurons of a model of 4096 channels, in proportion."""
    share = min(1.0, base.hidden_size / 4096)
    return {'width_heads': max(1, round(512 * share)), 'width_neurons': max(1, round(1000 * share))}


def init_params(cfg: ModelConfig, p: PredictorConfig, rng: Array) -> dict:
    """params['sparsity']: {'heads': {'in', 'out'}, 'neurons': ...}, kernels [in, out], with a leading layer axis where
    every layer has its own."""
    made = {}
    layers = cfg.num_layers
    inputs = cfg.hidden_size if p.kind == 'dejavu' else cfg.attention.num_heads * cfg.attention.head_dim
    for part, key in zip(PARTS, jax.random.split(rng), strict=True):
        size = p.sizes(cfg)[part]
        shapes = {'in': (inputs, p.width(part)), 'out': (p.width(part), size)}
        lead: tuple[int, ...] = (layers,)
        if p.kind == 'unified':
            shapes['out'], lead = (p.width(part), layers * size), ()
        made[part] = {}
        for name, k in zip(shapes, jax.random.split(key), strict=True):
            rows, columns = shapes[name]
            made[part][name] = {'kernel': jax.random.normal(k, (*lead, rows, columns)) * rows**-0.5}
            if p.kind != 'dejavu':
                made[part][name]['bias'] = jnp.zeros((*lead, columns))
    return made


def predict(cfg: ModelConfig, p: PredictorConfig, params: dict, context: Array) -> Scores:
    """{'heads': [B, L, H'], 'neurons': [B, L, NB]} float32, higher = keep. params: params['sparsity'].

    context: unified, of layer 0 [B, H * hd]; per_layer, of every layer [B, L, H * hd]; dejavu, what every layer was
    given [B, L, d]. More leading axes may stand in the place of B. Every row is normalised by itself.
    """
    context = context.astype(jnp.promote_types(context.dtype, jnp.float32))
    if p.kind == 'dejavu':
        x = context * jax.lax.rsqrt(jnp.square(context).mean(-1, keepdims=True) + 1e-12)
        x = jnp.concatenate([x[..., :1, :], x[..., :-1, :]], -2)  # the layer before; the first has none
    else:
        x = unit_range(context)
    return {part: _run(cfg, p, params[part], x) for part in PARTS}


def _run(cfg: ModelConfig, p: PredictorConfig, net: dict, x: Array) -> Array:
    if p.kind == 'unified':
        y = dense(net['out'], jax.nn.relu(dense(net['in'], x)))
        return y.reshape(*y.shape[:-1], cfg.num_layers, -1)
    by_layer = jax.vmap(dense, in_axes=(0, -2), out_axes=-2)
    hidden = by_layer(net['in'], x)
    return by_layer(net['out'], hidden if p.kind == 'dejavu' else jax.nn.relu(hidden))


def unit_range(x: Array, axes: int | tuple[int, ...] = -1) -> Array:
    """x brought to 0..1 over `axes`; 0 where all are the same."""
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    return jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1), 0)


def loss(cfg: ModelConfig, p: PredictorConfig, part: str, guess: Array, truth: Array, rng: Array) -> Array:
    """guess, truth [N, L, n] -> [N]. truth: scores of a criterion, any scale. rng: for the pairs of the rank loss."""
    if p.loss == 'mse':
        return jnp.square(guess - unit_range(truth, (-2, -1) if p.targets == 'all' else -1)).mean((-2, -1))
    if p.loss == 'bce':
        return _membership(cfg, p, part, guess, truth)
    # Each unit meets those a random step further on; pairs weigh by how far they are apart, so ties do not count.
    steps = jax.random.randint(rng, (PAIRS,), 1, max(2, truth.shape[-1]))
    wanted = unit_range(truth)

    def of_step(step: Array) -> Array:
        ahead = lambda a: a - jnp.roll(a, step, -1)
        apart = ahead(wanted)
        return (jnp.abs(apart) * jax.nn.softplus(-jnp.sign(apart) * ahead(guess))).mean((-2, -1))
    return jax.lax.map(of_step, steps).mean(0)


def _membership(cfg: ModelConfig, p: PredictorConfig, part: str, guess: Array, truth: Array) -> Array:
    """Those not kept weigh as little as the kept are rare (Liu et al., 2023): y (1 - w) + w, w = mean y."""
    y = truth > 0 if p.members == 'active' and part == 'neurons' else best(truth, p.kept(cfg, part))
    rare = jnp.minimum(y.mean() + (0.005 if part == 'neurons' else 0), 1)
    nll = jax.nn.softplus(jnp.where(y, -guess, guess))
    return (nll * (y * (1 - rare) + rare)).mean((-2, -1))
