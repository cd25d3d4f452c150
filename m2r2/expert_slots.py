"""What an expert cache is made of: its settings, its answers, and the table of which key owns which slot.

Bookkeeping only; m2r2/expert_cache.py decides. A key is (layer, expert), both from 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from backbone.errors import ConfigError
from m2r2.eviction import EVICTIONS

EMPTY, LOADING, READY = 0, 1, 2  # of a slot. LOADING: given to a key, its bytes are not there yet


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """num_layers: MoE layers of the model. slots: in all, or of each layer with per_layer. expert_bytes: of one expert,
    for the counts. batch: rows that decode together; a layer may then want up to experts_per_token * batch experts, and
    that many slots are the least. With no more than these no prefetch starts: one on its way to the wrong expert would
    leave too few. eviction: a name of m2r2.eviction.EVICTIONS."""

    num_layers: int
    num_experts: int
    experts_per_token: int
    slots: int
    per_layer: bool = False
    eviction: str = 'lru'
    batch: int = 1
    expert_bytes: int = 1

    def __post_init__(self):
        for name in ('num_layers', 'num_experts', 'experts_per_token', 'batch', 'expert_bytes'):
            if getattr(self, name) < 1:
                raise ConfigError(f'expert_cache.{name} must be at least 1, got {getattr(self, name)}')
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f'expert_cache.experts_per_token must be at most num_experts {self.num_experts}, '
                              f'got {self.experts_per_token}')
        if self.slots < self.most_wanted:
            raise ConfigError(f'expert_cache.slots must be at least {self.most_wanted}, the experts one layer may want '
                              f'(experts_per_token x batch), got {self.slots}')
        if self.eviction not in EVICTIONS:
            raise ConfigError(f'expert_cache.eviction: unknown {self.eviction!r}, one of {", ".join(EVICTIONS)}')

    @property
    def most_wanted(self) -> int:
        """Distinct experts one layer may want at once."""
        return min(self.experts_per_token * self.batch, self.num_experts)

    @property
    def total_slots(self) -> int:
        """Slots on the device. With per_layer, layer l owns slots l * slots .. (l + 1) * slots - 1."""
        return self.slots * (self.num_layers if self.per_layer else 1)


@dataclasses.dataclass(frozen=True)
class Copy:
    """One expert to be copied. evicted: the key whose weights lie in the slot until then, None for an empty one."""

    layer: int
    expert: int
    slot: int
    kind: str
    evicted: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Answer of `want`. slots: int32 of the shape of the ids, where each expert is to be read once it is there.

    hits, late, demand: the distinct experts by what became of them: there already; on their way, begun by a prefetch;
    to be fetched now. waiting: slots of the last two, which must be READY before the experts run."""

    layer: int
    slots: np.ndarray
    hits: tuple[int, ...]
    late: tuple[int, ...]
    demand: tuple[int, ...]
    waiting: tuple[int, ...]


@dataclasses.dataclass
class Counts:
    """Since the start or the last `reset_counts`. Always hits + late + demand == requests (distinct experts wanted).

    demand_copies, prefetch_copies: begun, by `next_copy`. wasted: prefetches evicted without one use. stale: requests
    dropped because their layer had passed or a newer prediction left them out. duplicates: predictions of what is
    there, on its way or asked for."""

    requests: int = 0
    hits: int = 0
    late: int = 0
    demand: int = 0
    demand_copies: int = 0
    prefetch_copies: int = 0
    wasted: int = 0
    evictions: int = 0
    stale: int = 0
    duplicates: int = 0


class SlotTable:
    """Which key owns which slot, whether its bytes are there, who holds it.

    By slot [total_slots]: layers, experts (-1: nobody's), state, pins, last (tick of the last use, or of being given
    to the key), fetched (by a prefetch, not used since). By key [num_layers, num_experts]: slot_of (-1: no slot)."""

    def __init__(self, cfg: CacheConfig):
        n = cfg.total_slots
        self.cfg = cfg
        self.layers, self.experts = np.full(n, -1), np.full(n, -1)
        self.state, self.pins = np.full(n, EMPTY), np.zeros(n, int)
        self.last, self.fetched = np.zeros(n, np.int64), np.zeros(n, bool)
        self.slot_of = np.full((cfg.num_layers, cfg.num_experts), -1)
        self.tick = 0

    def pool(self, layer: int) -> np.ndarray:
        """The slots that experts of this layer may have."""
        n = self.cfg.slots
        return np.arange(layer * n, (layer + 1) * n) if self.cfg.per_layer else np.arange(n)

    def free(self, layer: int) -> np.ndarray:
        """Of the pool, what may be given away: empty, or ready and not pinned."""
        pool = self.pool(layer)
        return pool[(self.state[pool] != LOADING) & (self.pins[pool] == 0)]

    def unasked(self, layer: int) -> int:
        """Slots of the pool that a prefetch is on its way to and nobody has wanted yet."""
        pool = self.pool(layer)
        return int(((self.state[pool] == LOADING) & (self.pins[pool] == 0)).sum())

    def key(self, slot: int) -> tuple[int, int] | None:
        return None if self.state[slot] == EMPTY else (int(self.layers[slot]), int(self.experts[slot]))

    def give(self, layer: int, expert: int, slot: int) -> None:
        """An empty slot to a key; LOADING from now on."""
        self.layers[slot], self.experts[slot], self.state[slot] = layer, expert, LOADING
        self.slot_of[layer, expert] = slot
        self.touch(slot)

    def clear(self, slot: int) -> None:
        self.slot_of[self.layers[slot], self.experts[slot]] = -1
        self.layers[slot] = self.experts[slot] = -1
        self.state[slot], self.fetched[slot] = EMPTY, False

    def touch(self, slot: int) -> None:
        self.tick += 1
        self.last[slot] = self.tick
