"""Training a predictor of what matters: the base is frozen, and its own gradients are the labels.

    loss = loss(heads) + loss(neurons)          see predictor.loss; labels: criteria.score over spans of tokens

Labels are made in the step, or once and kept (`cached`), from rows of text: one forward and one backward pass of the
base give them for every span of a row at once. Akhauri et al., 2024 (ShadowLLM, arXiv 2406.16635), made causal: a label
answers for the token that asks and those after it, not for those before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backbone import formats
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import ATTENTION
from backbone.model import PlainTarget, init_params
from backbone.presets import preset
from sparsity import criteria, measures, predictor
from sparsity import spans as span_kinds
from sparsity.config import PARTS
from sparsity.criteria import CONTROLS, CRITERIA
from sparsity.predictor import PredictorConfig
from sparsity.spans import LABELS, Spans

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PredictorTask:
    """A Task (backbone/contract.py): params {'base', 'sparsity': predictor.init_params}.

    base: catalogue key or path of the frozen model; '' is a random one. criterion: what is foretold.
    label: 'rest', windows of `window` tokens (the first `length` of each; 0 all) answer for all losses after them;
    'ahead', for those of their own tokens only, at one backward pass a window; 'prompt', see spans.prompt: one span a
    row, asked at `cut`.
    cached: contexts and labels are made once and kept (docs/training.md).
    measured: so many examples of a batch are ranked for the metrics. loss_chunk: positions at a time through the
    vocabulary; 0 all. attention: as in LanguageModel.
    """

    cfg: ModelConfig
    predictor: PredictorConfig
    base: str = ''
    criterion: str = 'plainact'
    label: str = 'rest'
    window: int = 16
    length: int = 0
    cut: int = 0
    cached: bool = False
    measured: int = 8
    loss_chunk: int = 0
    attention: str = 'dense'
    trainable: tuple[str, ...] = ('sparsity/.*',)
    artefact_script: ClassVar[str] = 'scripts/sparsity_artefact.py'  # it says what share is kept

    def __post_init__(self):
        known = {'criterion': CRITERIA + CONTROLS, 'label': LABELS, 'attention': ATTENTION}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f'task.kwargs.{name}: unknown {getattr(self, name)!r}, one of '
                                  f'{", ".join(map(repr, values))}')
        if min(self.window, self.measured) < 1:
            raise ConfigError(f'task.kwargs: window and measured must be at least 1, got {self.window} and '
                              f'{self.measured}')

    @property
    def target(self) -> PlainTarget:
        return PlainTarget(self.cfg)

    @property
    def feature_name(self) -> str:
        """What the labels depend on, beside base and rows."""
        p = self.predictor
        reads = {'unified': 'first', 'per_layer': 'contexts', 'dejavu': 'residuals'}[p.kind]
        where = f'cut{self.cut}' if self.label == 'prompt' else f'{self.window}/{self.length}'
        return f'sparsity:{self.criterion}:{self.label}:{where}:{p.head_unit}:{p.block}:{reads}'

    def init(self, rng: Array) -> dict:
        keys = jax.random.split(rng)
        return {'base': init_params(self.cfg, keys[0]),
                'sparsity': predictor.init_params(self.cfg, self.predictor, keys[1])}

    def load(self) -> dict:
        """The frozen base. Errors: those of formats.load."""
        if not self.base:
            return {}
        loaded = formats.load_shaped(self.base, self.cfg)
        return {'base': loaded.params}

    def spans(self, batch: Mapping[str, Array]) -> Spans:
        if self.label == 'prompt':
            return span_kinds.prompt(batch, self.cut)
        return span_kinds.windows(batch, self.window, self.length)

    def features(self, base: dict, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What the predictor reads and what it should say, C spans a row: 'context' [B, C, n] (with a layer axis before
        n where every layer reads its own), 'heads' [B, C, L, H'], 'neurons' [B, C, L, NB] and 'known' [B, C]."""
        p, spans = self.predictor, self.spans(batch)

        def of(spans: Spans) -> dict[str, Array]:
            seen = criteria.score(self.cfg, base, batch, spans, self.criterion, attention=self.attention,
                                  loss_chunk=self.loss_chunk)
            context = {'unified': seen.context[:, :, 0], 'per_layer': seen.context, 'dejavu': seen.residual}[p.kind]
            return {'context': context, **criteria.units(self.cfg, seen, p.head_unit, p.block)}

        if self.label != 'ahead':
            return of(spans) | {'known': spans.known}
        found = jax.lax.map(lambda c: of(span_kinds.one(spans, c)), jnp.arange(spans.at.shape[1]))
        return {name: jnp.moveaxis(a[:, :, 0], 0, 1) for name, a in found.items()} | {'known': spans.known}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Metrics: loss_heads, loss_neurons; and of both, over `measured` examples: rho, recall, mass and rho_flat
        (sparsity/measures.py), and <name>_mean, the same of the mean of this batch's other examples, which knows
        nothing of the example. weight: examples counted."""
        base = jax.lax.stop_gradient(params['base'])
        given = batch if self.cached else self.features(base, batch)
        flat = {name: jax.lax.stop_gradient(given[name]).astype(jnp.float32)
                for name in ('context', 'known', *PARTS)}
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in flat.items()}
        known = flat['known']
        guess = predictor.predict(self.cfg, self.predictor, params['sparsity'], flat['context'])
        total, metrics = 0.0, {'weight': known.sum()}
        for part, key in zip(PARTS, jax.random.split(rng), strict=True):
            nll = predictor.loss(self.cfg, self.predictor, part, guess[part], flat[part], key)
            metrics[f'loss_{part}'] = (nll * known).sum() / jnp.maximum(known.sum(), 1e-9)
            total = total + metrics[f'loss_{part}']
            metrics |= {f'{part}_{name}': a for name, a in self.measure(part, flat[part], guess[part], known).items()}
        return total, metrics

    def measure(self, part: str, truth: Array, guess: Array, known: Array) -> dict[str, Array]:
        """truth, guess [N, L, n], known [N] -> metrics by name, as `loss` has them."""
        at = jax.lax.top_k(known, min(self.measured, len(known)))[1]  # the first that are known
        share = known[at] / jnp.maximum(known[at].sum(), 1e-9)
        wide = known[:, None, None]
        others = (truth * wide).sum(0) - (truth * wide)[at]
        k = self.predictor.kept(self.cfg, part)
        found = measures.of_part(truth[at], jax.lax.stop_gradient(guess[at]), k)
        plain = measures.of_part(truth[at], others, k)
        return {name: (a * share).sum() for name, a in found.items()} | {
            f'{name}_mean': (a * share).sum() for name, a in plain.items()}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: the predictor's, and where labels are not kept the base forward twice (the layers are run
        again for their gradients) and back to its activations."""
        leaves = jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0))['sparsity'])
        spans = batch * (1 if self.label == 'prompt' else seq_len // self.window)
        mine = 6.0 * spans * sum(a.size for a in leaves)
        if self.cached:
            return mine
        cfg, att = self.cfg, self.cfg.attention
        projections = cfg.hidden_size * att.head_dim * (2 * att.num_heads + 2 * att.num_kv_heads)
        passes = seq_len // self.window if self.label == 'ahead' else 1
        scalars = cfg.num_layers * (projections + cfg.feed_scalars()) + cfg.vocab_size * cfg.hidden_size
        return mine + 6.0 * batch * seq_len * scalars * passes


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          predictor: Mapping[str, Any] | None = None, **options: Any) -> PredictorTask:
    """From a config. base: what is frozen; or model: a preset's name or the fields of a ModelConfig, with `overrides`.
    predictor: fields of PredictorConfig. Errors: ConfigError names what is unknown."""
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(PredictorTask)} - {'cfg'}]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        cfg = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        cfg = ModelConfig.from_dict(fields | dict(overrides or {}))
    return PredictorTask(cfg, PredictorConfig.of(cfg, predictor or {}), base, **options)
