"""Experts spread over a mesh, guessed ones gathered ahead: the output of one device, and a schedule that overlaps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone import cache as caches
from backbone.config import MoeConfig
from backbone.errors import ConfigError
from backbone.mesh import make_mesh
from backbone.model import PlainTarget
from harness.baselines import PromptLookup
from harness.decode import generate
from m2r2 import expert_gather
from m2r2.expert_gather import FORMS
from m2r2.expert_guess import NextRouter, Previous, Random, Recorded, frequency
from m2r2.expert_mesh import MeshTarget
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=61, hidden=16, layers=3, heads=2, kv_heads=1)
CFG = CFG.replace(mlp=dataclasses.replace(CFG.mlp, intermediate_size=8), moe=MoeConfig(8, 2, shared_size=8))
PROMPTS = np.array([[1, 2, 3, 4, 5], [9, 9, 30, 9, 11]], np.int32)
NEW, CAPACITY = 5, 12


@pytest.fixture(scope='module')
def params():
    return {'base': lively(CFG)}


def tokens_and_logits(target, params, steps=NEW):
    """Greedy, one program a step: tokens [B, steps], logits [steps, B, V], the last cache."""
    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, tokens, cache):
        output = target.forward(params, tokens, cache)
        logits = output.logits[:, -1]
        return logits, caches.commit(output.cache, jnp.full(len(PROMPTS), tokens.shape[1] - 1), logits.argmax(-1))

    tokens, cache, logits = jnp.asarray(PROMPTS), target.init_cache(len(PROMPTS), CAPACITY, 0), []
    for _ in range(steps):
        found, cache = step(params, tokens, cache)
        logits.append(np.asarray(found))
        tokens = cache.pending[:, None]
    return np.stack(logits).argmax(-1).T, np.stack(logits), cache


@pytest.fixture(scope='module')
def one_device(params):
    return tokens_and_logits(PlainTarget(CFG), params)


@pytest.fixture(scope='module')
def trace(params, one_device):
    """The experts of every position of those texts, from the router taps of one pass: [L, B, C, K]."""
    text = np.concatenate([PROMPTS, one_device[0]], 1)[:, :-1]
    target = PlainTarget(CFG)
    taps = tuple(f'router:{l}' for l in range(CFG.num_layers))
    cache = target.init_cache(len(text), CAPACITY, 0)
    found = jax.jit(lambda p: target.forward(p, jnp.asarray(text), cache, taps=taps).taps)(params)
    ids = np.stack([jax.lax.top_k(found[tap], CFG.moe.experts_per_token)[1] for tap in taps])
    return np.pad(ids, ((0, 0), (0, 0), (0, CAPACITY - text.shape[1]), (0, 0)), constant_values=-1)


@pytest.fixture(scope='module')
def on_mesh(params, trace):
    mesh = make_mesh(data=2, expert=4)
    with jax.set_mesh(mesh):
        spread = {'base': expert_gather.pack(params['base']), 'prefetch': {'trace': trace}}
        spread = jax.device_put(spread, expert_gather.packed_shardings(CFG, spread, mesh))
    assert spread['base']['layers']['moe']['experts'].sharding.spec == P(None, 'expert')

    @functools.cache
    def run(*settings, **more):
        with jax.set_mesh(mesh):
            return tokens_and_logits(MeshTarget(CFG, *settings, **more), spread)

    return run


QUICK = {'oracle': (Recorded(), 4), 'adversary': (Recorded(worst=True), 4)}
MORE = {'next_router': (NextRouter(2), 3),
        'previous': (Previous(), 4), 'frequency': (frequency(2), 2), 'random': (Random(), 5), 'all': (NextRouter(), 8)}


@pytest.mark.parametrize('name', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_predictor_gives_the_output_of_one_device(one_device, on_mesh, name):
    tokens, logits, cache = on_mesh(*(QUICK | MORE)[name])
    np.testing.assert_array_equal(tokens, one_device[0])
    np.testing.assert_allclose(logits, one_device[1], atol=1e-5)
    np.testing.assert_array_equal(logits, on_mesh(*QUICK['oracle'])[1])  # to the bit: only bytes moved differently
    asked, found = np.asarray(cache.layers.asked), np.asarray(cache.layers.found)
    assert (asked == 2 * 2 * (NEW - 1)).all() and found[0] == 0  # two rows of two experts; nobody foretells layer 1
    if name in ('oracle', 'all'):
        assert (found[1:] == asked[1:]).all()
    if name == 'adversary':
        assert (found < asked).all()


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gathers_the_same_weights(params, form):
    experts = expert_gather.pack(params['base'])['layers']['moe']['experts'][0]
    ids = jnp.array([6, 0, 5, 0], jnp.int32)
    mesh = make_mesh(expert=8)
    with jax.set_mesh(mesh):
        spread = jax.device_put(experts, NamedSharding(mesh, P('expert')))
        found = jax.jit(lambda e, i: expert_gather.fetch(e, i, form))(spread, ids)
    np.testing.assert_array_equal(found, experts[ids])


def test_without_the_way_home_a_wrong_guess_shows(on_mesh, one_device, monkeypatch):
    """The control: an expert that was not guessed is needed."""
    home = expert_gather.at_home

    def lost(cfg, experts, x, ids, missed):
        found = home(cfg, experts, x, ids, missed)
        return found if len(x) == PROMPTS.size else 0 * found

    monkeypatch.setattr(expert_gather, 'at_home', lost)
    logits = on_mesh(*QUICK['adversary'], few=9)[1]
    np.testing.assert_allclose(logits[0], one_device[1][0], atol=1e-5)
    assert not np.allclose(logits[1], one_device[1][1], atol=1e-3)


@pytest.mark.slow
def test_in_the_decode_loop_of_one_jit(params, trace):
    """With blocks of drafted tokens, too: what the loop says of the plain model."""
    mesh, drafter = make_mesh(expert=4), PromptLookup(3)
    prompts = PROMPTS.tolist()
    expected = generate(PlainTarget(CFG), drafter, params, prompts, max_new_tokens=8)
    with jax.set_mesh(mesh):
        spread = {'base': expert_gather.pack(params['base'])}
        spread = jax.device_put(spread, expert_gather.packed_shardings(CFG, spread, mesh))
        for predictor in (NextRouter(), Previous(2)):
            found = generate(MeshTarget(CFG, predictor, 4), drafter, spread, prompts, max_new_tokens=8)
            assert found.tokens == expected.tokens


@pytest.mark.parametrize(('change', 'message'), [
    ({'slots': 1}, 'slots must be in 2..8'), ({'form': 'mail'}, "unknown 'mail'"),
    ({'cfg': CFG.replace(moe=None)}, 'no experts')])
def test_named_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        MeshTarget(**{'cfg': CFG, 'predictor': NextRouter(), 'slots': 4} | change)
