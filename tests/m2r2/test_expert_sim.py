"""The simulator against closed forms, bounds and brute force; the recorded predictors; the recall table."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.errors import ConfigError, DataError
from backbone.presets import PRESETS
from configs.expert_hardware import CASES
from harness import roofline
from m2r2 import expert_times
from m2r2 import expert_traces as traces
from m2r2.eviction import EVICTIONS, NEVER
from m2r2.expert_cache import CacheConfig
from m2r2.expert_sim import Times, next_uses, resident, simulate
from m2r2.recall import recall, table
from scripts import expert_simulation

L, E, K = 4, 8, 2
IDS = traces.synthetic(12, L, E, K, stay=0.4, seed=1)


def config(slots=L * E, **more):
    return CacheConfig(L, E, K, slots, expert_bytes=3, **more)


def on_demand(ids, times):
    return simulate(ids, times, config(), keep=False)


# --- closed forms -----------------------------------------------------------------------------------------------

WAYS = [Times(attention=2, experts=5, copy=c, token=1) for c in (0, 1, 3, 20)] + [Times(0, 4, 2), Times(3, 0, 2)]


@pytest.mark.parametrize('times', WAYS, ids=str)
def test_on_demand_is_m_copies_and_the_compute(times):
    got = on_demand(IDS, times)
    one_layer = K * times.copy + times.attention + times.experts
    assert got.total == len(IDS) * (L * one_layer + times.token)
    assert got.demand == got.requests == IDS.size and got.stall == IDS.size * times.copy
    # The form is not met by what keeps experts.
    assert not times.copy or simulate(IDS, times, config()).total < got.total


@pytest.mark.parametrize('times', WAYS, ids=str)
def test_a_layer_ahead_the_period_is_the_larger_of_copying_and_computing(times):
    got = simulate(IDS, times, config(2 * K), traces.oracle(IDS), keep=False)
    fetch, compute = K * times.copy, times.attention + times.experts
    # The first layer of a token has no prediction; the last one's experts have nothing left to hide.
    token = times.attention + fetch + (L - 1) * max(fetch, compute) + times.experts + times.token
    assert got.total == len(IDS) * token
    assert got.wasted_bytes == 0 and got.bytes_moved == 3 * IDS.size


def test_the_predictor_costs_what_it_says_and_two_tokens_do_not_share_time():
    times = Times(2, 5, 1)
    plain, slow = (simulate(IDS, t, config(2 * K), traces.oracle(IDS), keep=False)
                   for t in (times, dataclasses.replace(times, predict=4)))
    assert slow.total == plain.total + len(IDS) * (L - 1) * 4


def test_overlap_alone_gains_two_at_most_and_comes_near():
    ids = traces.synthetic(1, 60, E, K)
    cfg = CacheConfig(60, E, K, 2 * K)
    ratios = []
    for copy in (1, 5, 10, 20, 200):
        times = Times(4, 16, copy)
        ratios.append(simulate(ids, times, cfg, keep=False).total
                      / simulate(ids, times, cfg, traces.oracle(ids), keep=False).total)
    assert max(ratios) <= 2 and ratios[2] == max(ratios) > 1.9


# --- bounds -----------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), attention=st.integers(0, 9), experts=st.integers(0, 9), copy=st.integers(0, 9),
       slots=st.integers(2 * K, L * E), eviction=st.sampled_from(list(EVICTIONS)))
def test_resident_perfect_on_demand_in_this_order(seed, attention, experts, copy, slots, eviction):
    ids, times = traces.synthetic(5, L, E, K, seed=seed), Times(attention, experts, copy)
    ahead = simulate(ids, times, config(slots, eviction=eviction), traces.oracle(ids))
    assert resident(ids, times).total <= ahead.total <= on_demand(ids, times).total


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), slots=st.integers(K, L * E), eviction=st.sampled_from(list(EVICTIONS)),
       guess=st.sampled_from(['none', 'oracle', 'random', 'previous', 'frequency', 'noisy']))
def test_every_request_is_counted_once_and_every_byte_is_a_copy(seed, slots, eviction, guess):
    ids = traces.synthetic(5, L, E, K, seed=seed)
    got = simulate(ids, Times(2, 3, 2), config(slots, eviction=eviction), predictors(ids).get(guess))
    assert got.hits + got.late + got.demand == got.requests == ids.size
    assert got.bytes_moved % 3 == 0 and got.demand_bytes == 3 * got.demand and got.wasted_bytes <= got.prefetch_bytes
    assert got.total == 5 * L * 5 + got.stall
    # What was fetched was either wanted, or wasted, or still lies there.
    assert got.prefetch_bytes - got.wasted_bytes <= 3 * (got.late + got.hits + slots)


def predictors(ids):
    return {'oracle': traces.oracle(ids, 2), 'random': traces.random(ids, E, 3, 2),
            'previous': traces.previous(ids, E, 3, 2), 'frequency': traces.frequency(ids, E, 3, 2),
            'noisy': traces.noisy(ids, E, 3, 0.8, 2)}


@pytest.mark.parametrize('leads', [1, 2, 3])
def test_a_perfect_predictor_with_free_slots_leaves_no_demand_after_the_first_layers(leads):
    times = Times(1, 4, 2)
    got = simulate(IDS, times, config(), traces.oracle(IDS, leads))
    first = sum(len(set(token.tolist())) for token in IDS[:, 0])
    assert 0 < got.demand <= first
    assert got.demand == simulate(IDS, times, config(), traces.recorded(IDS, np.full((12, L, 1, 1), -1))).demand \
        - sum(_first_use(IDS)[1:])
    # Known as the token begins, with time to come: none at all.
    assert simulate(IDS, Times(4, 4, 2), config(), traces.oracle(IDS, leads, start=True)).demand == 0


def _first_use(ids):
    """By layer, distinct experts in the trace: what an unbounded cache has to fetch."""
    return [np.unique(ids[:, layer]).size for layer in range(ids.shape[1])]


def test_a_cache_of_everything_fetches_everything_once():
    got = simulate(IDS, Times(1, 1, 1), config())
    assert got.demand == sum(_first_use(IDS)) and got.late == 0
    warm = simulate(IDS, Times(1, 1, 1), config(), warmup=4)
    assert warm.tokens == 8 and warm.requests == 8 * L * K
    assert warm.demand == got.demand - sum(_first_use(IDS[:4]))


def test_belady_needs_fewest_demands():
    for slots in (K, 6, 10, 20):
        demand = {name: simulate(IDS, Times(1, 1, 1), config(slots, eviction=name)).demand for name in EVICTIONS}
        assert demand['belady'] == min(demand.values())
        assert slots != 6 or demand['belady'] < demand['lru']


def test_wrong_prefetches_cost_time():
    """A random predictor is slower than none: its copies hold up the link when a demand comes."""
    times = Times(1, 1, 10)
    plain = on_demand(IDS, times)
    wrong = simulate(IDS, times, config(3 * K), traces.random(IDS, E, 2 * K), keep=False)
    assert wrong.total > plain.total and wrong.bytes_moved > plain.bytes_moved and wrong.wasted_bytes > 0


def test_budget_and_leads_select_predictions():
    times, made = Times(1, 4, 1), traces.oracle(IDS, 3)
    none = simulate(IDS, times, config(6))
    assert simulate(IDS, times, config(6), made, budget=0) == none == simulate(IDS, times, config(6), made, leads=())
    one = simulate(IDS, times, config(6), made, leads=(1,))
    assert one == simulate(IDS, times, config(6), traces.oracle(IDS, 1)) != none
    half = simulate(IDS, times, config(6), made, budget=1, leads=(1,))
    assert 0 < half.prefetch_bytes <= 3 * len(IDS) * (L - 1) < one.prefetch_bytes


def test_the_same_run_twice_is_the_same():
    def run(seed):
        return simulate(IDS, Times(1.1, 2.3, 0.7), config(7, eviction='predicted'), traces.random(IDS, E, 3, 2, seed))
    assert run(3) == run(3) != run(4)


def test_the_future_is_what_brute_force_finds():
    future = next_uses(IDS[:4], E)
    for position in range(-1, 4 * L):
        for layer, expert in ((0, 0), (1, 3), (3, 7)):
            uses = [t * L + layer for t in range(4) if expert in IDS[t, layer] and t * L + layer > position]
            assert future(np.array([layer]), np.array([expert]), position)[0] == (uses or [NEVER])[0]


def test_shapes_that_do_not_fit_are_named():
    for bad in (lambda: simulate(IDS[:, :2], Times(1, 1, 1), config()), lambda: Times(1, -1, 1),
                lambda: Times(1, 1, float('inf')), lambda: simulate(IDS, Times(1, 1, 1), config(), warmup=12),
                lambda: simulate(IDS, Times(1, 1, 1), config(), traces.oracle(IDS)[:, :-1])):
        with pytest.raises(ConfigError):
            bad()


# --- traces, predictors, recall ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['previous', 'frequency'])
def test_predictors_from_the_past_see_nothing_else(name):
    other = IDS.copy()
    other[6:] = (other[6:] + 1) % E
    one, two = (getattr(traces, name)(ids, E, 3, 2) for ids in (IDS, other))
    assert (one[:7] == two[:7]).all() and (one[7:] != two[7:]).any()
    oracle = traces.oracle(IDS), traces.oracle(other)
    assert (oracle[0][6] != oracle[1][6]).any()  # which the oracle fails


def test_previous_and_frequency_say_what_they_mean():
    ids = np.array([[[3, 1]], [[1, 2]], [[1, 4]]])
    assert traces.previous(ids, E, 3)[:, 0, 0].tolist() == [[-1, -1, -1], [3, 1, -1], [1, 2, 3]]
    assert traces.frequency(ids, E, 3)[:, 0, 0].tolist() == [[-1, -1, -1], [1, 3, -1], [1, 2, 3]]


def test_recall_by_lead_and_budget():
    ids = traces.synthetic(200, L, E, K, seed=5)
    got = table(ids, {'oracle': traces.oracle(ids, 3), 'random': traces.random(ids, E, 4, 3),
                      'noisy': traces.noisy(ids, E, 4, 0.7, 3)}, (1, K, 4))
    assert got['oracle'][1:].tolist() == [[1, 1, 1]] * 2 and (got['oracle'][0] == 0.5).all()
    assert np.allclose(got['random'], np.array([1, 2, 4])[:, None] / E, atol=0.05)
    assert np.allclose(got['noisy'][2], 0.7, atol=0.06)
    # By hand: one token, layers 0 and 1 say something of layers 1 and 2.
    tiny = np.array([[[0, 1], [2, 3], [4, 5]]])
    made = traces.recorded(tiny, np.array([[[[2, 9, 3]], [[0, 4, -1]], [[7, 7, 7]]]]))
    assert recall(tiny, made, 2).tolist() == [0.5] and recall(tiny, made, 3).tolist() == [0.75]
    assert np.isnan(recall(tiny, traces.recorded(tiny, np.full((1, 3, 1, 2), -1)), 2)).all()


def test_synthetic_traces_have_the_locality_asked_for():
    def stays(**how):
        ids = traces.synthetic(200, 2, 16, 4, **how)
        assert all(len(set(layer.tolist())) == 4 for token in ids for layer in token)
        return (ids[1:, :, :, None] == ids[:-1, :, None]).any(-1).mean()
    assert stays(stay=0.0, skew=0.0) == pytest.approx(0.25, abs=0.05)
    assert stays(stay=0.8, skew=0.0) == pytest.approx(0.85, abs=0.05)
    assert stays(stay=0.0, skew=2.0) > 0.5


def test_traces_are_kept_on_disk(tmp_path):
    path, said = tmp_path / 'trace.npz', traces.oracle(IDS, 2)[:, 1:]
    traces.save(path, IDS, E, {'fast': said})
    ids, num_experts, made = traces.load(path)
    assert (ids == IDS).all() and num_experts == E and (made['fast'] == traces.oracle(IDS, 2)).all()
    path.write_bytes(b'nothing')
    with pytest.raises(DataError, match='trace.npz'):
        traces.load(path)
    with pytest.raises(DataError, match='0..4'):
        traces.save(path, IDS, 5, {})
    with pytest.raises(DataError, match='predictions must be'):
        traces.recorded(IDS, said[:3])


# --- times from bytes, and the script ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', CASES)
def test_times_add_up_to_what_a_step_reads(name):
    case = dict(CASES[name])
    cfg = PRESETS[case.pop('model')]
    got = expert_times.times(cfg, **case, context=100)
    step = cfg.num_layers * (got.attention + got.experts) + got.token
    cost = roofline.step_cost(cfg, dtype='bfloat16', context=99)
    vectors = 2 * roofline.read_params(cfg)[1]
    assert step == pytest.approx((cost.weight_bytes - vectors + cost.cache_bytes) / case['memory_bytes_per_s'])
    one = 3 * cfg.hidden_size * cfg.mlp.intermediate_size * 2  # gated, two bytes each
    assert got.copy == pytest.approx(one / case['link_bytes_per_s'])
    assert got.experts == pytest.approx(cfg.moe.experts_per_token * one / case['memory_bytes_per_s'])
    with pytest.raises(ConfigError, match='moe'):
        expert_times.times(PRESETS['stories-15m'], **case)


def test_the_script_writes_a_table_and_a_plot(tmp_path, capsys):
    path = tmp_path / 'trace.npz'
    traces.save(path, IDS, E, {'fast': traces.oracle(IDS, 2)[:, 1:]})
    expert_simulation.main(['--case', 'olmoe-unified', '--trace', str(path), '--shares', '0.5', '--evictions', 'lru',
                            '--warmup', '2', '--out', str(tmp_path / 'out')])
    text = (tmp_path / 'out' / 'table.md').read_text()
    rows = {line.split('|')[4].strip(): line.split('|') for line in text.splitlines() if line.startswith('| 50%')}
    assert rows.keys() == {'none', 'random', 'frequency', 'previous token', 'fast', 'oracle'}
    assert rows['fast'][5:] == rows['oracle'][5:] != rows['none'][5:]
    assert capsys.readouterr().out.strip() == text.strip()
    assert (tmp_path / 'out' / 'olmoe-unified.png').read_bytes().startswith(b'\x89PNG')
