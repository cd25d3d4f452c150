"""What is trained and what is not, to the bit; what decays; wrong options by name."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.formats.tensors import flatten
from backbone.mesh import make_mesh
from configs import rad as config_file
from harness import train_step
from rad import cost, student
from rad.config import RadConfig
from rad.surgery import check_alive
from rad.task import InPlaceTarget, RadTask, build
from tests.conftest import lively, tiny_config
from tests.rad.test_distill import CFG, RCFG, batch_of

pytestmark = pytest.mark.usefixtures('quick_compile')
SHAPE = {**CFG.to_dict(), 'vocab_size': 257}


@pytest.fixture(scope='module')
def trained():
    """By what is trained: (plan, state before, state after three steps, first and last metrics)."""
    def steps(train):
        config = config_file.get_config('tiny/evenly')
        config.task.kwargs.update({'model': SHAPE, 'count': 2, 'train': train, 'loss_chunk': 0})
        config.data.update({'seq_len': 24, 'batch_size': 2})
        config.optimizer.update({'learning_rate': 1e-2, 'warmup_steps': 1, 'weight_decay': 1.0})
        with jax.set_mesh(make_mesh()):
            plan = train_step.plan(config)
            state, found = plan.init(), []
            before = jax.tree.map(np.asarray, state)
            for _ in range(3):
                state, metrics = plan.step(state, train_step.place_batch(batch_of(), plan.batch, 0))
                found.append(float(metrics['kl']))
            return plan, before, jax.tree.map(np.asarray, state), found
    return {train: steps(train) for train in ('ssm_only', 'ssm_plus_norms')}


@pytest.mark.parametrize('train', ('ssm_only', 'ssm_plus_norms'))
def test_only_what_is_said_is_trained(trained, train):
    plan, before, after, found = trained[train]
    assert found[-1] < found[0]
    mine = {path for path in before.params if path.startswith('rad/')}
    assert mine == set(before.params) and set(before.frozen) == {f'base/{path}' for path in flatten(lively(CFG))}
    assert any('layers/attn_norm' in path for path in mine) == (train == 'ssm_plus_norms')
    for path, a in before.frozen.items():
        np.testing.assert_array_equal(after.frozen[path], a, err_msg=path)
    for path, a in before.params.items():
        assert np.abs(after.params[path] - a).max() > 0, path
    sizes = [leaf.size for leaf in jax.tree.leaves(after.opt_state) if np.ndim(leaf)]
    assert sum(sizes) == 2 * sum(a.size for a in before.params.values()), 'two moments of what is trained, no more'


def test_steps_and_decays_of_a_state_do_not_decay():
    """The config's own patterns, on the task's own paths."""
    config = config_file.get_config('tiny/evenly/rad_norms')
    task = train_step.build_task(config)
    paths = flatten(jax.eval_shape(task.init, jax.random.key(0)))
    kept = {path for path in paths if path.startswith('rad/') and any(
        re.fullmatch(p, path) for p in config.optimizer.no_decay)}
    assert kept == {f'rad/mixers/{name}' for name in ('A_log', 'D', 'dt_bias', 'conv/bias', 'norm/scale')} | {
        f'rad/layers/{name}/scale' for name in ('attn_norm', 'mlp_norm')}


def test_sizes_and_flops():
    """Counted beside the attention; a mixer is larger than what it replaces."""
    task = RadTask(CFG, RCFG)
    made = jax.eval_shape(lambda key: task.init(key)['rad'], jax.random.key(0))['mixers']
    matrices = sum(made[name]['kernel'].size for name in ('in_proj', 'out_proj'))
    assert matrices == 2 * cost.mixer_scalars(CFG, RCFG.ssm) > 2 * cost.attention_scalars(CFG)
    assert student.count(made) > matrices
    flops = lambda **options: dataclasses.replace(task, **options).train_flops(2, 24)
    assert flops(share_out=True) == flops() < flops(train='all')
    large = tiny_config(vocab=61, hidden=24, layers=3, heads=3, kv_heads=3)
    teacher = 3 * (cost.attention_scalars(large) + large.feed_scalars()) + 24 * 61
    own = 4 * (cost.attention_scalars(CFG) + CFG.feed_scalars()) + 16 * 61
    below = cost.attention_scalars(CFG) + CFG.feed_scalars()  # of layer 0, no longer a teacher's too
    assert flops(teacher=large) - flops() == 2 * 48 * (teacher + below - own)


def test_a_dead_start_is_refused_and_the_task_makes_none():
    base = lively(CFG)
    own = RadTask(CFG, RCFG).own(base, jax.random.key(0))
    check_alive(RCFG, own['mixers'])
    dead = own['mixers'] | {'conv': jax.tree.map(jnp.zeros_like, own['mixers']['conv'])}
    with pytest.raises(ConfigError, match='layer 1'):
        check_alive(RCFG, dead)


def test_samples_in_place_are_of_what_is_trained():
    task = RadTask(CFG, RCFG, in_place=True)
    base = lively(CFG)
    mine = jax.tree.map(lambda a: 1.5 * a, task.own(base, None))
    target, tokens = task.target, jnp.array([[1, 2, 3]])
    assert isinstance(target, InPlaceTarget) and task.decodes() is None
    said = lambda tree: target.forward(tree, tokens, target.init_cache(1, 8, 0)).logits
    changed = said({'base': base, 'rad': mine})
    merged = task.merged({'base': base, 'rad': mine})
    np.testing.assert_array_equal(changed, said({'base': merged, 'rad': {}}))
    assert float(jnp.abs(changed - said({'base': base, 'rad': {}})).max()) > 1e-2
    with pytest.raises(ConfigError, match='in_place'):
        task.drafter()


@pytest.mark.parametrize(('options', 'says'), (
    ({'train': 'some'}, "train: unknown 'some'"), ({'init_as': 'ones'}, "init_as: unknown 'ones'"),
    ({'kl': 0.0}, 'kl or ce'), ({'temperature': 0.0}, 'temperature'), ({'stages': 3, 'until': 9}, 'stages'),
    ({'stages': 1}, 'until'),
    ({'in_place': True, 'share_out': True}, 'in_place'), ({'align': 1.0, 'rad': {'parallel': True}}, 'align'),
    ({'colour': 1}, 'unknown colour'), ({'base': 'stories-15m'}, 'either base'), ({'layers': ()}, 'nothing to train'),
    ({'layers': (1, 9)}, r'layers \(1, 9\)'), ({'rad': {'depth': 1}}, 'rad: unknown field depth')))
def test_wrong_options_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        build(**{'model': SHAPE, 'layers': (1,), **options})


def test_a_control_of_other_sizes_says_how_many_it_trains():
    """The attention of the same layers is smaller than their mixers: name more layers for as many parameters."""
    sizes = {}
    for name, options in {'mixers': {}, 'in_place': {'in_place': True}, 'more': {'in_place': True}}.items():
        layers = (0, 1, 3) if name == 'more' else (1, 3)
        task = RadTask(CFG, RadConfig.of(CFG, {'layers': layers}), **options)
        sizes[name] = student.count(jax.eval_shape(lambda key, task=task: task.init(key)['rad'], jax.random.key(0)))
    assert sizes['in_place'] < sizes['mixers'] and sizes['in_place'] < sizes['more']
