"""Which experts lie in which of the device's slots, which are copied next, and which make room. Decides, moves nothing.

A deterministic state machine without clock, thread or array of weights. A runtime with real copies and the simulator
(m2r2/expert_sim.py) drive the same object, so what the one measures the other foretells. One token's walk:

    cache.begin_token()
    for layer in range(num_layers):
        ...attention, router -> ids                       # always the slow stream's: predictions only move bytes
        plan = cache.want(layer, ids)                     # pins; plan.slots: where each expert is or will be
        cache.predict(layer + lead, predicted, scores)    # any number of times, from any source, at any moment
        while (copy := cache.next_copy()) is not None:    # whenever the link can take one: demands first
            ...start copying (copy.layer, copy.expert) into copy.slot; when it has arrived: cache.loaded(copy.slot)
        ...once cache.ready(plan.slots): run the experts out of plan.slots
        cache.used(plan.slots)                            # unpins

A key is (layer, expert), both from 0. Our reading of the ahead-of-time loading of Bhendawade et al., 2025 (arXiv
2502.02040), whose text is not public in full: queue and eviction rules are choices, listed at `next_copy` and in
m2r2/eviction.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from backbone.errors import ConfigError
from m2r2.eviction import EVICTIONS, NEVER
from m2r2.expert_slots import EMPTY, LOADING, READY, CacheConfig, Copy, Counts, Plan, SlotTable

__all__ = ['EMPTY', 'LOADING', 'READY', 'CacheConfig', 'CacheMisuse', 'Copy', 'Counts', 'ExpertCache', 'Plan']

DEMAND, PREFETCH = 'demand', 'prefetch'
RECENT = 0.1  # weight of the newest pass in `ExpertCache.share`: ten passes or so count

Future = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class CacheMisuse(RuntimeError):
    """A call out of order: a bug of the caller, not a bad setting."""


class ExpertCache:
    """The slot table (`table`, m2r2/expert_slots.py) and its policy.

    token: walks begun, -1 before the first. layer: of the last `want` of this walk, -1 before the first. A moment of
    use is counted as token * num_layers + layer ("position"); `now` is that of the last want.
    future: for eviction 'belady' only, (layers [n], experts [n], position) -> positions [n] of their next true use
    after `position`, m2r2.eviction.NEVER where there is none.
    """

    def __init__(self, cfg: CacheConfig, future: Future | None = None):
        if (cfg.eviction == 'belady') != (future is not None):
            raise ConfigError(f'expert_cache.eviction {cfg.eviction!r}: a future is needed by belady, and only by it')
        self.cfg, self.future = cfg, future
        self.table, self.counts = SlotTable(cfg), Counts()
        self.token, self.layer = -1, -1
        # What the policies go by: for which position each key was predicted, the last position predicted for each
        # layer, and in what share of the recent passes of its layer each key was wanted.
        self.predicted = np.full((cfg.num_layers, cfg.num_experts), NEVER)
        self.told = np.full(cfg.num_layers, -1)
        self.share = np.full(self.predicted.shape, cfg.experts_per_token / cfg.num_experts)
        self._demands: deque[Copy] = deque()
        self._queue: list[tuple[int, float, int, int, int]] = []  # (position, -score, order, layer, expert), sorted
        self._queued: set[tuple[int, int]] = set()  # the keys in it
        self._begun: set[int] = set()  # slots whose copy is on the link

    # --- the walk -----------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        return self.token * self.cfg.num_layers + self.layer

    def begin_token(self) -> None:
        """A new walk over the layers starts. What is still queued for the walk before is dropped."""
        self.token, self.layer = self.token + 1, -1
        self._drop_stale()

    def want(self, layer: int, ids: Any) -> Plan:
        """The experts this layer's router chose, of any shape ([K], [batch, K], ...); repeats count once.

        Pins their slots, once a call, and gives a slot to each that has none, evicting; those copies are handed out by
        `next_copy` before everything else. From here on the layer counts as passed: what was queued for it or for an
        earlier one is dropped.
        Errors: CacheMisuse if the walk goes backwards, if more than most_wanted experts are asked for, or if slots that
        earlier calls pinned leave too few; the cache is then as before.
        """
        ids, table = np.asarray(ids), self.table
        distinct = [int(e) for e in dict.fromkeys(ids.ravel().tolist())]
        if self.token < 0 or not max(self.layer, 0) <= layer < self.cfg.num_layers:
            raise CacheMisuse(f'want: layer {layer} after layer {self.layer} of token {self.token}')
        if len(distinct) > self.cfg.most_wanted or not all(0 <= e < self.cfg.num_experts for e in distinct):
            raise CacheMisuse(f'want: needs at most {self.cfg.most_wanted} of {self.cfg.num_experts} experts, '
                              f'got {distinct}')
        found = {e: int(table.slot_of[layer, e]) for e in distinct}
        hits = tuple(e for e in distinct if found[e] >= 0 and table.state[found[e]] == READY)
        late = tuple(e for e in distinct if found[e] >= 0 and table.state[found[e]] == LOADING)
        demand = tuple(e for e in distinct if found[e] < 0)
        held = [found[e] for e in (*hits, *late)]
        if (room := len(set(table.free(layer).tolist()) - set(held))) < len(demand):
            raise CacheMisuse(f'want: layer {layer} needs {len(demand)} more slots, {room} are neither pinned nor on '
                              f'their way: call used() first, or give it more slots')
        self.layer = layer
        self._drop_stale()
        table.pins[held] += 1  # first of all: what is wanted makes no room for what is wanted beside it
        for e in demand:
            found[e], evicted = self._take(layer, e, self._victim(table.free(layer)))
            table.pins[found[e]] += 1
            self._demands.append(Copy(layer, e, found[e], DEMAND, evicted))
        self.share[layer] *= 1 - RECENT
        self.share[layer, distinct] += RECENT
        for e in distinct:
            table.fetched[found[e]] = False
            table.touch(found[e])
        c = self.counts
        c.requests, c.hits = c.requests + len(distinct), c.hits + len(hits)
        c.late, c.demand = c.late + len(late), c.demand + len(demand)
        slots = np.array([found[e] for e in ids.ravel().tolist()], np.int32).reshape(ids.shape)
        return Plan(layer, slots, hits, late, demand, tuple(found[e] for e in (*late, *demand)))

    def used(self, slots: Any) -> None:
        """Unpins each distinct slot once: the experts of a `want` have run, or what reads the slots is queued before
        whatever may write them."""
        slots = np.unique(np.asarray(slots))
        if (self.table.pins[slots] < 1).any():
            raise CacheMisuse(f'used: slots {slots[self.table.pins[slots] < 1].tolist()} are not pinned')
        self.table.pins[slots] -= 1

    def pin(self, slots: Any) -> None:
        """One more pin on each distinct slot, besides `want`'s; `used` takes it off."""
        slots = np.unique(np.asarray(slots))
        if (self.table.state[slots] == EMPTY).any():
            raise CacheMisuse('pin: an empty slot')
        self.table.pins[slots] += 1

    # --- predictions and copies ---------------------------------------------------------------------------------

    def predict(self, layer: int, ids: Any, scores: Any = None, token: int | None = None) -> int:
        """Experts this layer of this token (default: the walk's; a later one is allowed) will probably want.

        ids: any shape, of several rows too, highest score first unless scores [of ids' shape] say; repeats keep their
        best. The newest word on a layer stands: requests for it that are not begun are dropped where it leaves them
        out. What is there, on its way or asked for moves nothing. Returns how many requests were added; 0 if the layer
        has passed, so a prediction that reaches the host too late does no harm.
        """
        position = (self.token if token is None else token) * self.cfg.num_layers + layer
        ids = [int(e) for e in np.asarray(ids).ravel().tolist()]
        if not 0 <= layer < self.cfg.num_layers or not all(0 <= e < self.cfg.num_experts for e in ids):
            raise CacheMisuse(f'predict: no such layer or expert: layer {layer}, experts {ids}')
        if position <= self.now:
            self.counts.stale += len(set(ids))
            return 0
        ranks = [-i for i in range(len(ids))] if scores is None else np.asarray(scores).ravel().tolist()
        best: dict[int, float] = {}
        for e, score in zip(ids, ranks, strict=True):
            best[e] = max(score, best.get(e, score))
        before = {entry[4] for entry in self._queue if entry[0] == position}
        self.counts.stale += len(before - set(best))
        self._keep(lambda entry: entry[0] != position)
        self.predicted[layer][self.predicted[layer] == position] = NEVER
        self.told[layer] = position
        added = 0
        for e, score in best.items():
            # Predicted for two walks at once, the nearer counts: until then it may not go.
            self.predicted[layer, e] = min(position, self.predicted[layer, e])
            if self.table.slot_of[layer, e] >= 0 or (layer, e) in self._queued:
                self.counts.duplicates += 1
                continue
            self.table.tick += 1
            self._queue.append((position, -score, self.table.tick, layer, e))
            self._queued.add((layer, e))
            added += e not in before
        self._queue.sort()
        return added

    def next_copy(self, prefetch: bool = True) -> Copy | None:
        """The next copy to begin, or None. The caller begins it and says `loaded` when it has arrived.

        Demands first, in the order wanted; then, unless prefetch is False, what was predicted: nearest use first, then
        highest score. A prefetch takes an empty slot or evicts what is ready, not pinned, and not predicted for the
        newcomer's layer or a nearer one; as long as there is no such slot it waits. Of each pool of slots as many as
        one layer may want are never on their way unasked.
        """
        if self._demands:
            copy = self._demands.popleft()
            self._begun.add(copy.slot)
            self.counts.demand_copies += 1
            return copy
        refused = set()
        for position, _, _, layer, expert in self._queue if prefetch else ():
            pool = layer if self.cfg.per_layer else 0
            if pool not in refused:
                slot = self._prefetch_slot(layer, position)
                if slot is not None:
                    slot, evicted = self._take(layer, expert, slot)
                    self.table.fetched[slot] = True
                    self._begun.add(slot)
                    self.counts.prefetch_copies += 1
                    return Copy(layer, expert, slot, PREFETCH, evicted)
                refused.add(pool)
        return None

    def loaded(self, slot: int) -> None:
        """The copy that `next_copy` gave for this slot has arrived."""
        if slot not in self._begun:
            raise CacheMisuse(f'loaded: nothing is on its way to slot {slot}')
        self._begun.remove(slot)
        self.table.state[slot] = READY

    # --- what a caller may ask, and do at the edges -------------------------------------------------------------

    def ready(self, slots: Any) -> bool:
        return bool((self.table.state[np.asarray(slots)] == READY).all())

    def key(self, slot: int) -> tuple[int, int] | None:
        """(layer, expert) the slot belongs to, its bytes there or not; None: nobody."""
        return self.table.key(slot)

    @property
    def in_flight(self) -> int:
        """Copies begun and not yet loaded."""
        return len(self._begun)

    @property
    def demands(self) -> int:
        """Demands not yet handed out by `next_copy`."""
        return len(self._demands)

    def bytes_moved(self) -> dict[str, int]:
        """By why: 'demand', 'prefetch', of which 'wasted'; 'total' is the first two."""
        c, size = self.counts, self.cfg.expert_bytes
        return {'demand': c.demand_copies * size, 'prefetch': c.prefetch_copies * size, 'wasted': c.wasted * size,
                'total': (c.demand_copies + c.prefetch_copies) * size}

    def reset_counts(self) -> None:
        """Zero all counts, the experts stay: a warm-up is over."""
        self.counts = Counts()

    def preload(self, keys: Iterable[tuple[int, int]]) -> list[Copy]:
        """Fills empty slots, counting nothing; the caller copies what is returned before it goes on.
        Errors: CacheMisuse for a key that has a slot, or when none is empty."""
        copies = []
        for layer, expert in keys:
            pool = self.table.pool(layer)
            empty = pool[self.table.state[pool] == EMPTY]
            if not empty.size or self.table.slot_of[layer, expert] >= 0:
                raise CacheMisuse(f'preload: no room for expert {expert} of layer {layer}, or it is there')
            slot, _ = self._take(layer, expert, int(empty[0]))
            self.table.state[slot] = READY
            copies.append(Copy(layer, expert, slot, 'preload'))
        return copies

    def forget(self, layer: int | None = None) -> None:
        """Empties the slots (of this layer) that are ready and not pinned: after each layer, there is no cache."""
        of_layer = True if layer is None else self.table.layers == layer
        for slot in np.flatnonzero((self.table.state == READY) & (self.table.pins == 0) & of_layer).tolist():
            self._evict(slot)

    def next_use(self, slots: np.ndarray) -> np.ndarray:
        """Position for which what lies in each slot is predicted (with a future: known); NEVER if it is not."""
        layers, experts = self.table.layers[slots], self.table.experts[slots]
        return self.predicted[layers, experts] if self.future is None else self.future(layers, experts, self.now)

    # --- inside -------------------------------------------------------------------------------------------------

    def _victim(self, slots: np.ndarray) -> int:
        """Of these: the first empty one, else the one the policy gives up most willingly, then the least recent."""
        empty = slots[self.table.state[slots] == EMPTY]
        if empty.size:
            return int(empty[0])
        willing = EVICTIONS[self.cfg.eviction](self, slots)
        worst = slots[willing == willing.max()]
        return int(worst[np.argmin(self.table.last[worst])])

    def _prefetch_slot(self, layer: int, position: int) -> int | None:
        if self.table.unasked(layer) >= self.cfg.slots - self.cfg.most_wanted:
            return None
        slots = self.table.free(layer)
        slots = slots[(self.table.state[slots] == EMPTY) | (self.next_use(slots) > position)]
        return self._victim(slots) if slots.size else None

    def _take(self, layer: int, expert: int, slot: int) -> tuple[int, tuple[int, int] | None]:
        """The slot to this key, out of whose hands it came."""
        evicted = self.table.key(slot)
        if evicted is not None:
            self._evict(slot)
        self.table.give(layer, expert, slot)
        if (layer, expert) in self._queued:
            self._keep(lambda entry: entry[3:] != (layer, expert))
        return slot, evicted

    def _evict(self, slot: int) -> None:
        self.counts.evictions += 1
        self.counts.wasted += int(self.table.fetched[slot])
        self.table.clear(slot)

    def _drop_stale(self) -> None:
        before = len(self._queue)
        self._keep(lambda entry: entry[0] > self.now)
        self.counts.stale += before - len(self._queue)
        self.predicted[self.predicted <= self.now] = NEVER

    def _keep(self, condition: Callable[[tuple], bool]) -> None:
        self._queue = [entry for entry in self._queue if condition(entry)]
        self._queued = {entry[3:] for entry in self._queue}
