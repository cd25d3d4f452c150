"""Who makes room in an expert cache: for each slot that may be given up, how willingly. Ties go to the least recent.

Each policy is a function (cache, slots [n]) -> [n], the largest goes first. The slots are ready and not pinned, and
`cache` is only read; m2r2/expert_cache.py says what else protects a slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from m2r2.expert_cache import ExpertCache

NEVER = np.iinfo(np.int64).max  # a position that no walk reaches


def lru(cache: ExpertCache, slots: np.ndarray) -> np.ndarray:
    """Least recently used; being copied in counts as a use."""
    return np.zeros(slots.size)


def least_stale(cache: ExpertCache, slots: np.ndarray) -> np.ndarray:
    """What this token's walk has passed, the least recently used first; only then what is still ahead of it.

    Our reading of the idea named in SpecMD (arXiv 2602.03921), of which only the opening was read: the walk over the
    layers makes it sure that a passed layer is not wanted again before the next token, which recency alone turns upside
    down (a cache smaller than one token's experts then never hits).
    """
    return cache.table.layers[slots] <= cache.layer


def predicted_use(cache: ExpertCache, slots: np.ndarray) -> np.ndarray:
    """Furthest expected next use: the predicted one; without a prediction, the next pass of the layer that may want it
    plus as many walks as its share of recent passes lets expect."""
    layers, experts, n = cache.table.layers[slots], cache.table.experts[slots], cache.cfg.num_layers
    ahead = (cache.token + (layers <= cache.layer)) * n + layers
    ahead = np.where(cache.told[layers] == ahead, ahead + n, ahead)  # that pass was predicted, and without this one
    expected = ahead + n * (1 / cache.share[layers, experts] - 1)
    known = cache.predicted[layers, experts]
    return np.where(known != NEVER, known, expected)


def belady(cache: ExpertCache, slots: np.ndarray) -> np.ndarray:
    """Furthest true next use, which only a simulator knows (Belady, 1966: optimal for demands alone)."""
    return cache.next_use(slots)


EVICTIONS = {'lru': lru, 'least_stale': least_stale, 'predicted': predicted_use, 'belady': belady}
