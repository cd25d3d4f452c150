"""The thinned model drafts and the whole one verifies: nothing of the thinned one stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import layout as plain_layout
from backbone.errors import ConfigError
from backbone.model import PlainTarget
from harness import decode as loop
from harness.baselines import Autoregressive
from harness.decode import generate
from sparsity import drafter, layout
from sparsity.config import SparsityConfig
from sparsity.drafter import SparseDrafter
from sparsity.selectors import Griffin
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, hidden=32, layers=3, heads=4, kv_heads=2, max_seq_len=64)
SPARSE = {'heads': 0.5, 'neurons': 0.75, 'block': 4, 'refresh': 2}
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 9, 30]]
NEW = 16


def of(compute='masked', selector='random', **fields):
    return drafter.build(CFG, SPARSE | fields, selector, block=3, compute=compute)


@pytest.fixture(scope='module')
def params():
    return {'base': lively(CFG), 'sparsity': {}}


@pytest.fixture(scope='module')
def want(params):
    return generate(PlainTarget(CFG), Autoregressive(), params, PROMPTS, max_new_tokens=NEW).tokens


def test_drafts_of_thinned_states_leave_none(params, want):
    """NaN wherever a draft has written and verification must write again; the tokens, and the cache of a fresh pass."""
    target, drafts = PlainTarget(CFG), of()

    class Poisoned(SparseDrafter):
        def draft(self, params, cache, state, rng, sampling):
            draft, after, state = super().draft(params, cache, state, rng, sampling)
            written = jnp.arange(64) >= cache.pos[:, None]
            layers = jax.tree.map(lambda a: jnp.where(written[:, None, :, None], jnp.nan, a), after.layers)
            return draft, after.replace(layers=layers), state

    poisoned = Poisoned(drafts.cfg, drafts.s, drafts.selector, 3)
    request = loop.prepare(target, PROMPTS, max_new_tokens=NEW)
    state = loop.start(target, poisoned, params, request)
    while not state.finished.all():
        state = loop.decode_one(target, poisoned, params, state, **request.rounds)
    ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
    assert [ids[r, n:pos[r] + 1].tolist() for r, n in enumerate(request.lengths)] == want
    fresh = target.forward(params, state.cache.tokens[:, :64], target.init_cache(3, 64, 0)).cache.layers
    live = (jnp.arange(64) < state.cache.pos[:, None])[:, None, :, None]
    np.testing.assert_allclose(jnp.where(live, state.cache.layers.k, 0), jnp.where(live, fresh.k, 0), atol=1e-4)
    accepted = np.asarray(state.accepted)
    assert 0 < (accepted * np.arange(4)).sum() < 3 * accepted.sum()  # some drafts are kept, and not all


def test_a_dense_draft_is_always_right(params, want):
    got = generate(PlainTarget(CFG), of(heads=1.0, neurons=1.0), params, PROMPTS, max_new_tokens=NEW)
    assert got.tokens == want and got.accepted_hist[:2].sum() == 0  # but for what the limit cuts


@pytest.mark.parametrize('kind', ('rows', pytest.param('beside', marks=pytest.mark.slow)))
def test_gathered_drafts(params, want, kind):
    """On a base laid out for it, and beside one packed for plain decoding."""
    drafts = of('gathered', neurons=0.5)
    base = layout.pack(params['base']) if kind == 'rows' else plain_layout.pack(params['base'])
    mine = drafts.ready({}, base)
    assert ('rows' in mine) == (kind == 'beside')
    got = generate(PlainTarget(CFG, stacked=False), drafts, {'base': base, 'sparsity': mine}, PROMPTS,
                   max_new_tokens=NEW)
    assert got.tokens == want


def test_what_is_refused():
    s = SparsityConfig.of(CFG, SPARSE)
    with pytest.raises(ConfigError, match='Griffin needs more than the token'):
        SparseDrafter(CFG, s, Griffin(CFG, s))
    with pytest.raises(ConfigError, match='block >= 1, got 0'):
        drafter.build(CFG, SPARSE, 'random', block=0)
    with pytest.raises(ConfigError, match="selector: unknown 'magic'"):
        of(selector='magic')
    with pytest.raises(ConfigError, match='predictor scores kv_group and blocks of 1'):
        of(selector='predictor')
