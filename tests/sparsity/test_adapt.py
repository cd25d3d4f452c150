"""Learning on the job: within its budget, the same every time, and undone to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from sparsity import adapt, predictor
from sparsity.adapt import AdaptConfig
from sparsity.config import SparsityConfig
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, hidden=16, layers=2, heads=2, kv_heads=1)
S = SparsityConfig(1.0, 0.5, block=2)
P = predictor.PredictorConfig(width_heads=4, width_neurons=16, block=2)
learn = jax.jit(functools.partial(adapt.learn, CFG, P), static_argnums=0)


@pytest.fixture(scope='module')
def observed():
    """What 4 rows of 40 tokens of a small random model show, token by token."""
    tokens = jax.random.randint(jax.random.key(1), (4, 40), 0, 41)
    context, scores = jax.jit(lambda base: adapt.observe(CFG, S, base, tokens))(lively(CFG))
    flat = lambda a: a.reshape(160, *a.shape[2:])
    return flat(context), jax.tree.map(flat, scores)


def test_it_learns_within_its_budget_and_can_be_undone(observed):
    given = predictor.init_params(CFG, P, jax.random.key(0))
    valid = jnp.arange(160) % 40 > 3  # the prompts are not learned from
    a = AdaptConfig(share=0.5, budget=60, rate=0.1, reach=0.0)
    state = adapt.begin(given)
    after = learn(a, state, *observed, valid)
    assert int(after.used) == 60 and int(after.seen) == 144
    again = learn(a, adapt.begin(given), *observed, valid)
    jax.tree.map(np.testing.assert_array_equal, after, again)
    error = lambda params: float(predictor.loss(CFG, P, 'neurons', predictor.predict(CFG, P, params, observed[0])[
        'neurons'], observed[1]['neurons'], jax.random.key(0)).mean())
    assert error(after.params) < 0.8 * error(given)
    assert 0 < float(after.recall['neurons']) / 60 < 1
    jax.tree.map(np.testing.assert_array_equal, adapt.revert(after).params, given)
    spent = learn(a, after, *observed, valid)
    jax.tree.map(np.testing.assert_array_equal, spent.params, after.params)  # nothing is left of the budget


@pytest.mark.slow
def test_off_and_on_a_leash(observed):
    given = predictor.init_params(CFG, P, jax.random.key(0))
    off = learn(AdaptConfig(share=0.0), adapt.begin(given), *observed, jnp.ones(160, bool))
    jax.tree.map(np.testing.assert_array_equal, off.params, given)
    held = learn(AdaptConfig(share=1.0, rate=1.0, reach=0.05), adapt.begin(given), *observed, jnp.ones(160, bool))
    norm = lambda tree: float(sum(jnp.square(a).sum() for a in jax.tree.leaves(tree)) ** 0.5)
    assert 0 < norm(jax.tree.map(jnp.subtract, held.params, given)) <= 0.0501 * norm(given)


@pytest.mark.parametrize('fields, said', (({'share': 1.5}, 'adapt.share must be in 0..1, got 1.5'),
                                          ({'budget': -1}, 'adapt.budget must be at least 0, got -1')))
def test_what_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        AdaptConfig(**fields)
