"""Healing a relufied model: it learns the law of the model it was, on text that this one wrote.

    loss = kd T^2 KL(before || now) + ce CE(next token) + l1 mean_l mean_n |neuron|            at every position

`before` is the model with its own activation, frozen; it comes from its file again and is in no checkpoint. Hinton et
al., 2015 (arXiv 1503.02531). l1 pushes more neurons to zero, as in ProSparse (Song et al., 2024, arXiv 2402.13516); 0
leaves the sparsity as it comes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import formats, losses
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.formats.tensors import flatten, unflatten
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION
from backbone.model import hidden_states, init_params, unembed
from backbone.presets import preset
from sparsity import relufy

Array = jax.Array
TRAIN = {'all': '.*', 'mlp': 'layers/(mlp|mlp_norm)/.*'}


@dataclasses.dataclass(frozen=True)
class RelufyTask:
    """A Task (backbone/contract.py): params {'base': the model before, frozen; 'relu': the leaves that are healed}.

    A run directory is a plain model wherever one is taken: `merged` is its base, `cfg` has the ReLU.
    dense: the shape before. base: catalogue key or path of it; '' is a random one, for trying sizes. train: 'all', or
    'mlp' for the MLPs and the norms before them. cached: the final hidden states of the model before are computed once
    and kept (docs/training.md). kd, ce, l1, temperature (T): the loss above. positions: so many random positions of
    each row meet the vocabulary in a step; 0 all. loss_chunk, query_chunk, attention, remat: as in LanguageModel.
    """

    dense: ModelConfig
    base: str = ''
    train: str = 'all'
    cached: bool = False
    kd: float = 1.0
    ce: float = 0.0
    l1: float = 0.0
    temperature: float = 1.0
    positions: int = 0
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    remat: str = 'none'
    trainable: tuple[str, ...] = ('relu/.*',)

    def __post_init__(self):
        for name, value, known in (('train', self.train, TRAIN), ('attention', self.attention, ATTENTION),
                                   ('remat', self.remat, ('none', *REMAT))):
            if value not in known:
                raise ConfigError(f'task.kwargs.{name}: unknown {value!r}, one of {", ".join(map(repr, known))}')
        if min(self.kd, self.ce, self.l1) < 0 or self.kd + self.ce == 0 or self.temperature <= 0:
            raise ConfigError('task.kwargs: kd, ce and l1 must be at least 0, kd or ce above, and temperature above 0, '
                              f'got {self.kd}, {self.ce}, {self.l1} and {self.temperature}')
        relufy.config(self.dense)

    @property
    def cfg(self) -> ModelConfig:
        """Of what `merged` gives."""
        return relufy.config(self.dense)

    @property
    def feature_name(self) -> str:
        return 'hidden:last'

    def init(self, rng: Array) -> dict:
        return self._of(init_params(self.dense, rng))

    def load(self) -> dict:
        """Errors: those of formats.load; ConfigError for a base of another shape."""
        if not self.base:
            return {}
        loaded = formats.load_shaped(self.base, self.dense)
        return self._of(loaded.params)

    def _of(self, base: dict) -> dict:
        healed = {path: a for path, a in flatten(base).items() if re.fullmatch(TRAIN[self.train], path)}
        return {'base': base, 'relu': unflatten(healed)}

    def merged(self, params: dict) -> dict:
        """The relufied model's base: what is healed in the place of what it was."""
        return unflatten(flatten(params['base']) | flatten(params['relu']))

    def features(self, base: dict, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'hidden': [B, S, d]}: the final hidden states of the model before."""
        return {'hidden': hidden_states(self.dense, base, batch['tokens'], segments=batch['segments'],
                                        positions=batch['positions'], attention=self.attention,
                                        query_chunk=self.query_chunk)}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """In nats a token. Metrics: nll and accuracy of the relufied model on the text, teacher_nll, kl (at the
        temperature), agreement (share of positions where both hold the same token likeliest), zeros (share of neurons
        that are exactly zero) and weight (tokens that met the vocabulary)."""
        teacher, student = params['base'], self.merged(params)
        before = batch['hidden'] if self.cached else self.features(teacher, batch)['hidden']
        now, zeros, size = relufy.run(self.cfg, student, batch['tokens'], batch['segments'], batch['positions'],
                                      layer_for_training(self.remat, relufy.watched), self.attention, self.query_chunk)
        before = jax.lax.stop_gradient(before).astype(now.dtype)
        arrays = (before, now, batch['targets'], batch['weights'])
        if 0 < self.positions < batch['weights'].shape[1]:
            at = losses.some_positions(batch['weights'], self.positions, rng)
            arrays = tuple(map(functools.partial(losses.at_positions, at=at), arrays))
        sums = losses.summed(lambda *a: self.divergences(teacher, student, *a), arrays, self.loss_chunk)
        mean = {name: value / jnp.maximum(sums['weight'], 1e-9) for name, value in sums.items()}
        of_layers = lambda a: ((a.mean(-1) * batch['weights']).sum() / jnp.maximum(batch['weights'].sum(), 1e-9))
        total = self.kd * mean['kl'] + self.ce * mean['nll'] + self.l1 * of_layers(size)
        return total, {name: mean[name] for name in ('nll', 'teacher_nll', 'kl', 'agreement', 'accuracy')} | {
            'zeros': of_layers(zeros), 'weight': sums['weight']}

    def divergences(self, teacher: dict, student: dict, before: Array, now: Array, targets: Array, weights: Array
                    ) -> dict[str, Array]:
        """Weighted sums over positions [B, S]; before, now [B, S, d] after the final norm."""
        p = jax.lax.stop_gradient(unembed(self.dense, teacher, before))
        q = unembed(self.cfg, student, now)
        warm_p, warm_q = (jax.nn.log_softmax(a / self.temperature) for a in (p, q))
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        gold = lambda a: jnp.take_along_axis(a, targets[..., None], -1)[..., 0]
        best = q.argmax(-1)
        found = {'kl': self.temperature**2 * (jnp.exp(warm_p) * (warm_p - warm_q)).sum(-1), 'nll': -gold(log_q),
                 'teacher_nll': -gold(log_p), 'agreement': best == p.argmax(-1), 'accuracy': best == targets,
                 'weight': jnp.ones(weights.shape)}
        weights = weights.astype(log_q.dtype)
        return {name: (value * weights).sum() for name, value in found.items()}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: the relufied model forward and back (the attention's weights are frozen where only MLPs
        are healed), both vocabularies, and the model before where its states are not kept."""
        cfg, att = self.cfg, self.cfg.attention
        attention = 2 * cfg.hidden_size * att.head_dim * (att.num_heads + att.num_kv_heads)
        layer = (3 if self.train == 'all' else 2) * attention + 3 * cfg.feed_scalars()
        layer += 0 if self.cached else attention + cfg.feed_scalars()
        words = (self.positions or seq_len) * 4 * cfg.hidden_size * cfg.vocab_size
        return 2.0 * batch * (seq_len * cfg.num_layers * layer + words)


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          **options: Any) -> RelufyTask:
    """From a config. base: the model to relufy; or model: a preset's name or the fields of a ModelConfig, with
    `overrides`. options: the other fields of RelufyTask. Errors: ConfigError names what is unknown."""
    known = {f.name for f in dataclasses.fields(RelufyTask)} - {'dense', 'base'}
    unknown = [key for key in options if key not in known]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        dense = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        dense = ModelConfig.from_dict(fields | dict(overrides or {}))
    return RelufyTask(dense, base, **options)
