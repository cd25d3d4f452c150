"""A dense model cut into experts: all of them together are the model itself, and a trained router chooses better."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backbone.config import MoeConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats.tensors import flatten, unflatten
from backbone.model import forward
from backbone.presets import preset
from configs import upcycle as config_file
from harness import train_step
from m2r2 import neuron_split, upcycle, upcycle_task
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

DENSE = tiny_config(vocab=61, hidden=16, layers=2, heads=2, kv_heads=1)  # 24 neurons a layer
FEW = MoeConfig(4, 2, True, shared_size=8)
CFG = upcycle.shape(DENSE, FEW)
TOKENS = np.random.default_rng(0).integers(0, 61, (6, 24)).astype(np.int32)


@pytest.fixture(scope='module')
def dense():
    return jax.tree.map(np.asarray, lively(DENSE))


@pytest.fixture(scope='module')
def split(dense):
    return upcycle.choose(DENSE, dense, TOKENS, FEW)


def any_order(seed, size=24):
    rngs = (np.random.default_rng([seed, layer]) for layer in range(DENSE.num_layers))
    return np.stack([rng.permutation(size) for rng in rngs]).astype(np.int32)


@pytest.mark.parametrize('norm_topk', (True, False))
def test_all_experts_weighing_one_are_the_dense_model(dense, norm_topk):
    """Whatever the order of the neurons, with a router without preference. An order that has a neuron twice is not."""
    cfg = upcycle.shape(DENSE, MoeConfig(4, 4, norm_topk, shared_size=8))
    run = jax.jit(lambda base: forward(cfg, base, TOKENS[:2]))
    want = forward(DENSE, dense, TOKENS[:2])
    router = np.zeros((2, 16, 4), np.float32)
    np.testing.assert_allclose(run(upcycle.convert(cfg, dense, any_order(1), router)), want, atol=1e-5)
    wrong = any_order(1)
    wrong[1, 3] = wrong[1, 20]
    assert float(jnp.abs(run(upcycle.convert(cfg, dense, wrong, router)) - want).max()) > 1e-2


def test_only_who_is_with_whom_matters(dense):
    """Experts renamed with their columns of the router, neurons in another order within each: the same model. A router
    that keeps its columns is another one."""
    run = jax.jit(lambda base: forward(CFG, base, TOKENS[:2]))
    rng, order = np.random.default_rng(2), any_order(2)
    router = rng.normal(size=(2, 16, 4)).astype(np.float32)
    want = run(upcycle.convert(CFG, dense, order, router))
    names = rng.permutation(4)
    groups = order[:, 8:].reshape(2, 4, 4)[:, names][..., rng.permutation(4)]
    moved = np.concatenate([order[:, 7::-1], groups.reshape(2, -1)], 1)
    np.testing.assert_allclose(run(upcycle.convert(CFG, dense, moved, router[..., names])), want, atol=1e-5)
    assert float(jnp.abs(run(upcycle.convert(CFG, dense, moved, router)) - want).max()) > 1e-2


def test_balanced_kmeans_finds_what_was_planted_and_keeps_sizes():
    rng = np.random.default_rng(3)
    planted = rng.permutation(np.repeat(np.arange(4), 6))
    features = 5 * rng.normal(size=(4, 7))[planted] + 0.1 * rng.normal(size=(24, 7))
    found = neuron_split.balanced_kmeans(features, 4, seed=0)
    assert np.bincount(found).tolist() == [6] * 4
    assert len(set(zip(planted, found, strict=True))) == 4, 'one group each, under another name'
    lopsided = np.concatenate([np.zeros((20, 2)), rng.normal(size=(4, 2))])  # k-means would give sizes 20 and 4
    assert np.bincount(neuron_split.balanced_kmeans(lopsided, 2, seed=0)).tolist() == [12, 12]
    np.testing.assert_array_equal(neuron_split.balanced_kmeans(features, 4, seed=1),
                                  neuron_split.balanced_kmeans(features, 4, seed=1))
    with pytest.raises(ConfigError, match='24 neurons do not make 5'):
        neuron_split.balanced_kmeans(features, 5, seed=0)


@pytest.mark.parametrize('by', neuron_split.BY)
def test_a_split_deals_every_neuron_once_and_the_same_way_again(dense, split, by, tmp_path):
    found = split if by == 'activity' else upcycle.choose(DENSE, dense, TOKENS, FEW, by)
    np.testing.assert_array_equal(np.sort(found.order, 1), np.tile(np.arange(24), (2, 1)))
    assert found.router.shape == (2, 16, 4) and found.router.dtype == np.float32
    upcycle.save(found, tmp_path / 'split.npz', 'abc')
    again = upcycle.read(tmp_path / 'split.npz', CFG, 'abc')
    np.testing.assert_array_equal(again.order, found.order)
    np.testing.assert_array_equal(again.router, found.router)
    for cfg, base in ((CFG, 'abd'), (upcycle.shape(DENSE, dataclasses.replace(FEW, experts_per_token=3)), 'abc')):
        with pytest.raises(FormatError, match='made for'):
            upcycle.read(tmp_path / 'split.npz', cfg, base)


def batch_of(tokens):
    ones = np.ones((len(tokens), tokens.shape[1] - 1))
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': ones.astype(np.float32),
            'segments': np.zeros(ones.shape, np.int32),
            'positions': np.tile(np.arange(ones.shape[1], dtype=np.int32), (len(tokens), 1))}


def test_a_trained_router_beats_its_start_and_its_start_a_random_one(dense, split):
    """On tokens that neither the split nor the training saw. Nothing else is trained, and no gradient reaches the
    dense model."""
    task = upcycle_task.UpcycleTask(DENSE, CFG)
    both = jax.jit(jax.value_and_grad(lambda params, tokens: task.loss(params, batch_of(tokens), None), has_aux=True))
    params = flatten(jax.tree.map(jnp.asarray, task.of(dense, split)))
    mine, frozen = train_step.split(params, task.trainable)
    assert set(mine) == {'base/layers/moe/router/kernel'}
    more = train_step.split(params, dataclasses.replace(task, train='experts').trainable)[0]
    assert set(more) == {path for path in params if path.startswith('base/layers/moe/')}
    fresh = np.random.default_rng(5).integers(0, 61, TOKENS.shape).astype(np.int32)
    held_out = lambda leaves: both(unflatten(frozen | leaves), fresh)[0]
    start = held_out(mine)
    random = held_out({path: upcycle.random_split(CFG).router for path in mine})
    rule = optax.adam(0.02)
    state = rule.init(mine)
    for _ in range(25):
        grads = flatten(both(unflatten(frozen | mine), TOKENS)[1])
        assert not any(np.abs(a).max() for path, a in grads.items() if path.startswith('teacher/'))
        updates, state = rule.update({path: grads[path] for path in mine}, state)
        mine = optax.apply_updates(mine, updates)
    end = held_out(mine)
    for what in ('layer_error', 'match'):
        assert end[1][what] < 0.95 * start[1][what] and start[1][what] < 0.7 * random[1][what], what
    assert end[0] < 0.95 * start[0] and max(start[1]['kl'], end[1]['kl']) < 0.9 * random[1]['kl']
    np.testing.assert_allclose(start[1]['teacher_nll'], -np.take_along_axis(np.asarray(
        jax.nn.log_softmax(forward(DENSE, dense, fresh[:, :-1]))), fresh[:, 1:, None], -1).mean(), rtol=1e-5)


@pytest.mark.parametrize('changes, said', [
    ({'train': 'all'}, 'train'), ({'kd': 0.0, 'layer': 0.0, 'match': 0.0}, 'first three'), ({'colour': 1}, 'colour'),
    ({'balance': -1.0}, 'balance'), ({'split': 'a.npz'}, 'split'), ({'implementation': 'sparse'}, 'implementation'),
    ({'moe': {'num_experts': 5, 'experts_per_token': 2}}, '5 experts'), ({'moe': {'num_experts': 4}}, 'per_token'),
    ({'moe': {'size': 4}}, 'moe.size')])
def test_a_wrong_field_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        upcycle_task.build(**({'model': DENSE.to_dict(), 'moe': dataclasses.asdict(FEW)} | changes))


def test_what_cannot_be_cut_says_so():
    for cfg in (CFG, DENSE.replace(mlp=dataclasses.replace(DENSE.mlp, gated=False))):
        with pytest.raises(ConfigError, match='upcycling needs'):
            upcycle.shape(cfg, FEW)


@pytest.mark.parametrize('variant', ('tiny', 'stories', 'stories/before', 'stories/router', 'smollm2'))
def test_configs_cut_evenly(variant):
    kwargs = config_file.get_config(variant).task.kwargs.to_dict()
    if 'base' not in kwargs:
        upcycle_task.build(**kwargs)
    else:
        upcycle.shape(preset(kwargs['base']), MoeConfig(**kwargs['moe']))
