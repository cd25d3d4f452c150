"""Which sublayers to leave out: every way to look for a set, behind one interface.

    search.suggest() -> SkipConfig, or None when it is done        search.observe(skip, score)

A set has k sublayers, or any number (k None: free). Layers' attentions are the numbers 0..L-1, with `mlp` their MLPs
L..2L-1. What a search says depends on the scores it was told alone: with a `Table` of scores a search that was killed
goes on where it stopped and ends as it would have.

RAD relaxes the choice to z in [0, 1]^L and takes the k largest (Hoshino et al., 2025, arXiv 2505.22135, through a
second hand); its optimiser is not known. Here it is optuna's TPE, beside the simple selections that it has to beat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from backbone.errors import ConfigError
from rad.skip import SkipConfig

METHODS = ('leave_one_out', 'greedy', 'random', 'evenly', 'last', 'output_kl', 'tpe')
Chosen = tuple[int, ...]
Moves = Generator[Chosen, float, None]


@dataclasses.dataclass(frozen=True)
class Space:
    """Sets of k sublayers of num_layers layers; k None: any number of them."""

    num_layers: int
    k: int | None = None
    mlp: bool = False

    def __post_init__(self):
        if self.k is not None and not 1 <= self.k <= self.size:
            raise ConfigError(f'k: {self.k} is not in 1..{self.size}, the sublayers that can be left out')

    @property
    def size(self) -> int:
        return self.num_layers * (2 if self.mlp else 1)

    @property
    def sizes(self) -> Sequence[int]:
        """How many a set may have, the empty one left out."""
        return range(1, self.size + 1) if self.k is None else (self.k,)

    def skip(self, chosen: Sequence[int]) -> SkipConfig:
        """Errors: ConfigError for a number that is no sublayer."""
        if beyond := [i for i in chosen if not 0 <= i < self.size]:
            raise ConfigError(f'sublayer {beyond[0]} is not in 0..{self.size - 1}')
        layers = self.num_layers
        return SkipConfig(tuple(sorted(i for i in chosen if i < layers)),
                          tuple(sorted(i - layers for i in chosen if i >= layers)))

    def chosen(self, skip: SkipConfig) -> Chosen:
        return (*skip.attention, *(self.num_layers + l for l in skip.mlp))


def top_k(z: Sequence[float], k: int) -> Chosen:
    """The places of the k largest, rising; of equal ones the lower place."""
    return tuple(sorted(np.argsort(-np.asarray(z, float), kind='stable')[:k].tolist()))


def evenly(size: int, k: int) -> Chosen:
    """Every (size / k)-th from 0 on: every second one where k is half, as hybrids are usually made."""
    return tuple(i * size // k for i in range(k))


# --- the simple ones: what to try next, given the scores so far -----------------------------------------------------


def leave_one_out(space: Space) -> Moves:
    """Each alone, then the best k together; free: the best one, the best two, .. of that order."""
    alone = []
    for i in range(space.size):
        alone.append((yield (i,)))
    yield from best_first(space, alone)


def best_first(space: Space, worth: Sequence[float]) -> Moves:
    """The k of the highest worth; free: of each number, but for the empty set."""
    for k in space.sizes:
        yield top_k(worth, k)


def greedy(space: Space, width: int = 0) -> Moves:
    """Adds the one that leaves the best score, until there are k; free: as long as the score rises.

    width > 0: only that many are tried for each place after the first, those that were best alone.
    """
    alone = []
    for i in range(space.size):
        alone.append((yield (i,)))
    order = np.argsort(-np.asarray(alone), kind='stable').tolist()
    chosen, reached = [order[0]], alone[order[0]]
    while len(chosen) < (space.k or space.size):
        rest = [i for i in order if i not in chosen]
        tried, scores = rest[:width] if width else rest, []
        for i in tried:
            scores.append((yield tuple(sorted((*chosen, i)))))
        best = int(np.argmax(scores))
        if space.k is None and scores[best] <= reached:
            return
        chosen, reached = [*chosen, tried[best]], scores[best]


def at_random(space: Space, count: int, seed: int) -> Moves:
    """`count` sets; free: of a number that is drawn first."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        k = int(rng.choice(np.asarray(space.sizes)))
        yield tuple(sorted(rng.choice(space.size, k, replace=False).tolist()))


def _fixed(space: Space, of: Callable[[int], Chosen]) -> Moves:
    for k in space.sizes:
        yield of(k)


class Search(Protocol):
    """`best`: (set, score) of those of the space that were observed, the first of equals; None before."""

    space: Space
    best: tuple[SkipConfig, float] | None

    def suggest(self) -> SkipConfig | None:
        """The set whose score is wanted next; asked again before it is observed, the same."""

    def observe(self, skip: SkipConfig, score: float) -> None:
        """Higher is better. skip: what was suggested."""


class Seen:
    """What every search remembers."""

    def __init__(self, space: Space):
        self.space, self.best, self.seen = space, None, []

    def remember(self, skip: SkipConfig, score: float) -> None:
        self.seen.append((skip, float(score)))
        fits = self.space.k is None or len(self.space.chosen(skip)) == self.space.k
        if fits and (self.best is None or score > self.best[1]):
            self.best = (skip, float(score))

    @property
    def evaluations(self) -> int:
        """Sets it has asked for, each counted once: what it would have cost alone."""
        return len({skip for skip, _ in self.seen})


class Stepwise(Seen):
    """A Search from moves."""

    def __init__(self, space: Space, moves: Moves):
        super().__init__(space)
        self._moves, self._next = moves, next(moves, None)

    def suggest(self) -> SkipConfig | None:
        return None if self._next is None else self.space.skip(self._next)

    def observe(self, skip: SkipConfig, score: float) -> None:
        check_asked(skip, self.suggest())
        self.remember(skip, score)
        try:
            self._next = self._moves.send(float(score))
        except StopIteration:
            self._next = None


def check_asked(skip: SkipConfig, asked: SkipConfig | None) -> None:
    if skip != asked:
        raise ConfigError(f'observed {skip}, but {asked} was suggested')


def make(method: str, space: Space, *, trials: int = 60, seed: int = 0, width: int = 0,
         harm: Sequence[float] | None = None, first: Sequence[SkipConfig] = (),
         storage: str | Path | None = None) -> Search:
    """A search by name. trials: of random and tpe. width: of greedy. harm: one a sublayer, of output_kl (the KL that
    leaving it out brings; those evaluations are not counted here). first, storage: of tpe.

    Errors: ConfigError names an unknown method, and what one lacks.
    """
    if method not in METHODS:
        raise ConfigError(f'search: unknown method {method!r}, one of {", ".join(METHODS)}')
    if trials < 1:
        raise ConfigError(f'search: trials must be at least 1, got {trials}')
    if width < 0:
        raise ConfigError(f'search: width must not be negative, got {width}')
    if method == 'tpe':
        from rad.tpe import Tpe  # it brings optuna

        return Tpe(space, trials, seed, first, storage)
    if method == 'output_kl' and (harm is None or len(harm) != space.size):
        raise ConfigError(f'search output_kl needs {space.size} values of harm, one a sublayer')
    size = space.size
    moves = {'leave_one_out': lambda: leave_one_out(space), 'greedy': lambda: greedy(space, width),
             'random': lambda: at_random(space, trials, seed),
             'evenly': lambda: _fixed(space, lambda k: evenly(size, k)),
             'last': lambda: _fixed(space, lambda k: tuple(range(size - k, size))),
             'output_kl': lambda: best_first(space, -np.asarray(harm, float))}
    return Stepwise(space, moves[method]())
