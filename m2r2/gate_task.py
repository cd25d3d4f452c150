"""Training the gates, stage 2: base and accelerators are frozen, a gate learns at which tokens its exit can be trusted.

    z_j = [argmax P_j = argmax P_L]          loss = sum_j BCE(gate_j, z_j) / J, both classes weighing alike

Our reading of Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not public in full.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file

from backbone import formats
from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats.tensors import flatten, params_hash, unflatten
from backbone.layers import ATTENTION
from backbone.model import PlainTarget, embed, hidden_states, init_params, sequence_context, unembed
from backbone.presets import preset
from m2r2 import exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.gates import GateConfig
from m2r2.task import shifted

Array = jax.Array
WEIGHTS, CARD = 'weights.safetensors', 'card.json'


@dataclasses.dataclass(frozen=True)
class GateTask:
    """A Task (backbone/contract.py).

    base: catalogue key or path of the frozen model; '' is a random one. accelerators: the frozen ones, a folder of the
    zoo or a safetensors file; '' are fresh ones, which change nothing yet. cached: the base's final hidden states are
    computed once and kept (docs/training.md): a step then runs the layers up to the last exit only.
    balanced: positives and negatives of an exit weigh alike whatever its rate of agreement; scores then need
    calibrate.fit_scale to be rates. label_chunk: positions at a time through the vocabulary; 0 all.
    attention, query_chunk: as in LanguageModel.
    """

    cfg: ModelConfig
    m2r2: M2R2Config
    gate: GateConfig
    base: str = ''
    accelerators: str = ''
    cached: bool = False
    balanced: bool = True
    label_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    trainable: tuple[str, ...] = ('m2r2_gates/.*',)
    artefact_script: ClassVar[str] = 'scripts/m2r2_artefact.py'  # gates are nothing without thresholds

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ConfigError(f'task.kwargs.attention: unknown {self.attention!r}, one of '
                              f'{", ".join(map(repr, ATTENTION))}')
        if self.gate.needs_head:
            raise ConfigError(f'gate.kind {self.gate.kind} has nothing to train')

    @property
    def target(self) -> PlainTarget:
        return PlainTarget(self.cfg)

    @property
    def feature_name(self) -> str:
        return 'hidden:last'

    def init(self, rng: Array) -> dict:
        base_rng, mine_rng, gate_rng = jax.random.split(rng, 3)
        return {'base': init_params(self.cfg, base_rng), 'm2r2': streams.init_params(self.m2r2, self.cfg, mine_rng),
                'm2r2_gates': gates.init_params(self.gate, self.m2r2, gate_rng)}

    def load(self) -> dict:
        """The frozen base and accelerators. Errors: FormatError, ConfigError where they do not fit together."""
        found: dict[str, Any] = {}
        if self.base:
            loaded = formats.load_shaped(self.base, self.cfg)
            found['base'] = loaded.params
        if self.accelerators:
            found['m2r2'], card = read_accelerators(self.accelerators)
            if self.base and card.get('base_hash') not in (None, loaded.base_hash):
                raise ConfigError(f'{self.accelerators}: trained on a base with parameters {card["base_hash"]}, '
                                  f'{self.base} has {loaded.base_hash}')
            shapes = lambda tree: {path: tuple(a.shape) for path, a in flatten(tree).items()}
            wanted = shapes(jax.eval_shape(self.init, jax.random.key(0))['m2r2'])
            if shapes(found['m2r2']) != wanted:
                raise ConfigError(f'{self.accelerators} holds accelerators of another shape than m2r2 says')
        return found

    def features(self, base: dict, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'hidden': [B, S, d]}: the base's final hidden states."""
        return {'hidden': hidden_states(self.cfg, base, batch['tokens'], segments=batch['segments'],
                                        positions=batch['positions'], attention=self.attention,
                                        query_chunk=self.query_chunk)}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Metrics of exit j = 1..J: bce_j (nats, classes weighing alike), auc_j (of this batch: agreeing position above
        disagreeing one), rate_j (agreement; the base rate); weight: positions counted."""
        del rng
        total, metrics, weights = 0.0, {}, batch['weights'].astype(jnp.float32)
        for j, (logit, agrees) in enumerate(self.read(params, batch)):
            rate = (agrees * weights).sum() / jnp.maximum(weights.sum(), 1e-9)
            even = jnp.where(agrees, 0.5 / jnp.clip(rate, 0.02), 0.5 / jnp.clip(1 - rate, 0.02))
            share = weights * even if self.balanced else weights
            nll = jax.nn.softplus(jnp.where(agrees, -logit, logit))
            bce = (nll * share).sum() / jnp.maximum(share.sum(), 1e-9)
            total = total + bce / len(self.m2r2.exits)
            metrics |= {f'bce_{j + 1}': bce, f'auc_{j + 1}': ranked(logit, agrees, weights), f'rate_{j + 1}': rate}
        return total, metrics | {'weight': weights.sum()}

    def read(self, params: dict, batch: Mapping[str, Array]) -> list[tuple[Array, Array]]:
        """(logit of the gate's confidence, whether the exit's first choice is the whole model's) [B, S] each, by exit.

        Gradients go into the gates alone. A carry is of the whole model's last state, as at the first token of a draft.
        """
        stop = jax.lax.stop_gradient
        base, mine, m = stop(params['base']), stop(params.get('m2r2', {})), self.m2r2
        last = stop(batch['hidden']) if self.cached else self.features(base, batch)['hidden']
        ctx = sequence_context(self.cfg, batch['tokens'].shape, batch['segments'], batch['positions'], self.attention,
                               self.query_chunk)
        slow = embed(self.cfg, base, batch['tokens'], ctx.positions)
        word = self.choices(lambda h: unembed(self.cfg, base, h), last.astype(slow.dtype))
        found = []
        for j in range(len(m.exits)):
            carry = streams.read_carry(m, mine, slow, shifted(last, batch['segments']))
            end = streams.run_interval(self.cfg, m, base, mine, j, slow, None, ctx, together=False,
                                       start=streams.start(mine, slow, carry), path=self.gate.needs_path)
            slow = end.slow
            mine_says = self.choices(lambda hidden: exits.words(self.cfg, base, mine, hidden),
                                     streams.end(self.cfg, base, mine, end.fast, carry))
            if 'draft_ids' in mine:
                mine_says = mine['draft_ids'][mine_says]
            logit, _ = gates.evidence(self.gate, m, params['m2r2_gates'][f'exit_{j + 1}'], j, end, mask=ctx.mask)
            found.append((logit, mine_says == word))
        return found

    def choices(self, to_logits: Any, hidden: Array) -> Array:
        """The most likely word of hidden [B, S, d], [B, S], `label_chunk` positions at a time."""
        batch, size, d = hidden.shape
        chunk = self.label_chunk
        if not 0 < chunk < size:
            return to_logits(hidden).argmax(-1)
        if size % chunk:
            raise ConfigError(f'label_chunk {chunk} does not divide {size} tokens')
        parts = hidden.reshape(batch, -1, chunk, d).swapaxes(0, 1)
        return jax.lax.map(lambda part: to_logits(part).argmax(-1), parts).swapaxes(0, 1).reshape(batch, size)


def ranked(scores: Array, agrees: Array, weights: Array) -> Array:
    """Weighted probability that an agreeing position has the higher score, ties half; 0.5 where a class is missing."""
    s, z, w = scores.ravel(), agrees.ravel(), weights.ravel()
    order = jnp.argsort(s)
    ordered, below = s[order], jnp.concatenate([jnp.zeros(1), jnp.cumsum((w * ~z)[order])])
    wins = 0.5 * (below[jnp.searchsorted(ordered, s)] + below[jnp.searchsorted(ordered, s, side='right')])
    right, wrong = (w * z).sum(), (w * ~z).sum()
    return jnp.where((right > 0) & (wrong > 0), (w * z * wins).sum() / jnp.maximum(right * wrong, 1e-9), 0.5)


def read_accelerators(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params['m2r2'] of numpy arrays, without a gate; card or {}) of a folder of the zoo, or a safetensors file.
    Errors: FormatError where it cannot be read."""
    tree, card = read_artefact(name)
    mine = tree['m2r2'] if 'early_exit' in card else tree
    return {part: leaves for part, leaves in mine.items() if part != 'gate'}, card


def read_artefact(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tree of numpy arrays, card or {}); the card of one that also holds gates has 'early_exit'.

    An int8 matrix comes with the scale of each column beside it, '<path>.scale'. Errors: FormatError.
    """
    path = Path(name)
    try:
        card = json.loads((path / CARD).read_text()) if path.is_dir() else {}
        stored = load_file(path / WEIGHTS if path.is_dir() else path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FormatError(f'{name}: accelerators cannot be read ({error}); give a folder of the zoo (python -m '
                          f'harness.launch.artefact makes one of a training directory) or a safetensors file') from None
    tree = unflatten({leaf: (a.astype(np.float32) * stored[f'{leaf}.scale'] if f'{leaf}.scale' in stored else a)
                      for leaf, a in stored.items() if not leaf.endswith('.scale')})
    if card.get('params_hash') not in (None, params_hash(tree)):
        raise FormatError(f'{name}: the weights hash to {params_hash(tree)}, the card says {card["params_hash"]}')
    return tree, card


def fields_of(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of M2R2Config that a card names."""
    return card.get('early_exit', card.get('drafter', {}).get('kwargs', {})).get('m2r2')


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          m2r2: Mapping[str, Any] | None = None, gate: Mapping[str, Any] | None = None, accelerators: str = '',
          **options: Any) -> GateTask:
    """From a config. base: what is frozen; or model: a preset's name or the fields of a ModelConfig, with `overrides`.
    m2r2: fields of M2R2Config but for the sizes; None: those on the accelerators' card. gate: fields of GateConfig.
    Errors: ConfigError names what is unknown; FormatError."""
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(GateTask)} - {'cfg'}]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        cfg = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        cfg = ModelConfig.from_dict(fields | dict(overrides or {}))
    if m2r2 is None and accelerators:
        m2r2 = fields_of(read_accelerators(accelerators)[1])
    if m2r2 is None:
        raise ConfigError('task.kwargs.m2r2: the accelerators do not say what they are: give its fields')
    return GateTask(cfg, M2R2Config.of(cfg, m2r2), GateConfig.of(gate or {}), base, accelerators, **options)
