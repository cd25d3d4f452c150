"""Training the predictors of experts: the accelerators of the fast stream, and the control's, learn what routers say.

    loss = mean over (layer l, layer m foretold there) of  KL(softmax(z_m / T) || softmax(g_m / T))

z_m: the router of m on the slow stream; g_m: the same router, frozen, on the fast stream after layer l. All pairs in
one pass; no gradient reaches the base, whose own balance loss therefore never hears of it. Our reading of Bhendawade et
al., 2025 (arXiv 2502.02040), whose text is not public in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import formats, losses
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import ATTENTION
from backbone.model import PlainTarget, init_params, sequence_context
from backbone.presets import preset
from m2r2 import prefetch
from m2r2.prefetch import PREDICTORS, TRAINED, PrefetchConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PrefetchTask:
    """A Task (backbone/contract.py): params {'base', 'prefetch': prefetch.init_params}. Both predictors train side by
    side, on the same tokens, and neither hears of the other.

    base: catalogue key or path of a frozen model with experts; '' is a random one. temperature: T, below 1 for routers
    that hardly prefer; the loss is multiplied by its square. extra: further guesses in the second recall; 0: K / 2.
    positions: so many random positions of each row count in a step; 0: all. attention: as in LanguageModel.
    """

    cfg: ModelConfig
    shape: PrefetchConfig
    base: str = ''
    temperature: float = 1.0
    extra: int = 0
    positions: int = 0
    attention: str = 'dense'
    trainable: tuple[str, ...] = ('prefetch/.*',)

    def __post_init__(self):
        self.shape.m2r2(self.cfg)
        if self.attention not in ATTENTION:
            raise ConfigError(f'attention: unknown {self.attention!r}, one of {", ".join(ATTENTION)}')
        if self.temperature <= 0 or min(self.extra, self.positions) < 0:
            raise ConfigError('task.kwargs: temperature must be above 0, extra and positions at least 0')

    @property
    def target(self) -> PlainTarget:
        return PlainTarget(self.cfg)

    @property
    def budgets(self) -> dict[str, int]:
        """By suffix of the metric: how many experts are guessed."""
        k = self.cfg.moe.experts_per_token
        return {'': k, '_extra': min(k + (self.extra or (k + 1) // 2), self.cfg.moe.num_experts)}

    def init(self, rng: Array) -> dict:
        keys = jax.random.split(rng)
        return {'base': init_params(self.cfg, keys[0]), 'prefetch': prefetch.init_params(self.shape, self.cfg, keys[1])}

    def load(self) -> dict:
        """The frozen base. Errors: those of formats.load."""
        if not self.base:
            return {}
        loaded = formats.load_shaped(self.base, self.cfg)
        return {'base': loaded.params}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """The sum of both predictors' losses. Metrics: kl_<trained>; <predictor>_<lead> of each predictor, the share of
        the experts chosen that it names among its K best, mean over layers, and with _extra among so many more; weight.
        """
        mine, cfg = params['prefetch'], self.cfg
        base = jax.lax.stop_gradient(params['base'])
        ctx = sequence_context(cfg, batch['tokens'].shape, batch['segments'], batch['positions'], self.attention)
        seen = prefetch.observe(cfg, self.shape, base, mine, batch['tokens'], ctx)
        some, weights = (lambda a: a), batch['weights']
        if 0 < self.positions < weights.shape[1]:
            at = losses.some_positions(weights, self.positions, rng)
            some = lambda a: jax.vmap(lambda layer: losses.at_positions(layer, at))(a)
            weights = losses.at_positions(weights, at)
        mean = lambda a: (a * weights).sum() / jnp.maximum(weights.sum(), 1e-9) / len(a)  # a [layers, B, positions]
        total, pairs, metrics = dict.fromkeys(TRAINED, 0.0), 0, {}
        for lead, layers in self.shape.leads(cfg.num_layers).items():
            target = jnp.asarray(layers) + lead
            truth, ids = some(seen.logits[target]), some(seen.ids[target])
            pairs += len(layers)
            for name in PREDICTORS:
                guess = some(prefetch.scores(cfg, self.shape, name, base, mine, seen, lead, layers, rng))
                if name in TRAINED:
                    total[name] += len(layers) * mean(self.divergence(truth, guess))
                for suffix, count in self.budgets.items():
                    metrics[f'{name}_{lead}{suffix}'] = mean(prefetch.recall(guess, ids, count))
        kl = {f'kl_{name}': value / pairs for name, value in total.items()}
        return sum(kl.values()), kl | metrics | {'weight': weights.sum()}

    def divergence(self, truth: Array, guess: Array) -> Array:
        """Logits [..., E] of both -> [...]."""
        log_p, log_q = (jax.nn.log_softmax(a / self.temperature) for a in (truth, guess))
        return self.temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    def decodes(self) -> dict[str, Any]:
        """The base with its experts loaded ahead of time (m2r2/expert_target.py)."""
        return {'factory': 'm2r2.expert_target.build', 'pack': 'm2r2.expert_target.pack', 'params': ['prefetch'],
                'kwargs': {'model': self.cfg.to_dict(), 'prefetch': dataclasses.asdict(self.shape)}}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: the model forward, the fast stream's attention forward and back."""
        cfg, att = self.cfg, self.cfg.attention
        heads, kv = (2 * cfg.hidden_size * att.head_dim * n for n in (att.num_heads, att.num_kv_heads))
        return 2.0 * batch * seq_len * cfg.num_layers * (heads + kv + cfg.feed_scalars() + 3 * heads)


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          prefetch: Mapping[str, Any] | None = None, **options: Any) -> PrefetchTask:
    """From a config. base: what is frozen; or model: a preset's name or the fields of a ModelConfig, with `overrides`.
    prefetch: fields of PrefetchConfig. Errors: ConfigError names what is unknown."""
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(PrefetchTask)} - {'cfg'}]
    known = {f.name for f in dataclasses.fields(PrefetchConfig)}
    unknown += [f'prefetch.{key}' for key in prefetch or {} if key not in known]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        cfg = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        cfg = ModelConfig.from_dict(fields | dict(overrides or {}))
    return PrefetchTask(cfg, PrefetchConfig(**(prefetch or {})), base, **options)
