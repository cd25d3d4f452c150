"""Experts spread over the `expert` axis equal one device, and stay where they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone import moe
from backbone.config import MoeConfig
from backbone.language_model import LanguageModel
from backbone.mesh import make_mesh, shardings
from backbone.model import init_params
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

BATCH, SEQ = 4, 4


@pytest.fixture(scope='module')
def cfg():
    return tiny_config(vocab=40, hidden=16, layers=2).replace(moe=MoeConfig(8, 2, shared_size=8))


@pytest.fixture(scope='module')
def x(cfg):
    return jax.random.normal(jax.random.key(3), (BATCH, SEQ, cfg.hidden_size))


def layer_loss(cfg, weight):
    return lambda p, x: (moe.apply(cfg, p, x) * weight).sum()


def gathered(text: str, scalars: int) -> list[str]:
    """The all-gathers of a compiled program whose result has at least so many scalars."""
    found = []
    for line in text.splitlines():
        if match := re.search(r' = (.*?) all-gather(-start)?\(', line):
            shapes = re.findall(r'\w+\[([\d,]+)\]', match[1])
            found += [line] * any(np.prod([int(n) for n in s.split(',')]) >= scalars for s in shapes)
    return found


@pytest.mark.parametrize('shape', ({'expert': 4, 'data': 2}, {'expert': 2, 'data': 2, 'model': 2}),
                         ids=lambda s: '-'.join(f'{k}{v}' for k, v in s.items()))
def test_a_layer_and_its_gradients_equal_one_device(cfg, x, shape):
    p = jax.tree.map(lambda a: 1.5 * a[0], init_params(cfg, jax.random.key(0))['layers']['moe'])
    loss = layer_loss(cfg, jax.random.normal(jax.random.key(4), x.shape))
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(p, x)
    mesh = make_mesh(**shape)
    place = shardings(cfg, {'moe': p}, mesh)['moe']
    spread = jax.device_put(p, place), jax.device_put(x, NamedSharding(mesh, P('data')))
    assert spread[0]['experts']['down'].addressable_shards[0].data.shape[0] == 8 // shape['expert']
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*spread).compile()
    found = run(*spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    one_expert = cfg.hidden_size * cfg.mlp.intermediate_size
    assert BATCH * SEQ * cfg.hidden_size < one_expert  # so that gathered tokens are not taken for an expert
    text = run.as_text()
    assert 'all-reduce' in text and not gathered(text, one_expert)


def test_the_check_sees_experts_that_move(cfg, x):
    """Negative control: experts wanted whole on every device, as the output shows."""
    p = jax.tree.map(lambda a: a[0], init_params(cfg, jax.random.key(0))['layers']['moe'])
    mesh = make_mesh(expert=4)
    spread = jax.device_put(p, shardings(cfg, {'moe': p}, mesh)['moe'])
    whole = NamedSharding(mesh, P())
    run = jax.jit(lambda p, x: (moe.dense(cfg, p, x), p), out_shardings=whole)
    text = run.lower(spread, jax.device_put(x, whole)).compile().as_text()
    assert gathered(text, cfg.hidden_size * cfg.mlp.intermediate_size)


def test_training_with_the_balance_loss_equals_one_device(cfg):
    """The balance term is over the global batch: a mean of the devices' own terms would be another number."""
    base = lively(cfg)
    rng = np.random.default_rng(0)
    rows = lambda high: jnp.asarray(rng.integers(0, high, (BATCH, SEQ)), jnp.int32)
    batch = {'tokens': rows(40), 'targets': rows(40), 'segments': jnp.zeros((BATCH, SEQ), jnp.int32),
             'positions': jnp.tile(jnp.arange(SEQ), (BATCH, 1)), 'weights': jnp.ones((BATCH, SEQ)).at[3, 2:].set(0)}
    task = LanguageModel(cfg, balance=0.3, remat='full')
    step = lambda: jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    alone = step()
    (expected, metrics), grads = alone({'base': base}, batch, jax.random.key(0))
    half = jnp.arange(BATCH)[:, None] < BATCH // 2
    parts = [alone({'base': base}, batch | {'weights': batch['weights'] * part}, jax.random.key(0))[0][1]['balance']
             for part in (half, ~half)]
    assert abs(float(sum(parts) / 2 - metrics['balance'])) > 1e-3
    mesh = make_mesh(data=2, expert=4)
    tree = {'base': base}
    tree = jax.device_put(tree, shardings(cfg, tree, mesh))
    placed = jax.device_put(batch, NamedSharding(mesh, P('data')))
    with jax.set_mesh(mesh):
        (loss, found), spread = step()(tree, placed, jax.random.key(0))
    np.testing.assert_allclose([loss, found['balance']], [expected, metrics['balance']], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread, grads)
