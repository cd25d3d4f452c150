"""Training a staggered model: next-token cross-entropy on the last stack, as for a plain model.

A lower stack has no loss of its own: its gradient comes through the keys and values that others make of its outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from backbone import losses
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION
from backbone.mesh import constrain
from backbone.model import finish, unembed
from backbone.presets import preset
from stagformer import model, pipeline_training
from stagformer.config import StagFormerConfig
from stagformer.pipeline import StagedTarget
from stagformer.target import StagFormerTarget

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StagFormerTask:
    """A Task (backbone/contract.py). Options: as those of backbone.language_model.LanguageModel.

    microbatches: so many in a step, the stacks working on different ones at once where the mesh has a stage a stack
    (pipeline_training.py); 0: one stack after the other, on a mesh without stages.
    stage_head, stage_piece: `head` and `piece` of the StagedTarget that decodes where a mesh has a stage a stack.
    """

    model: StagFormerConfig
    remat: str = 'none'
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    microbatches: int = 0
    stage_head: str = 'split'
    stage_piece: int = 0
    trainable: tuple[str, ...] = ('(base|stagformer)/.*',)

    def __post_init__(self):
        if self.remat not in ('none', *REMAT):
            raise ConfigError(f'remat: unknown {self.remat!r}, one of none, {", ".join(REMAT)}')
        if self.attention not in ATTENTION:
            raise ConfigError(f'attention: unknown {self.attention!r}, one of {", ".join(ATTENTION)}')
        if self.microbatches:
            pipeline_training.check(self.model, self.microbatches)

    @property
    def cfg(self) -> ModelConfig:
        """Of the plain tree under params['base']."""
        return self.model.base

    @property
    def target(self) -> StagFormerTarget:
        return StagFormerTarget(self.model)

    @property
    def staged(self) -> StagedTarget:
        """What decodes them on a mesh of stages."""
        return StagedTarget(self.model, head=self.stage_head, piece=self.stage_piece)

    def decodes(self) -> dict[str, Any]:
        """What decodes the parameters, by name (harness/models.py)."""
        return {'factory': 'stagformer.target.build', 'pack': 'stagformer.layout.build', 'params': ['stagformer'],
                'kwargs': {'model': self.model.to_dict()}}

    def init(self, rng: Array) -> dict:
        return model.init_params(self.model, rng)

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Mean negative log likelihood in nats a token. Metrics: nll, accuracy, weight (tokens counted)."""
        del rng
        options = {'segments': batch['segments'], 'positions': batch['positions'], 'attention': self.attention,
                   'query_chunk': self.query_chunk, 'wrap': lambda layer: layer_for_training(self.remat, layer)}
        if self.microbatches:
            hidden = finish(self.cfg, params['base'], pipeline_training.final_outputs(
                self.model, params, batch['tokens'], self.microbatches, **options))
            pin = pipeline_training.over_stages
        else:
            hidden = model.hidden_states(self.model, params, batch['tokens'], **options)
            pin = lambda logits: constrain(logits, 'batch', None, 'vocab')

        def to_logits(h: Array) -> Array:
            return pin(unembed(self.cfg, params['base'], h))

        sums = losses.next_token_chunked(to_logits, hidden, batch['targets'], batch['weights'], self.loss_chunk)
        return sums.mean('nll'), {'nll': sums.mean('nll'), 'accuracy': sums.mean('correct'), 'weight': sums.weight}


    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs one training step needs, counted as harness.roofline.train_flops counts a plain model's."""
        cfg, att = self.model, self.cfg.attention
        d, heads, width = self.cfg.hidden_size, att.num_heads * att.head_dim, cfg.kv_heads * att.head_dim
        layer = d * (2 * heads + 2 * att.num_kv_heads * att.head_dim) + d * self.cfg.mlp.intermediate_size * (
            3 if self.cfg.mlp.gated else 2)
        cross = cfg.cross_layers * 2 * d * heads + cfg.cross_sources * 2 * d * width
        seen = sum(min(i + 1, att.window or i + 1) for i in range(seq_len))
        seen_cross = sum(min(i, cfg.window or i) for i in range(1 - cfg.lag, seq_len + 1 - cfg.lag))
        scores = 2 * heads * (sum(cfg.depths) * seen + cfg.cross_sources * seen_cross)
        matrices = sum(cfg.depths) * layer + cross + d * self.cfg.vocab_size
        return 3 * 2.0 * batch * (seq_len * matrices + scores)


def build(base: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, stacks: int = 2,
          depths: tuple[int, ...] = (), stagger: Mapping[str, Any] | None = None, **options: Any) -> StagFormerTask:
    """From a config. base: a preset's name, or the fields of a ModelConfig; overrides: fields that replace those.

    stacks: of equal depth, unless `depths` gives the layers of each. stagger: the other fields of StagFormerConfig.
    options: the other fields of StagFormerTask. Errors: ConfigError names what is unknown.
    """
    fields = preset(base).to_dict() if isinstance(base, str) else dict(base)
    shape = ModelConfig.from_dict(fields | dict(overrides or {}))
    known = {f.name for f in dataclasses.fields(StagFormerConfig)} - {'base', 'depths'}
    if unknown := [key for key in stagger or {} if key not in known]:
        raise ConfigError(f'task.kwargs.stagger: unknown {", ".join(unknown)}')
    mine = {f.name for f in dataclasses.fields(StagFormerTask)} - {'model'}
    if unknown := [key for key in options if key not in mine]:
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}')
    cut = (StagFormerConfig(shape, tuple(depths), **(stagger or {})) if depths else
           StagFormerConfig.even(shape, stacks, **(stagger or {})))
    return StagFormerTask(cut, **options)
