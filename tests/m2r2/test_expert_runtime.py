"""Experts in host memory: every number of slots, eviction and predictor gives the resident model's bits."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from backbone.config import MoeConfig
from backbone.errors import ConfigError, RequestError
from backbone.model import PlainTarget
from m2r2 import expert_runtime, expert_steps, expert_store, prefetch
from m2r2.expert_guess import NextRouter, Previous, Random, Recorded, frequency
from m2r2.expert_runtime import ExpertRuntime, generate
from m2r2.expert_store import HostExperts
from m2r2.prefetch import FastStream, PrefetchConfig, StateAdapter
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=61, hidden=16, layers=3, heads=2, kv_heads=1)
CFG = CFG.replace(mlp=dataclasses.replace(CFG.mlp, intermediate_size=8), moe=MoeConfig(8, 2, shared_size=8))
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 9, 30, 9, 11, 12, 13]]
NEW = 6
FEW = 2 + expert_runtime.SPARE


@pytest.fixture(scope='module')
def base():
    return {'base': lively(CFG)}


@pytest.fixture(scope='module')
def store(base):
    return HostExperts.of(CFG, base['base']['layers'])


def run(params, store, **settings):
    logits = []
    runtime = ExpertRuntime(CFG, params, store, poison=True, **settings)
    found = generate(runtime, PROMPTS, max_new_tokens=NEW, record=True, on_logits=lambda a: logits.append(a))
    return found, np.stack(logits), runtime


@pytest.fixture(scope='module')
def resident(base, store):
    """Every expert on the device before the first token."""
    logits = []
    runtime = ExpertRuntime(CFG, base, store)
    runtime.load_all()
    found = generate(runtime, PROMPTS, max_new_tokens=NEW, record=True, on_logits=lambda a: logits.append(a))
    assert found.prefill['bytes'] == found.decode['bytes'] == found.decode['demand'] == found.decode['late'] == 0
    assert found.decode['hits'] == found.decode['requests'] > 0
    return found, np.stack(logits)


def with_trace(base, resident):
    return base | {'prefetch': {'trace': resident[0].routed}}


def same(a, b):
    assert a[0].tokens == b[0].tokens
    np.testing.assert_array_equal(a[1], b[1])


def test_it_is_the_model(base, resident):
    """Token by token what the model of one jit says, prompts and continuations in one pass."""
    found, logits = resident
    target = PlainTarget(CFG)
    forward = jax.jit(lambda tokens: target.forward(base, tokens, target.init_cache(len(PROMPTS), 16, 0)).logits)
    tokens = np.zeros((len(PROMPTS), 16), np.int32)
    for row, (prompt, new) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        tokens[row, :len(prompt) + NEW] = prompt + new
    expected = np.asarray(forward(tokens))
    for row, prompt in enumerate(PROMPTS):
        mine = expected[row, len(prompt) - 1:len(prompt) - 1 + NEW]
        np.testing.assert_allclose(logits[:, row], mine, atol=1e-5)
        assert found.tokens[row] == mine.argmax(-1).tolist()
        routed = found.routed[:, row]
        assert (routed[:, :len(prompt) + NEW - 1] >= 0).all() and (routed[:, len(prompt) + NEW - 1:] == -1).all()


PREDICTORS = {'none': None, 'next_router': NextRouter(), 'next_router_2': NextRouter(2), 'previous': Previous(),
              'frequency': frequency(), 'random': Random(), 'oracle': Recorded(), 'oracle_2': Recorded(2),
              'adversary': Recorded(worst=True)}


@pytest.mark.parametrize(('slots', 'name', 'more'), [
    (FEW, 'none', {}), (FEW, 'none', {'keep': False}), (FEW, 'random', {'in_flight': 1}), (FEW, 'adversary', {}),
    (9, 'next_router', {'eviction': 'least_stale', 'extra': 2, 'least': 0.0}),
    (8, 'none', {'per_layer': True}), (24, 'adversary', {'in_flight': 8})])
def test_output_is_that_of_the_resident_model(base, store, resident, slots, name, more):
    found, logits, runtime = run(with_trace(base, resident), store, slots=slots, predictor=PREDICTORS[name], **more)
    same((found, logits), resident)
    for counts in (found.prefill, found.decode):
        assert counts['hits'] + counts['late'] + counts['demand'] == counts['requests']
        assert counts['bytes'] == (counts['demand_copies'] + counts['prefetch_copies']) * store.expert_bytes
    assert (found.prefill['prefetch_copies'] + found.decode['prefetch_copies'] > 0) == (name != 'none')
    assert found.decode['requests'] == sum(
        len(np.unique(resident[0].routed[l, [0, 1, 2], [len(p) + i for p in PROMPTS]]))
        for l, i in itertools.product(range(CFG.num_layers), range(NEW - 1)))
    if not runtime.keep:
        assert found.decode['hits'] == 0


@pytest.mark.slow
def test_a_fast_stream_and_an_adapter(base, store, resident):
    """With a stream of their own beside the layers, and several targets at once."""
    shape = PrefetchConfig(interval=2, rank=4)
    mine = prefetch.init_params(shape, CFG, jax.random.key(1))
    noise = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), mine)
    for predictor in (FastStream(shape=shape), StateAdapter(shape=shape)):
        found = run(base | {'prefetch': noise}, store, slots=9, predictor=predictor, in_flight=4)
        same(found, resident)
        assert found[0].decode['prefetch_copies'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('slots', [FEW, 5, 7, 12, 23])
@pytest.mark.parametrize('eviction', ['lru', 'least_stale', 'predicted'])
@pytest.mark.parametrize('name', PREDICTORS)
def test_every_size_eviction_and_predictor(base, store, resident, slots, eviction, name):
    settings = {'slots': slots, 'eviction': eviction, 'predictor': PREDICTORS[name], 'extra': slots % 3}
    same(run(with_trace(base, resident), store, **settings), resident)


def test_an_oracle_leaves_nothing_to_demand(base, store, resident):
    """Only the first layer, which nobody foretells, still has to ask; and asking for the wrong ones costs bytes."""
    count = {}
    for name in ('none', 'oracle', 'adversary'):
        count[name] = run(with_trace(base, resident), store, slots=9, predictor=PREDICTORS[name], in_flight=12)[0]
    first = sum(len(np.unique(resident[0].routed[0, [0, 1, 2], [len(p) + i for p in PROMPTS]])) for i in range(NEW - 1))
    assert count['oracle'].decode['demand'] <= first < count['none'].decode['demand']
    assert count['oracle'].decode['wasted'] <= 1  # at most what the prompts' pass left behind
    assert count['adversary'].decode['bytes'] > count['none'].decode['bytes']


def test_poison_is_found(base, store, resident, monkeypatch):
    """The control: experts that run before their bytes have landed give no number."""
    write = expert_store.Slots.land
    monkeypatch.setattr(expert_store.Slots, 'land', lambda self, slots: [self.on_the_way.pop(s) for s in slots])
    logits = run(base, store, slots=FEW)[1]
    assert np.isnan(logits).all()
    monkeypatch.setattr(expert_store.Slots, 'land', write)
    order = expert_steps.run_experts

    def swapped(cfg, buffers, slots, *rest):
        return order(cfg, buffers, slots[::-1], *rest)

    monkeypatch.setattr(expert_steps, 'run_experts', swapped)
    assert (run(base, store, slots=9)[1] != resident[1]).any()


def test_numpy_in_the_place_of_pinned_memory(base, store, resident, monkeypatch):
    assert store.kind == 'pinned_host'
    assert {a.sharding.memory_kind for a in store.experts[0][0].values()} == {'pinned_host'}
    monkeypatch.setattr(expert_store, 'host_sharding', lambda device: None)
    plain = HostExperts.of(CFG, base['base']['layers'])
    assert plain.kind == 'numpy' and isinstance(plain.experts[0][0]['up'], np.ndarray)
    same(run(base, plain, slots=9, predictor=NextRouter()), resident)
    with pytest.raises(ConfigError, match='no memory of kind pinned_host'):
        HostExperts(CFG, pinned=True)


def test_a_stop_token_and_a_replay(base, store, resident):
    found, _ = resident
    runtime = ExpertRuntime(CFG, base, store, slots=9)
    stop = found.tokens[0][2]
    got = generate(runtime, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop], forced=found.routed)
    for mine, whole in zip(got.tokens, found.tokens, strict=True):
        assert mine == (whole[:whole.index(stop) + 1] if stop in whole else whole)
    other = (found.routed + 1) % CFG.moe.num_experts
    seen = []
    replayed = generate(runtime, PROMPTS, max_new_tokens=NEW, forced=other, record=True, on_logits=seen.append)
    mask = replayed.routed >= 0
    np.testing.assert_array_equal(replayed.routed[mask], other[mask])
    assert (np.asarray(seen[0]) != resident[1][0]).any()


@pytest.mark.parametrize(('change', 'message'), [
    ({'slots': FEW - 1}, 'slots must be at least 4'),
    ({'slots': 6, 'eviction': 'mru'}, "unknown 'mru'"),
    ({'predictor': Recorded()}, "params\\['prefetch'\\]\\['trace'\\] must be"),
    ({'in_flight': 0}, 'in_flight'),
])
def test_named_errors(base, store, change, message):
    with pytest.raises(ConfigError, match=message):
        generate(ExpertRuntime(CFG, base, store, **change), PROMPTS, max_new_tokens=2)


def test_a_model_without_experts_and_bad_requests(base, store):
    with pytest.raises(ConfigError, match='no experts'):
        ExpertRuntime(CFG.replace(moe=None), base)
    with pytest.raises(ConfigError, match='lead'):
        NextRouter(0)
    for prompts in ([], [[]], [[99]], [[1] * 95]):
        with pytest.raises(RequestError):
            generate(ExpertRuntime(CFG, base, store, slots=6), prompts, max_new_tokens=2)
