"""Training the mixers that stand in the place of a base's attentions: selective distillation, and its controls.

Hoshino et al., 2025 (arXiv 2505.22135), of which only the opening could be read: self-distillation from the base, or
from a larger teacher of the same vocabulary; that only the new mixers are trained is second-hand. The loss is that of
rad/distill.py. Layers below the lowest replaced one are the teacher's own and run once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import formats
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION, block
from backbone.mesh import constrain
from backbone.model import PlainTarget, embed, finish, hidden_states, init_params, run_layers, sequence_context, unembed
from backbone.presets import preset
from rad import cost, distill, model, student, surgery
from rad.config import RadConfig
from rad.distill import weighted_mean
from rad.select import chosen
from rad.student import InPlaceTarget
from rad.target import HybridTarget

Array = jax.Array
TRAIN = ('ssm_only', 'ssm_plus_norms', 'all')
INIT = {'rad': surgery.init_rad, 'mamba_in_llama': surgery.init_mamba_in_llama}


@dataclasses.dataclass(frozen=True)
class RadTask:
    """A Task (backbone/contract.py): params {'base': frozen; 'rad': what is trained (rad/student.py)} and, where it is
    not the base itself, the frozen 'teacher'.

    base: catalogue key or path of the base; '' is a random one, for trying sizes. teacher, teacher_path: shape and file
    of a larger teacher. init: a key of INIT, of the mixers; mixer_seed: of what is random in them beside a base that
    comes from a file. train: 'ssm_only', the mixers; 'ssm_plus_norms', also both norms of the replaced layers; 'all'.
    share_out: the mixers' output projections are W_O itself, not trained and not stored.
    in_place: a control in which nothing is replaced: what is trained is the attention of the same layers; with `kl` 0
    and `ce` 1 that is fine-tuning. `rad.parallel` is another control.
    kl, ce, align, temperature: the loss. stages, until: replacement in so many parts, the lowest layers first, the last
    part at step until (stages - 1) / stages; 0: all from the start.
    drafts: of a round, for the metric drafts_kept. loss_chunk, query_chunk, attention, remat: as in LanguageModel.
    """

    cfg: ModelConfig
    rad: RadConfig
    base: str = ''
    teacher: ModelConfig | None = None
    teacher_path: str = ''
    init_as: str = 'rad'
    mixer_seed: int = 0
    train: str = 'ssm_only'
    share_out: bool = False
    in_place: bool = False
    kl: float = 1.0
    ce: float = 0.0
    align: float = 0.0
    temperature: float = 1.0
    stages: int = 0
    until: int = 0
    drafts: int = 4
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    remat: str = 'none'
    trainable: tuple[str, ...] = ('rad/.*',)

    def __post_init__(self):
        for name, known in (('train', TRAIN), ('init_as', INIT), ('attention', ATTENTION), ('remat', ('none', *REMAT))):
            if getattr(self, name) not in known:
                raise ConfigError(f'task.kwargs.{name}: unknown {getattr(self, name)!r}, one of {", ".join(known)}')
        if min(self.kl, self.ce, self.align) < 0 or self.kl + self.ce == 0 or self.temperature <= 0:
            raise ConfigError('task.kwargs: kl, ce and align must be at least 0, kl or ce above, and temperature above '
                              f'0, got {self.kl}, {self.ce}, {self.align} and {self.temperature}')
        self.rad.check(self.cfg)
        if not self.rad.layers and self.train != 'all':
            raise ConfigError(f'task.kwargs.train {self.train}: no layer is replaced, so there is nothing to train')
        if self.in_place and (self.rad.parallel or self.share_out or self.stages or self.align):
            raise ConfigError('task.kwargs.in_place: nothing is replaced, so parallel, share_out, stages and align '
                              'mean nothing')
        if self.teacher is not None and self.teacher.vocab_size != self.cfg.vocab_size:
            raise ConfigError(f'task.kwargs.teacher has {self.teacher.vocab_size} words, the base '
                              f'{self.cfg.vocab_size}: a law over one vocabulary says nothing of the other')
        if self.align and (self.teacher is not None or self.rad.parallel):
            raise ConfigError('task.kwargs.align: a mixer is aligned with the attention it replaces, of its own base')
        if self.stages < 0 or self.stages > len(self.rad.layers) or bool(self.stages) != (self.until > 0):
            raise ConfigError(f'task.kwargs: stages must be in 0..{len(self.rad.layers)} and until above 0 beside '
                              f'them, got {self.stages} and {self.until}')
        if self.drafts < 1:
            raise ConfigError(f'task.kwargs.drafts must be at least 1, got {self.drafts}')

    # --- what it makes ------------------------------------------------------------------------------------------------

    @property
    def hybrid(self) -> RadConfig:
        """What really runs: nothing is replaced in place."""
        return dataclasses.replace(self.rad, layers=()) if self.in_place else self.rad

    @property
    def by_step(self) -> bool:
        """Whether the loss wants batch['step'] in training (harness/train_step.py)."""
        return bool(self.stages) or self.teacher is not None

    @property
    def target(self) -> PlainTarget | HybridTarget:
        return InPlaceTarget(self.cfg, layers=self.rad.layers) if self.in_place else HybridTarget(self.cfg, self.rad)

    def merged(self, params: dict) -> dict:
        """The base of the model that a run is: its own, but where the hybrid is a plain model."""
        return student.whole(self.rad.layers, params)['base'] if self.in_place else params['base']

    def decodes(self) -> dict[str, Any] | None:
        """What decodes the parameters, by name (harness/models.py); None in place: that is a plain model."""
        return None if self.in_place else {
            'factory': 'rad.target.build', 'pack': 'rad.export.pack', 'params': ['rad'],
            'kwargs': {'model': self.cfg.to_dict(), 'rad': self.rad.to_dict()}}

    def drafter(self) -> dict[str, Any]:
        """What drafts for the base with the hybrid (harness/artefacts.py)."""
        if self.in_place:
            raise ConfigError('task.kwargs.in_place: a plain model of the same size as the base drafts nothing for it')
        return {'factory': 'rad.drafter.build', 'kwargs': {'rad': self.rad.to_dict()}, 'params': 'rad'}

    def init(self, rng: Array) -> dict:
        base_rng, teacher_rng, rng = jax.random.split(rng, 3)
        base = init_params(self.cfg, base_rng)
        made = {'base': base, 'rad': self.own(base, rng)}
        return made if self.teacher is None else made | {'teacher': init_params(self.teacher, teacher_rng)}

    def load(self) -> dict:
        """Base, mixers and teacher from files. Errors: those of formats.load; ConfigError for another shape."""
        found: dict[str, Any] = {}
        if self.base:
            found['base'] = formats.load_shaped(self.base, self.cfg).params
            found['rad'] = jax.tree.map(np.asarray, self.own(found['base'], jax.random.key(self.mixer_seed)))
        if self.teacher_path:
            found['teacher'] = formats.load_shaped(self.teacher_path, self.teacher).params
        return found

    def own(self, base: dict, rng: Array) -> dict:
        """params['rad'] before training."""
        at, made = np.array(self.rad.layers, int), {}
        if self.rad.layers and not self.in_place:
            mixers = INIT[self.init_as](self.cfg, self.rad, base, rng)['mixers']
            made['mixers'] = {name: part for name, part in mixers.items() if name != 'out_proj' or not self.share_out}
        if self.train == 'all':
            return made | {'whole': base}
        parts = ('attn',) * self.in_place + ('attn_norm', 'mlp_norm') * (self.train == 'ssm_plus_norms')
        if parts:
            made['layers'] = {name: jax.tree.map(lambda a: a[at], base['layers'][name]) for name in parts}
        return made

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """In nats a token. Metrics: kl (at the temperature), nll and accuracy of the student on the text, teacher_nll,
        agreement (share of positions where both hold the same token likeliest), weight (tokens counted). Of the student
        as drafter of its base: overlap, the chance at which a drawn draft is kept; drafts_kept of a round of `drafts`
        greedy ones, over the positions from which the text is what the base says itself (distill.drafts_kept), exact
        there. Beside a larger teacher these two, and base_agreement, are found in evaluation only.
        """
        del rng
        base = jax.lax.stop_gradient(params['base'])
        now, before, own, apart = self.states(params | {'base': base}, batch)
        teacher = (self.cfg, base) if self.teacher is None else (self.teacher, jax.lax.stop_gradient(params['teacher']))
        texts = batch['targets'], batch['segments'], batch['weights']
        found = self.against(own['base'], *teacher, now, before, batch['targets'])
        mean = weighted_mean(batch['weights'])
        metrics = {name: mean(found[name]) for name in ('kl', 'nll', 'teacher_nll', 'accuracy', 'agreement')}
        metrics['weight'] = batch['weights'].astype(metrics['nll'].dtype).sum()
        if self.teacher is None:
            metrics |= self.drafting(found, *texts[1:])
        elif 'step' not in batch:
            last = jax.lax.stop_gradient(hidden_states(self.cfg, base, batch['tokens'], **self.options(batch)))
            drafted = self.against(own['base'], self.cfg, base, now, last, batch['targets'])
            metrics |= self.drafting(drafted, *texts[1:]) | {'base_agreement': mean(drafted['agreement'])}
        total = self.kl * metrics['kl'] + self.ce * metrics['nll']
        if self.align:
            metrics['align'] = mean(apart)
            total = total + self.align * metrics['align']
        return total, metrics

    def states(self, params: dict, batch: Mapping[str, Array]) -> tuple[Array, Array, dict, Array | None]:
        """(final hidden states of the student and of the teacher [B, S, d], the student's whole parameters, squared
        distance of mixers and attentions [B, S], a mean over layers and widths, or None). Without the gradient that the
        teacher does not want."""
        frozen, wrap = jax.lax.stop_gradient, lambda layer: layer_for_training(self.remat, layer)
        cfg, base, tokens, options = self.cfg, params['base'], batch['tokens'], self.options(batch)
        own = student.whole(self.rad.layers, params)
        # Where everything is trained the student shares no layer, else those below the first that differs.
        lo = 0 if self.train == 'all' else self.rad.first
        ctx = sequence_context(cfg, tokens.shape, **options)
        x = embed(cfg, base, tokens, ctx.positions)
        x = frozen(run_layers(cfg, base, x, None, ctx, hi=lo, layer_fn=wrap(block))[0])
        taps = tuple(f'mixer:{l}' for l in self.rad.layers) if self.align else ()
        active = None
        if self.stages and 'step' in batch:
            share = distill.replaced_share(self.stages, self.until, batch['step'])
            active = jnp.arange(len(self.rad.layers)) < jnp.ceil(share * len(self.rad.layers) - 1e-6)
        now, new = model.hidden_and_taps(cfg, self.hybrid, own, tokens, taps, lo=lo, wrap=wrap, active=active,
                                         hidden=None if self.train == 'all' else x, **options)
        old = {}
        if self.teacher is None:
            before, _, old = run_layers(cfg, base, x, None, ctx, lo=lo, layer_fn=wrap(block), taps=taps)
            before = finish(cfg, base, before)
        else:
            before = hidden_states(self.teacher, params['teacher'], tokens, layer_fn=wrap(block), **options)
        apart = sum(((new[tap] - frozen(old[tap])) ** 2).mean(-1) for tap in taps) / len(taps) if taps else None
        return now, frozen(before), own, apart

    def against(self, student_base: dict, cfg: ModelConfig, base: dict, now: Array, before: Array, targets: Array
                ) -> dict[str, Array]:
        """distill.compare at every position [B, S], of the student and of a model with hidden states `before`."""
        def at(now: Array, before: Array, targets: Array) -> dict[str, Array]:
            logits = [constrain(unembed(*model, x), 'batch', None, 'vocab')
                      for model, x in (((self.cfg, student_base), now), ((cfg, base), before))]
            return distill.compare(logits[0], jax.lax.stop_gradient(logits[1]), targets, self.temperature)

        return distill.at_each(at, (now, before, targets), self.loss_chunk)

    def drafting(self, found: dict[str, Array], segments: Array, weights: Array) -> dict[str, Array]:
        """What compare() with the base says of the student as its drafter."""
        kept, known = distill.drafts_kept(found['agreement'], found['greedy'], segments, weights, self.drafts)
        return {'overlap': weighted_mean(weights)(found['overlap']), 'drafts_kept': weighted_mean(known)(kept)}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step, see rad/cost.py."""
        return cost.step_flops(self, batch, seq_len)

    def options(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        return {'segments': batch['segments'], 'positions': batch['positions'], 'attention': self.attention,
                'query_chunk': self.query_chunk}


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          layers: tuple[int, ...] | str = (), count: int = 0, rad: Mapping[str, Any] | None = None,
          teacher: str | Mapping[str, Any] = '', **options: Any) -> RadTask:
    """From a config. base: the model whose attentions are replaced; or model: a preset's name or the fields of a
    ModelConfig with `overrides`, and random weights. layers, count: see rad/select.py. rad: other fields of RadConfig.
    teacher: beside a base its path or catalogue key, beside a model its shape; '': the base itself. options: the other
    fields of RadTask. Errors: ConfigError names what is unknown; those of formats.load and select.chosen.
    """
    known = {f.name for f in dataclasses.fields(RadTask)} - {'cfg', 'rad', 'base', 'teacher', 'teacher_path'}
    unknown = [key for key in options if key not in known]
    if unknown or bool(model) == bool(base) or (base and overrides):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights), '
                          'and overrides beside model only')
    cfg = formats.load(base).config if base else ModelConfig.from_dict(shape(model).to_dict() | dict(overrides or {}))
    rcfg = RadConfig.of(cfg, {**(rad or {}), 'layers': chosen(layers, cfg.num_layers, count)})
    found, path = None, ''
    if teacher:
        found, path = (formats.load(teacher).config, teacher) if base else (shape(teacher), '')
    return RadTask(cfg, rcfg, base, found, path, **options)


def shape(model: str | Mapping[str, Any]) -> ModelConfig:
    """A preset's name, or the fields of a ModelConfig. Errors: ConfigError."""
    return preset(model) if isinstance(model, str) else ModelConfig.from_dict(dict(model))
