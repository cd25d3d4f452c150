"""Healing a converted model: it learns the next-token law of the dense model it was made from, and the text itself.

    loss = beta * KL(teacher || student) + (1 - beta) * cross-entropy          at every position

The teacher is the dense model, frozen and part of no checkpoint: it comes from its file again. Hinton et al., 2015
(arXiv 1503.02531), with `temperature`; the conversion is convert.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import formats, losses
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.language_model import layer_for_training
from backbone.mesh import constrain
from backbone.model import hidden_states, init_params, unembed
from backbone.presets import preset
from stagformer import convert, model
from stagformer.config import StagFormerConfig
from stagformer.task import StagFormerTask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HealTask(StagFormerTask):
    """A Task (backbone/contract.py): params {'base', 'stagformer'} of the staggered model and the frozen 'teacher'.

    dense: the teacher's shape. dense_path: catalogue key or path of the teacher; '' takes a random one, to try sizes.
    layers, cross: of `convert`. beta: share of the KL in the loss, 0 for none. temperature: of both laws in it; the
    term is multiplied by its square, so that it weighs alike at any. The other fields are StagFormerTask's.
    """

    dense: ModelConfig | None = None
    dense_path: str = ''
    layers: tuple[int, ...] = ()
    cross: str = 'zero'
    beta: float = 0.9
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta <= 1 or self.temperature <= 0:
            raise ConfigError(f'task.kwargs: beta must be in [0, 1] and temperature above 0, got {self.beta} and '
                              f'{self.temperature}')

    def init(self, rng: Array) -> dict:
        return self._of(init_params(self.dense, rng))

    def load(self) -> dict:
        """Teacher and converted student of the file. Errors: those of backbone.formats.load, ConfigError."""
        if not self.dense_path:
            return {}
        loaded = formats.load_shaped(self.dense_path, self.dense)
        return self._of(loaded.params)

    def _of(self, dense: dict) -> dict:
        return convert.convert(self.model, dense, self.layers, self.cross) | {'teacher': dense}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """In nats a token. Metrics: nll and accuracy of the student on the text, teacher_nll, kl (at the temperature),
        agreement (share of positions where both hold the same token likeliest), weight (tokens counted)."""
        del rng
        options = {'segments': batch['segments'], 'positions': batch['positions'], 'attention': self.attention,
                   'query_chunk': self.query_chunk}
        wrap = lambda layer: layer_for_training(self.remat, layer)
        student = model.hidden_states(self.model, params, batch['tokens'], wrap=wrap, **options)
        frozen = jax.lax.stop_gradient(params['teacher'])
        teacher = hidden_states(self.dense, frozen, batch['tokens'], **options)

        def sums_of(h: Array, t: Array, targets: Array, weights: Array) -> Sums:
            logits = [constrain(unembed(cfg, p, x), 'batch', None, 'vocab')
                      for cfg, p, x in ((self.cfg, params['base'], h), (self.dense, frozen, t))]
            return compare(*logits, targets, weights, self.temperature)

        sums = losses.summed(sums_of, (student, teacher, batch['targets'], batch['weights']), self.loss_chunk)
        nll, kl = sums.text.mean('nll'), sums.mean('kl')
        return self.beta * kl + (1 - self.beta) * nll, {
            'nll': nll, 'kl': kl, 'teacher_nll': sums.mean('teacher_nll'), 'agreement': sums.mean('agreement'),
            'accuracy': sums.text.mean('correct'), 'weight': sums.text.weight}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """The student's, and a forward pass of the teacher."""
        teacher = StagFormerTask(StagFormerConfig.even(self.dense, 1))
        return super().train_flops(batch, seq_len) + teacher.train_flops(batch, seq_len) / 3


@struct.dataclass
class Sums:
    """Weighted sums over positions. text: of the student on the targets; the rest of student beside teacher."""

    text: losses.TokenSums
    kl: Array
    teacher_nll: Array
    agreement: Array

    def mean(self, what: str) -> Array:
        return getattr(self, what) / jnp.maximum(self.text.weight, 1e-9)


def compare(student: Array, teacher: Array, targets: Array, weights: Array, temperature: float = 1.0) -> Sums:
    """Logits [..., V] of both, targets and weights [...] -> sums, in at least float32.

    kl: temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), in nats.
    """
    student, teacher = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (student, teacher))
    log_p, log_q = (jax.nn.log_softmax(a / temperature) for a in (teacher, student))
    kl = temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    likeliest = [jax.lax.stop_gradient(a >= a.max(-1, keepdims=True)) for a in (student, teacher)]
    total = lambda values: (values * weights.astype(kl.dtype)).sum()
    return Sums(losses.next_token(student, targets, weights), total(kl),
                losses.next_token(teacher, targets, weights).nll, total((likeliest[0] & likeliest[1]).any(-1)))


def build(dense: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, stacks: int = 2,
          depths: tuple[int, ...] = (), layers: tuple[int, ...] = (), stagger: Mapping[str, Any] | None = None,
          random: bool = False, **options: Any) -> HealTask:
    """From a config. dense: catalogue key or path of the model to convert; where `random`, a preset's name or the
    fields of a ModelConfig with `overrides`, and nothing is read. stacks, depths, layers, stagger: of convert.shape.
    options: the other fields of HealTask. Errors: ConfigError names what is unknown; those of formats.load.
    """
    mine = {f.name for f in dataclasses.fields(HealTask)} - {'model', 'dense', 'dense_path', 'layers'}
    known = {f.name for f in dataclasses.fields(StagFormerConfig)} - {'base', 'depths'}
    if unknown := [*(key for key in options if key not in mine),
                   *(f'stagger.{key}' for key in stagger or {} if key not in known)]:
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}')
    if random:
        fields = preset(dense).to_dict() if isinstance(dense, str) else dict(dense)
        cfg, path = ModelConfig.from_dict(fields | dict(overrides or {})), ''
    elif overrides or not isinstance(dense, str):
        raise ConfigError('task.kwargs: a model that is converted brings its own shape: overrides need random=True')
    else:
        cfg, path = formats.load(dense).config, dense
    layers = tuple(layers)
    return HealTask(convert.shape(cfg, stacks, tuple(depths), layers, **(stagger or {})), dense=cfg, dense_path=path,
                    layers=layers, **options)
