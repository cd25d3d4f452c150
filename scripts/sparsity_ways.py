"""Every way to say what is left out, at a share, with the bytes it reads: what scripts/sparsity_eval.py compares.

    make(work, method, part, share) -> Way          the target, its parameters, and what it has to be given
    bytes_of(work, method, part, share)             a token's, with what chooses
    share_at(work, method, part, budget)            the largest share that reads no more

A method is a name of PLAIN, 'dense', or of a predictor that was trained (Work.trained).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from backbone.config import ModelConfig
from backbone.model import PlainTarget
from sparsity import account, criteria, predictor, select, selectors, spans, thresholds
from sparsity.config import PARTS, SparsityConfig
from sparsity.predictor import PredictorConfig
from sparsity.target import SparseTarget

RECORDED = {'oracle': 'plainact', 'oracle_l2': 'l2norm'}
UNTRAINED = {'static': selectors.Static, 'griffin': selectors.Griffin, 'random': selectors.Random}
BY_VALUE = {'cats': (thresholds.Cats(), ('up', 'down')), 'teal': (thresholds.Teal(), account.MATRICES)}
FREE = (*UNTRAINED, *RECORDED)  # what costs nothing to choose, or is not charged: it has no token in time
PLAIN = ('static', 'griffin', 'random', 'oracle', 'oracle_l2', 'cats', 'teal')
EVERY = {'per_layer': 'context', 'dejavu': 'residual'}  # kinds of predictor that read every layer, and what
GRID = tuple(i / 128 for i in range(1, 129))  # shares to look among for equal bytes
COUNTS = {'heads': 'head_counts', 'neurons': 'counts'}
STRIDE = 16  # of the calibration's tokens, those that say how many units each layer gets


@dataclasses.dataclass
class Trained:
    """A predictor that a run trained. p: its shape; params: params['sparsity'], numpy arrays."""

    p: PredictorConfig
    params: dict


@dataclasses.dataclass
class Work:
    """What all points share. base: stacked. text [rows, prompt + steps + 1], calibration [n, S]: tokens."""

    cfg: ModelConfig
    base: dict
    text: np.ndarray
    calibration: np.ndarray
    prompt: int
    settings: dict[str, Any]  # of SparsityConfig: refresh, dense_first, ...
    unit: tuple[str, int]  # head_unit and block where no predictor says them
    trained: dict[str, Trained]
    batch: int
    allocate: bool = False  # units by layer as ranking all layers together keeps them (select.allocate)
    seen: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what was recorded, by what it is

    @property
    def starts(self) -> int:
        return self.prompt + 1

    @property
    def steps(self) -> int:
        return self.text.shape[1] - self.starts


# --- what was recorded from the dense model ---------------------------------------------------------------------------


def as_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of whole text [B, S + 1] as docs/data.md has batches."""
    shape = (len(tokens), tokens.shape[1] - 1)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(shape, np.float32),
            'segments': np.ones(shape, np.int32),
            'positions': np.tile(np.arange(shape[1], dtype=np.int32), (len(tokens), 1))}


@functools.partial(jax.jit, static_argnames=('cfg', 'criterion', 'unit'))
def by_token(cfg: ModelConfig, base: dict, batch: dict, criterion: str, unit: tuple[str, int]) -> dict[str, jax.Array]:
    """{'heads': [B, S, L, H'], 'neurons': [B, S, L, NB]}: every token's own score."""
    return criteria.units(cfg, criteria.score(cfg, base, batch, spans.windows(batch, 1), criterion), *unit)


@functools.partial(jax.jit, static_argnames=('cfg', 'p'))
def by_layers(cfg: ModelConfig, p: PredictorConfig, base: dict, mine: dict, batch: dict) -> dict[str, jax.Array]:
    """The same, foretold from what every layer of the dense model has."""
    seen = criteria.score(cfg, base, batch, spans.windows(batch, 1), 'l2norm')
    return predictor.predict(cfg, p, mine, getattr(seen, EVERY[p.kind]))


def recorded(work: Work, name: str, unit: tuple[str, int]) -> dict[str, np.ndarray]:
    """Of the measured text, by slot. A true score answers for the tokens until the next refresh, so those are added."""
    key = (name, unit)
    if key not in work.seen:
        of = (functools.partial(by_layers, work.cfg, work.trained[name].p, work.base, work.trained[name].params)
              if name in work.trained else lambda batch: by_token(work.cfg, work.base, batch, RECORDED[name], unit))
        rows = [jax.device_get(of(as_batch(row[None]))) for row in work.text]
        found = {part: np.concatenate([row[part] for row in rows]) for part in PARTS}
        if name in RECORDED:
            found = {part: window_sums(a, work.settings.get('refresh', 1)) for part, a in found.items()}
        work.seen[key] = found
    return work.seen[key]


def window_sums(a: np.ndarray, size: int) -> np.ndarray:
    """a [B, S, ...] -> sums over s..s + size - 1 of axis 1."""
    padded = np.concatenate([a, np.zeros((a.shape[0], size - 1, *a.shape[2:]), a.dtype)], axis=1)
    return sum(padded[:, i:i + a.shape[1]] for i in range(size))


def calibrated(work: Work, unit: tuple[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """Of the calibration: 'mean', {'heads': [L, H'], 'neurons': [L, NB]} over its tokens, and 'some', {'heads': [N, L,
    H'], 'neurons': [N, L, NB]} of every STRIDE-th of them."""
    key = ('calibrated', unit)
    if key not in work.seen:
        rows = [jax.device_get(by_token(work.cfg, work.base, as_batch(row[None]), 'plainact', unit))
                for row in work.calibration]
        work.seen[key] = {'mean': {part: np.mean([row[part].mean((0, 1)) for row in rows], 0) for part in PARTS},
                          'some': {part: np.concatenate([row[part][0, ::STRIDE] for row in rows]) for part in PARTS}}
    return work.seen[key]


# --- ways to choose ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """A method at a share. params: without what was recorded. record: its name and unit, where there is one."""

    target: Any
    params: dict
    record: tuple[str, tuple[str, int]] | None = None


def make(work: Work, method: str, part: str, share: float) -> Way:
    cfg, params, mine = work.cfg, {'base': work.base}, work.trained.get(method)
    if method == 'dense':
        return Way(PlainTarget(cfg), params)
    s = sparsity_of(work, method, part, share)
    unit = s.head_unit, s.block
    if method in BY_VALUE:
        params['sparsity'] = thresholds_of(work, method, share)
        return Way(SparseTarget(cfg, s, BY_VALUE[method][0]), params)
    if method in RECORDED or (mine and mine.p.kind in EVERY):
        return Way(SparseTarget(cfg, s, selectors.Oracle(cfg, s)), params, (method, unit))
    if mine:
        params['sparsity'] = mine.params
        return Way(SparseTarget(cfg, s, selectors.Predictor(cfg, s, mine.p)), params)
    if method == 'static':
        params['sparsity'] = {'mean': calibrated(work, unit)['mean']}
    return Way(SparseTarget(cfg, s, UNTRAINED[method](cfg, s)), params)


def sparsity_of(work: Work, method: str, part: str, share: float) -> SparsityConfig:
    """A predictor says its own units. Thresholds keep what they keep."""
    if method in BY_VALUE:
        return SparsityConfig(**work.settings)
    mine = work.trained.get(method)
    unit = (mine.p.head_unit, mine.p.block) if mine else work.unit
    keep = {name: share if part in (name, 'both') else 1.0 for name in PARTS}
    s = SparsityConfig(**keep, head_unit=unit[0], block=unit[1], **work.settings)
    if not work.allocate:
        return s
    some = calibrated(work, unit)['some']
    counts = {name: select.allocate(work.cfg, s, part, some[part]) for part, name in COUNTS.items() if keep[part] < 1}
    return dataclasses.replace(s, **counts)


def bytes_of(work: Work, method: str, part: str, share: float) -> float:
    """A token's, of one row in the middle of the decoded part, as they are expected (sparsity/account.py)."""
    cfg, s, mine = work.cfg, sparsity_of(work, method, part, share), work.trained.get(method)
    heads, neurons = (np.array(s.counts_of(cfg, part)) / s.sizes(cfg)[part] for part in PARTS)
    needed = {'q': heads, 'o': heads, 'gate': neurons, 'up': neurons, 'down': neurons}
    groups = heads if s.head_unit == 'kv_group' else np.ones(cfg.num_layers)
    if method in BY_VALUE:
        sparse = np.array([l in s.sparse_layers(cfg) for l in range(cfg.num_layers)])
        needed, groups = {name: np.where(sparse, share, 1.0) for name in BY_VALUE[method][1]}, np.ones(cfg.num_layers)
    middle = np.array([work.prompt + (work.steps - 1) / 2])
    asked = selectors.Predictor(cfg, s, mine.p).size({'sparsity': mine.params}) if mine else 0
    reads = account.add(account.nothing(cfg), needed, groups, middle, np.array(1), asked)
    found = account.statistics(cfg, reads)
    return found['bytes'] - found['selector'] * (1 - 1 / s.refresh)


def thresholds_of(work: Work, method: str, share: float) -> dict[str, Any]:
    key = method, share
    if key not in work.seen:
        work.seen[key] = thresholds.calibrate(work.cfg, work.base, work.calibration, BY_VALUE[method][0], share)
    return work.seen[key]


def share_at(work: Work, method: str, part: str, budget: float) -> float | None:
    """The largest share kept with which the method reads no more than `budget` bytes; None where none is that small."""
    fits = [share for share in GRID if bytes_of(work, method, part, share) <= budget]
    return max(fits, default=None)
