"""What a bounded expert cache and its predictor are worth: an event simulation of one compute unit and one link.

    a token:  for each layer:  attention | router: want, predict | wait until all wanted experts are there | experts
    the link: one expert at a time, `Times.copy` each, in the order ExpertCache.next_copy says

Deterministic, without a clock: times are numbers of any unit and exact if they are integers. The policy is the very
object that a runtime drives (m2r2/expert_cache.py). Two closed forms hold exactly without a cache, for m experts a
layer: m copy + compute on demand, and, fetched a layer ahead, a period of max(m copy, compute): overlap alone gains 2x
at most. Our reading of the ahead-of-time loading of Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not
public in full.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from backbone.errors import ConfigError
from m2r2.eviction import NEVER
from m2r2.expert_cache import CacheConfig, Copy, ExpertCache


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one decode step, all in one unit, here seconds. attention: a layer up to and with its router. experts: of a
    layer, all it wants. copy: one expert over the link. token: once a token beside the layers (the head). predict: what
    the predictor adds to each layer that has a prediction."""

    attention: float
    experts: float
    copy: float
    token: float = 0
    predict: float = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < np.inf:
                raise ConfigError(f'times.{field.name} must be finite and not negative, got '
                                  f'{getattr(self, field.name)}')


@dataclasses.dataclass(frozen=True)
class Report:
    """hits + late + demand == requests, the distinct experts wanted. copies: begun, by why; wasted: of the prefetched,
    evicted without one use. total, stall: time in all, and of it waiting for experts, in the unit of Times."""

    tokens: int
    total: float
    stall: float = 0
    requests: int = 0
    hits: int = 0
    late: int = 0
    demand: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    duplicates: int = 0
    stale: int = 0

    @property
    def bytes_moved(self) -> int:
        return self.demand_bytes + self.prefetch_bytes

    @property
    def ms_per_token(self) -> float:
        """If times were seconds."""
        return 1e3 * self.total / self.tokens

    @property
    def hit_rate(self) -> float:
        """There before asked for; late ones are not."""
        return self.hits / self.requests if self.requests else 1.0


def resident(ids: np.ndarray, times: Times, warmup: int = 0) -> Report:
    """Every expert on the device: nothing moves."""
    tokens, layers = ids.shape[0] - warmup, ids.shape[1]
    wanted = sum(np.unique(layer).size for token in ids[warmup:] for layer in token)
    return Report(tokens, tokens * (layers * (times.attention + times.experts) + times.token), requests=wanted,
                  hits=wanted)


def simulate(ids: np.ndarray, times: Times, cfg: CacheConfig, made: np.ndarray | None = None, *,
             budget: int | None = None, leads: tuple[int, ...] | None = None, keep: bool = True,
             warmup: int = 0) -> Report:
    """ids [T, L, W], made [T, L + 1, leads, N]: as in m2r2/expert_traces.py.

    made: None never prefetches. budget: predictions used of each N (default all). leads: which leads are used, from 1
    (default all). keep: False empties each layer's slots once it has run, so nothing is cached between tokens. warmup:
    first tokens that fill the cache and are not reported.
    Errors: ConfigError if trace, predictions and cache are of different shapes.
    """
    _check(ids, cfg, made, warmup)
    cache = ExpertCache(cfg, next_uses(ids, cfg.num_experts) if cfg.eviction == 'belady' else None)
    run = _Run(cache, times)
    before = (0, 0)
    for t, token in enumerate(ids):
        if t == warmup:
            cache.reset_counts()
            before = (run.clock, run.stall)
        cache.begin_token()
        _predict(cache, made, t, 0, budget, leads)
        run.start_link()
        for layer, wanted in enumerate(token):
            says = made is not None and (made[t, layer + 1] >= 0).any()
            run.compute(times.attention + (times.predict if says else 0))
            plan = cache.want(layer, wanted)
            _predict(cache, made, t, layer + 1, budget, leads)
            run.start_link()
            run.wait(plan.slots)
            run.compute(times.experts)
            cache.used(plan.slots)
            if not keep:
                cache.forget(layer)
            run.start_link()
        run.compute(times.token)
        run.start_link()
    return _report(cache, ids.shape[0] - warmup, run.clock - before[0], run.stall - before[1])


class _Run:
    """Two clocks: of the compute unit, and of the copy on the link."""

    def __init__(self, cache: ExpertCache, times: Times):
        self.cache, self.times = cache, times
        self.clock = self.stall = 0
        self.copy: Copy | None = None
        self.ends: float = 0

    def compute(self, duration) -> None:
        """Meanwhile the link goes on. The caller calls `start_link` after what it changes at that moment: what ends
        just then frees the link for a demand of the same moment, before any prefetch."""
        until = self.clock + duration
        while self.copy is not None and self.ends <= until:
            self._arrive()
            if self.ends < until:
                self._begin(self.ends)
        self.clock = until

    def wait(self, slots) -> None:
        """Until all of these are there."""
        while not self.cache.ready(slots):
            self.stall += self.ends - self.clock
            self.clock = self.ends
            self._arrive()
            self._begin(self.clock)

    def start_link(self) -> None:
        if self.copy is None:
            self._begin(self.clock)

    def _arrive(self) -> None:
        self.cache.loaded(self.copy.slot)
        self.copy = None

    def _begin(self, moment) -> None:
        self.copy = self.cache.next_copy()
        self.ends = moment + self.times.copy


def next_uses(ids: np.ndarray, num_experts: int) -> Any:
    """The `future` of an ExpertCache that runs this trace."""
    tokens, layers = ids.shape[:2]
    table = np.full((tokens + 2, layers, num_experts), NEVER)  # [t, l, e]: first use in token t or later
    for t in reversed(range(tokens)):
        table[t] = table[t + 1]
        np.put_along_axis(table[t], ids[t].astype(int), t * layers + np.arange(layers)[:, None], 1)

    def future(of_layers, experts, position):
        token, layer = divmod(position, layers)
        return table[np.minimum(token + (of_layers <= layer), tokens), of_layers, experts]
    return future


def _predict(cache, made, t, at, budget, leads) -> None:
    if made is None:
        return
    for i in range(made.shape[2]):
        if leads is None or i + 1 in leads:
            guesses = made[t, at, i, :budget]
            guesses = guesses[guesses >= 0]
            if guesses.size:
                cache.predict(at + i, guesses)


def _check(ids, cfg, made, warmup) -> None:
    if ids.ndim != 3 or ids.shape[1] != cfg.num_layers:
        raise ConfigError(f'simulate: ids must be [tokens, {cfg.num_layers}, experts], got {ids.shape}')
    if made is not None and (made.ndim != 4 or made.shape[:2] != (ids.shape[0], ids.shape[1] + 1)):
        raise ConfigError(f'simulate: made must be [{ids.shape[0]}, {ids.shape[1] + 1}, leads, count], got '
                          f'{made.shape}')
    if not 0 <= warmup < ids.shape[0]:
        raise ConfigError(f'simulate: warmup must be in 0..{ids.shape[0] - 1}, got {warmup}')


def _report(cache, tokens, total, stall) -> Report:
    c, moved = cache.counts, cache.bytes_moved()
    return Report(tokens, total, stall, c.requests, c.hits, c.late, c.demand, moved['demand'], moved['prefetch'],
                  moved['wasted'], c.duplicates, c.stale)
