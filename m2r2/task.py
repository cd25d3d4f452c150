"""Training the accelerators of a frozen base: every exit learns the law of the whole model, all exits in one pass.

    loss = mean over exits j of  kd T^2 KL(P_L || P_j) + ce CE(next token, P_j) + tv TV(P_L, P_j)
                                 + cos (1 - cos(n(p_Nj), n(h_L)))

Intervals start anew from h, so no gradient goes from one exit to another, and none into the base. 1 - TV(P_L, P_j) is
the rate at which a sampled draft is kept, which is why it is reported as `overlap_j`. Our reading of Bhendawade et al.,
2025 (arXiv 2502.02040); distillation: Hinton et al., 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import formats, losses
from backbone.config import ModelConfig
from backbone.draft_vocabulary import index_of, read_ids
from backbone.errors import ConfigError
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION
from backbone.model import PlainTarget, embed, finish, hidden_states, init_params, sequence_context
from backbone.presets import preset
from m2r2 import exits, streams
from m2r2.config import M2R2Config

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AcceleratorTask:
    """A Task (backbone/contract.py).

    base: catalogue key or path of the frozen model; '' is a random one, for trying sizes. cached: its final hidden
    states are computed once and kept (docs/training.md): a step then runs the layers up to the last exit only.
    kd, ce, tv, cos, temperature: the loss above. unroll: with a carry, so many passes of the fast stream, each starting
    from the one before as a draft does; the loss is their mean.
    draft_ids: .npy file of the draft vocabulary's ids; '' takes the first ones.
    positions: so many random positions of each row meet the vocabulary in a step; 0 all. loss_chunk: so many at a time;
    0 all. attention, query_chunk, remat: as in LanguageModel.
    """

    cfg: ModelConfig
    m2r2: M2R2Config
    base: str = ''
    cached: bool = False
    kd: float = 1.0
    ce: float = 0.0
    tv: float = 0.0
    cos: float = 0.0
    temperature: float = 1.0
    unroll: int = 1
    draft_ids: str = ''
    positions: int = 0
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    remat: str = 'none'
    trainable: tuple[str, ...] = ('m2r2/(layers|exits|carry)/.*',)

    def __post_init__(self):
        for name, value, known in (('attention', self.attention, ATTENTION), ('remat', self.remat, ('none', *REMAT))):
            if value not in known:
                raise ConfigError(f'task.kwargs.{name}: unknown {value!r}, one of {", ".join(map(repr, known))}')
        if min(self.kd, self.ce, self.tv, self.cos) < 0 or self.kd + self.ce + self.tv + self.cos == 0:
            raise ConfigError('task.kwargs: kd, ce, tv and cos must be at least 0, and one above')
        if self.temperature <= 0 or self.unroll < 1 or (self.unroll > 1 and not self.m2r2.carry):
            raise ConfigError(f'task.kwargs: temperature must be above 0 and unroll 1, or more with a carry, got '
                              f'{self.temperature} and {self.unroll}')
        if self.m2r2.stream == 'none':
            raise ConfigError('m2r2.stream none has nothing to train')

    @property
    def target(self) -> PlainTarget:
        return PlainTarget(self.cfg)

    @property
    def feature_name(self) -> str:
        return 'hidden:last'

    def init(self, rng: Array) -> dict:
        base_rng, mine_rng = jax.random.split(rng)
        return {'base': init_params(self.cfg, base_rng), 'm2r2': streams.init_params(self.m2r2, self.cfg, mine_rng)}

    def load(self) -> dict:
        """The frozen base, and the draft vocabulary where a file names it. Errors: those of formats.load."""
        found: dict[str, Any] = {}
        if self.base:
            loaded = formats.load_shaped(self.base, self.cfg)
            found['base'] = loaded.params
        if self.draft_ids:
            found['m2r2'] = {'draft_ids': read_ids(self.draft_ids, self.m2r2.words, self.m2r2.vocab_size)}
        return found

    def drafter(self) -> dict[str, Any]:
        """What drafts with the first exit (harness/artefacts.py)."""
        return {'factory': 'm2r2.drafter.build', 'kwargs': {'m2r2': self.m2r2.to_dict()}, 'params': 'm2r2'}

    def features(self, base: dict, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'hidden': [B, S, d]}: the base's final hidden states."""
        return {'hidden': hidden_states(self.cfg, base, batch['tokens'], segments=batch['segments'],
                                        positions=batch['positions'], layer_fn=layer_for_training(self.remat),
                                        attention=self.attention, query_chunk=self.query_chunk)}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: both streams up to the last exit, the fast one forward and back (its weights are frozen),
        the exits' words, and the whole base where its states are not kept."""
        tokens, layers = batch * seq_len, self.m2r2.exits[-1]
        weights = sum(a.size for a in jax.tree.leaves(jax.eval_shape(
            lambda: init_params(self.cfg, jax.random.key(0)))['layers'])) / self.cfg.num_layers
        passes = (1 + 2 * self.unroll) * layers + (0 if self.cached else self.cfg.num_layers)
        rows = batch * (self.positions or seq_len) * 3 * len(self.m2r2.exits) * self.unroll
        return 2.0 * (tokens * passes * weights + rows * self.m2r2.words * self.cfg.hidden_size)

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Mean over positions and exits. Metrics of exit j = 1..J: kl_j (nats), agreement_j (same first choice as the
        whole model among the words drafted from), overlap_j, align_j; weight: positions counted."""
        base, mine, m = params['base'], params['m2r2'], self.m2r2
        last = jax.lax.stop_gradient(batch['hidden'] if self.cached else self.features(base, batch)['hidden'])
        ctx = sequence_context(self.cfg, batch['tokens'].shape, batch['segments'], batch['positions'], self.attention,
                               self.query_chunk)
        slow = embed(self.cfg, base, batch['tokens'], ctx.positions)
        last = last.astype(slow.dtype)
        some = lambda a: a
        if 0 < self.positions < batch['weights'].shape[1]:
            at = losses.some_positions(batch['weights'], self.positions, rng)
            some = functools.partial(losses.at_positions, at=at)
        index, known = index_of(mine.get('draft_ids'), batch['targets'])
        total, metrics = 0.0, {}
        for j in range(len(m.exits)):
            ends, slow = self.fast_ends(base, mine, j, slow, last, ctx, batch)
            for u, hidden in enumerate(ends):
                arrays = tuple(map(some, (last, hidden, index, known, batch['weights'])))
                sums = losses.summed(lambda *a: self.divergences(base, mine, *a), arrays, self.loss_chunk)
                mean = {name: value / jnp.maximum(sums['weight'], 1e-9) for name, value in sums.items()}
                total = total + mean['loss'] / len(ends) / len(m.exits)
                suffix = f'{j + 1}' if u == 0 else f'{j + 1}_after_{u}'
                metrics |= {f'{name}_{suffix}': mean[name] for name in ('kl', 'agreement', 'overlap', 'align')}
        return total, metrics | {'weight': sums['weight']}

    def fast_ends(self, base: dict, mine: dict, j: int, slow: Array, last: Array, ctx: Any,
                  batch: Mapping[str, Array]) -> tuple[list[Array], Array]:
        """What exit j's unembedding reads [B, S, d], once a pass of `unroll`, and the slow stream there."""
        m = self.m2r2
        if not m.carry:
            end = streams.run_interval(self.cfg, m, base, mine, j, slow, None, ctx, together=False)
            return [finish(self.cfg, base, end.fast)], end.slow
        ends, previous = [], last
        for _ in range(self.unroll):
            carry = streams.read_carry(m, mine, slow, shifted(previous, batch['segments']))
            end = streams.run_interval(self.cfg, m, base, mine, j, slow, None, ctx,
                                       start=streams.start(mine, slow, carry), together=False)
            previous = streams.end(self.cfg, base, mine, end.fast, carry)
            ends.append(previous)
        return ends, end.slow

    def divergences(self, base: dict, mine: dict, last: Array, hidden: Array, index: Array, known: Array,
                    weights: Array) -> dict[str, Array]:
        """Weighted sums over positions [B, S]; last, hidden [B, S, d] after the final norm."""
        teacher = jax.lax.stop_gradient(exits.words(self.cfg, base, mine, last))
        student = exits.words(self.cfg, base, mine, hidden)
        log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        warm_p, warm_q = (jax.nn.log_softmax(a / self.temperature) for a in (teacher, student))
        kl = (jnp.exp(warm_p) * (warm_p - warm_q)).sum(-1)
        tv = 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)
        nll = -jnp.take_along_axis(log_q, index[..., None], -1)[..., 0] * known
        align = cosine(last, hidden)
        loss = self.kd * self.temperature ** 2 * kl + self.ce * nll + self.tv * tv + self.cos * (1 - align)
        found = {'loss': loss, 'kl': (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 'overlap': 1 - tv, 'align': align,
                 'agreement': teacher.argmax(-1) == student.argmax(-1), 'weight': jnp.ones_like(kl)}
        weights = weights.astype(kl.dtype)
        return {name: (value * weights).sum() for name, value in found.items()}


def cosine(a: Array, b: Array) -> Array:
    """[..., d], [..., d] -> [...], at least float32."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    return (a * b).sum(-1) * jax.lax.rsqrt((a * a).sum(-1) * (b * b).sum(-1) + 1e-12)


def shifted(hidden: Array, segments: Array) -> Array:
    """hidden [B, S, d] of the token before, zero where a document begins. segments [B, S]."""
    before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    same = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1] == segments
    return jnp.where(same[..., None], before, 0)


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          m2r2: Mapping[str, Any] | None = None, **options: Any) -> AcceleratorTask:
    """From a config. base: what is frozen; or model: a preset's name or the fields of a ModelConfig, with `overrides`.
    m2r2: fields of M2R2Config but for the sizes. Errors: ConfigError names what is unknown."""
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(AcceleratorTask)} - {'cfg'}]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        cfg = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        cfg = ModelConfig.from_dict(fields | dict(overrides or {}))
    return AcceleratorTask(cfg, M2R2Config.of(cfg, m2r2 or {}), base, **options)
