"""The policy of the expert cache: against an OrderedDict, by script, and in random walks with a model of the bytes."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.errors import ConfigError
from m2r2.eviction import EVICTIONS
from m2r2.expert_cache import READY, CacheConfig, CacheMisuse, ExpertCache
from m2r2.expert_sim import next_uses
from m2r2.expert_slots import SlotTable

L, E, K = 3, 6, 2


def make(slots, eviction='lru', layers=L, experts=E, k=K, **more):
    return ExpertCache(CacheConfig(layers, experts, k, slots, eviction=eviction, **more))


def copy_all(cache, prefetch=True):
    """Every copy there is to make, each arrived before the next begins: [(layer, expert)]."""
    made = []
    while (copy := cache.next_copy(prefetch)) is not None:
        cache.loaded(copy.slot)
        made.append((copy.layer, copy.expert))
    return made


def run_layer(cache, layer, ids):
    plan = cache.want(layer, ids)
    copy_all(cache, prefetch=False)
    cache.used(plan.slots)
    return plan


# --- against a reference ----------------------------------------------------------------------------------------


class Reference:
    def __init__(self, slots):
        self.slots, self.kept = slots, OrderedDict()

    def want(self, keys):
        hits = [key for key in keys if key in self.kept]
        for key in keys:
            self.kept[key] = True
            self.kept.move_to_end(key)
        while len(self.kept) > self.slots:
            self.kept.popitem(last=False)
        return hits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2 ** 32), slots=st.integers(K, 10), per_layer=st.booleans(), tokens=st.integers(1, 8))
def test_lru_is_an_ordered_dict(seed, slots, per_layer, tokens):
    rng = np.random.default_rng(seed)
    cache = make(slots, per_layer=per_layer)
    pools = [Reference(slots) for _ in range(L if per_layer else 1)]
    for _ in range(tokens):
        cache.begin_token()
        for layer in range(L):
            keys = [(layer, e) for e in rng.permutation(E)[:K].tolist()]
            pool = pools[layer if per_layer else 0]
            hits = pool.want(keys)
            plan = run_layer(cache, layer, [e for _, e in keys])
            assert [(layer, e) for e in plan.hits] == hits
            held = {cache.key(s) for s in cache.table.pool(layer).tolist()} - {None}
            assert held == set(pool.kept)


def test_the_reference_tells_lru_from_another_policy():
    cache, reference = make(2, 'least_stale', k=1), Reference(2)
    hits = [0, 0]
    for _ in range(4):
        cache.begin_token()
        for layer in range(L):
            hits[0] += len(reference.want([(layer, 0)]))
            hits[1] += len(run_layer(cache, layer, [0]).hits)
    assert hits[0] == 0 < hits[1]  # a cache one slot short of a token's experts: recency never hits


# --- invariants -------------------------------------------------------------------------------------------------


class Bytes:
    """What lies in each slot, as a runtime would see it: garbage from a copy's begin to its end."""

    def __init__(self, cache):
        self.cache, self.inside, self.link = cache, {}, []
        self.reading, self.copies = {}, []

    def begin(self, prefetch=True):
        copy = self.cache.next_copy(prefetch)
        if copy is None:
            return False
        assert copy.slot not in self.reading, 'a slot whose experts are running is overwritten'
        assert copy.slot not in [c.slot for c in self.link], 'two copies into one slot'
        assert copy.evicted is None or copy.evicted != (copy.layer, copy.expert)
        self.inside[copy.slot] = None
        self.link.append(copy)
        self.copies.append(copy)
        return True

    def arrive(self):
        copy = self.link.pop(0)
        self.inside[copy.slot] = (copy.layer, copy.expert)
        self.cache.loaded(copy.slot)

    def check(self):
        table = self.cache.table
        owned = {s: self.cache.key(s) for s in range(table.state.size) if self.cache.key(s) is not None}
        assert len(set(owned.values())) == len(owned) == (table.slot_of >= 0).sum()
        assert all(table.slot_of[key] == s for s, key in owned.items())
        assert all(s in owned for s in np.flatnonzero(table.pins).tolist())
        assert all(owned[s] == key for s, key in self.reading.items())
        assert all(self.inside[s] == owned[s] for s in np.flatnonzero(table.state == READY).tolist())
        if self.cache.cfg.per_layer:
            assert all(s // self.cache.cfg.slots == key[0] for s, key in owned.items())


def walk(cache, ids, rng, kinds=('true', 'random')):
    """A random runtime: predictions of any quality, copies begun and arriving at any moment."""
    world = Bytes(cache)

    def idle():
        for _ in range(rng.integers(0, 4)):
            if len(world.link) < 2:
                world.begin()
            if world.link and rng.random() < 0.6:
                world.arrive()
            world.check()

    tokens, layers, _ = ids.shape
    for t in range(tokens):
        cache.begin_token()
        for layer in range(layers):
            idle()
            plan = cache.want(layer, ids[t, layer])
            world.reading = {int(s): (layer, int(e)) for s, e in zip(plan.slots, ids[t, layer], strict=True)}
            assert len(plan.hits) + len(plan.late) + len(plan.demand) == len(set(ids[t, layer].tolist()))
            # Reading starts with the copies' end: until then they may still be written.
            running, world.reading = world.reading, {}
            for target in rng.integers(0, layers, rng.integers(0, 3)).tolist():
                later = int(rng.integers(0, 2))
                good = rng.choice(kinds) == 'true' and t + later < tokens
                guess = ids[t + later, target] if good else rng.integers(0, cache.cfg.num_experts, 3)
                cache.predict(target, guess, rng.random(len(guess)), token=t + later)
            idle()
            while not cache.ready(plan.slots):
                world.begin()
                world.arrive()
            for slot, key in running.items():
                assert world.inside[slot] == key, 'the experts start without their weights'
            world.reading = running
            world.check()
            idle()
            cache.used(plan.slots)
            world.reading = {}
    c = cache.counts
    assert c.hits + c.late + c.demand == c.requests == sum(np.unique(x).size for token in ids for x in token)
    assert c.demand_copies == c.demand and cache.demands == 0
    assert c.demand_copies + c.prefetch_copies == len(world.copies)
    moved = cache.bytes_moved()
    assert moved['total'] == len(world.copies) * cache.cfg.expert_bytes
    assert moved['wasted'] <= moved['prefetch']
    return c


def case(seed, slots, per_layer, eviction, table=None, tokens=4):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, L, E)), -1)[..., :K]
    cfg = CacheConfig(L, E, K, slots, per_layer, eviction, expert_bytes=7)
    cache = ExpertCache(cfg, next_uses(ids, E) if eviction == 'belady' else None)
    if table is not None:
        cache.table = table(cfg)
    return walk(cache, ids, rng)


@pytest.mark.parametrize('eviction', EVICTIONS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2 ** 32), slots=st.integers(K, 12), per_layer=st.booleans())
def test_invariants_hold_on_random_walks(eviction, seed, slots, per_layer):
    case(seed, slots, per_layer, eviction)


def broken(seeds, table):
    failed = 0
    for seed in range(seeds):
        try:
            case(seed, 4, False, 'lru', table)
        except (AssertionError, CacheMisuse):
            failed += 1
    return failed


def test_the_invariants_catch_a_table_that_gives_pinned_or_loading_slots_away():
    class EvictsPinned(SlotTable):
        def free(self, layer):
            return self.pool(layer)[self.state[self.pool(layer)] == READY]

    class EvictsLoading(SlotTable):
        def free(self, layer):
            return self.pool(layer)[self.pins[self.pool(layer)] == 0]

        def unasked(self, layer):
            return 0

    assert broken(6, None) == 0
    assert broken(6, EvictsPinned) and broken(6, EvictsLoading)


def test_random_walks_do_meet_every_kind_of_outcome():
    """The walks above would prove little if nothing was ever late or wasted."""
    counts = [case(seed, 5, False, 'lru', tokens=12) for seed in range(4)]
    for name in ('hits', 'late', 'demand', 'prefetch_copies', 'wasted', 'stale', 'duplicates'):
        assert sum(getattr(c, name) for c in counts) > 0, name


# --- by script --------------------------------------------------------------------------------------------------


def test_demand_comes_first_then_the_nearest_layer_then_the_score():
    cache = make(8)
    cache.begin_token()
    cache.predict(2, [5, 4])
    cache.predict(1, [0, 1, 2], [0.1, 0.9, 0.5])
    plan = cache.want(0, [3, 2])
    assert plan.demand == (3, 2) and cache.demands == 2
    assert copy_all(cache) == [(0, 3), (0, 2), (1, 1), (1, 2), (1, 0), (2, 5), (2, 4)]


def test_stale_and_outdated_requests_are_dropped():
    cache = make(8)
    cache.begin_token()
    assert cache.predict(1, [0, 1]) == 2
    assert cache.predict(1, [1, 2]) == 1 and cache.counts.stale == 1  # the newest word: 0 is dropped
    cache.predict(2, [5])
    run_layer(cache, 0, [0, 1])
    cache.want(2, [0, 1])  # a model may skip a layer; 1 has passed
    assert copy_all(cache) == [(2, 0), (2, 1)] and cache.counts.stale == 4
    assert cache.predict(1, [3]) == 0 and cache.next_copy() is None  # came too late
    assert cache.predict(0, [3], token=1) == 1  # but the next token's is welcome
    cache.begin_token()
    assert copy_all(cache) == [(0, 3)]
    cache.predict(2, [5])
    cache.begin_token()
    assert cache.next_copy() is None


def test_a_second_request_moves_nothing():
    cache = make(8)
    cache.begin_token()
    cache.predict(1, [0])
    first = cache.next_copy()
    assert cache.predict(1, [0, 3]) == 1 and cache.next_copy().expert == 3  # 0 is on its way
    cache.loaded(first.slot)
    assert cache.predict(1, [0]) == 0 and cache.next_copy() is None  # and now there
    plan = cache.want(1, [0, 3])
    assert plan.hits == (0,) and plan.late == (3,) and not plan.demand and cache.next_copy() is None
    assert cache.counts.duplicates == 2 and cache.counts.wasted == 0


def test_rows_that_want_the_same_expert_share_its_slot():
    cache = make(4, batch=2)
    cache.begin_token()
    plan = cache.want(0, [[1, 2], [2, 4]])
    assert plan.slots.shape == (2, 2) and plan.slots[0, 1] == plan.slots[1, 0]
    assert cache.counts.requests == 3 and copy_all(cache) == [(0, 1), (0, 2), (0, 4)]
    cache.used(plan.slots)
    assert not cache.table.pins.any()


def test_pinned_slots_stay():
    cache = make(3)
    cache.begin_token()
    first = cache.want(0, [0, 1])
    copy_all(cache)
    with pytest.raises(CacheMisuse, match='layer 1 needs 2 more slots, 1'):
        cache.want(1, [0, 1])
    assert cache.layer == 0 and cache.counts.requests == 2  # as before
    cache.pin(first.slots[:1])
    cache.used(first.slots)
    second = cache.want(1, [0, 1])
    assert first.slots[0] not in second.slots  # still held once
    copy_all(cache)
    cache.used(first.slots[:1])
    cache.used(second.slots)
    with pytest.raises(CacheMisuse, match='not pinned'):
        cache.used(second.slots)


def test_slots_in_flight_stay_and_leave_room_for_one_layer():
    cache = make(3)
    cache.begin_token()
    cache.predict(1, [0, 1, 2])
    flying = cache.next_copy()
    assert cache.next_copy() is None  # 3 slots, 2 may be wanted at once: one prefetch on its way at most
    plan = cache.want(0, [4, 5])
    assert flying.slot not in plan.slots
    assert [cache.next_copy().expert for _ in range(2)] == [4, 5]
    with pytest.raises(CacheMisuse, match='nothing is on its way'):
        cache.loaded(99)
    full = make(2)
    assert full.predict(1, [0], token=0) == 1 and full.next_copy() is None  # no slot to spare


def test_a_prefetch_does_not_evict_what_is_predicted_nearer():
    cache = make(4)
    cache.begin_token()
    run_layer(cache, 0, [0, 1])
    cache.predict(1, [0, 1])
    copy_all(cache)
    cache.predict(2, [5, 4, 3])
    # What layer 0 wanted goes; then nothing is left that is needed later than layer 2.
    assert copy_all(cache) == [(2, 5), (2, 4)]
    cache.predict(1, [0, 1, 2])  # nearer than both of layer 2: the older one goes
    assert copy_all(cache) == [(1, 2)]
    assert {cache.key(s) for s in range(4)} == {(1, 0), (1, 1), (1, 2), (2, 4)} and cache.counts.wasted == 1


def one_eviction(eviction, before, then, slots=3, future=None, predict=()):
    """Keys that go when `then` is wanted, after the layers of `before` ran in one token each. [(layer, expert)]"""
    cache = ExpertCache(CacheConfig(L, E, 1, slots, eviction=eviction), future)
    for token in before:
        cache.begin_token()
        for layer, expert in token:
            run_layer(cache, layer, [expert])
    cache.begin_token()
    for layer, expert in then[:-1]:
        run_layer(cache, layer, [expert])
    for layer, ids in predict:
        cache.predict(layer, ids)
    cache.want(then[-1][0], [then[-1][1]])
    return cache.next_copy().evicted


def test_each_policy_gives_up_what_it_says():
    before, then = [[(0, 0), (1, 0), (2, 0)]], [(0, 0), (1, 5)]
    assert one_eviction('lru', before, then) == (1, 0)
    assert one_eviction('least_stale', before, [(0, 5)]) == (0, 0)
    assert one_eviction('least_stale', [[(1, 0), (2, 0)], [(0, 0)]], [(0, 1)]) == (0, 0)  # LRU: what comes next
    assert one_eviction('lru', [[(1, 0), (2, 0)], [(0, 0)]], [(0, 1)]) == (1, 0)
    # Never wanted again for all that is known, against predicted for this walk.
    assert one_eviction('predicted', before, [(0, 0), (1, 5)], predict=[(2, [0])]) == (1, 0)
    assert one_eviction('predicted', [[(1, 0), (2, 0)], [(0, 0)]], [(0, 1)], predict=[(1, [0]), (2, [4])]) == (2, 0)
    # The same without a prediction: rarely wanted goes before often wanted.
    often = [[(1, 0), (2, 0)]] * 3 + [[(1, 0), (2, 1)]]
    assert one_eviction('predicted', often, [(0, 1)]) == (2, 1)
    truth = {(0, 0): 5, (1, 0): 3, (2, 0): 9}

    def future(layers, experts, position):
        return np.array([truth[int(l), int(e)] for l, e in zip(layers, experts, strict=True)])
    assert one_eviction('belady', before, [(0, 5)], future=future) == (2, 0)


def test_preload_and_forget_count_no_traffic():
    cache = make(4)
    assert [c.slot for c in cache.preload([(0, 1), (1, 1)])] == [0, 1]
    with pytest.raises(CacheMisuse, match='preload'):
        cache.preload([(0, 1)])
    cache.begin_token()
    plan = cache.want(0, [1, 2])
    assert plan.hits == (1,)
    copy_all(cache)
    cache.forget()
    assert {cache.key(s) for s in range(4)} == {(0, 1), (0, 2), None}  # pinned stay
    cache.used(plan.slots)
    cache.forget(layer=1)
    assert cache.key(0) == (0, 1)
    cache.forget()
    assert cache.bytes_moved()['total'] == 1 and not (cache.table.slot_of >= 0).any()


@pytest.mark.parametrize('bad, words', [
    (dict(slots=3, batch=2), 'slots must be at least 4'), (dict(slots=1), 'slots must be at least 2'),
    (dict(slots=9, eviction='fifo'), "unknown 'fifo'"), (dict(slots=9, k=7), 'experts_per_token must be at most'),
    (dict(slots=9, layers=0), 'num_layers must be at least 1'), (dict(slots=9, eviction='belady'), 'future')])
def test_bad_settings_are_named(bad, words):
    with pytest.raises(ConfigError, match=words):
        make(**bad)


def test_calls_out_of_order_are_named():
    cache = make(4)
    with pytest.raises(CacheMisuse, match='want: layer 0'):
        cache.want(0, [1])
    cache.begin_token()
    run_layer(cache, 1, [1])
    for layer, ids in ((0, [1]), (2, [E]), (2, [0, 1, 2])):
        with pytest.raises(CacheMisuse, match='want'):
            cache.want(layer, ids)
    with pytest.raises(CacheMisuse, match='predict'):
        cache.predict(L, [1])
    with pytest.raises(CacheMisuse, match='empty'):
        cache.pin([3])
