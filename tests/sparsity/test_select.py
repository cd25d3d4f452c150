"""From scores to what is kept: counts, ties, ids, and the rankings against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from sparsity import select
from sparsity.config import SparsityConfig, kept
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(hidden=32, layers=4, heads=4, kv_heads=2)  # 48 neurons
HALF = SparsityConfig(0.5, 0.5, block=4)


def scores(seed, rows=2, s=HALF, cfg=CFG):
    draw = np.random.default_rng(seed).standard_normal
    return {part: jnp.array(draw((rows, cfg.num_layers, n)), jnp.float32) for part, n in s.sizes(cfg).items()}


def test_how_many_stay():
    """n - floor((1 - share) n), also where the share is not a float's."""
    assert [kept(10, share) for share in (1.0, 0.91, 0.9, 0.55, 0.5, 0.1, 0.01)] == [10, 10, 9, 6, 5, 1, 1]
    assert all(kept(n, 1 - pct / 100) == n - pct * n // 100 for n in (12, 48, 96, 1536) for pct in range(100))


@pytest.mark.parametrize('k', (1, 5, 12))
def test_ties_and_nan_still_give_k_different_ids(k):
    tied = jnp.stack([jnp.zeros(12), jnp.full(12, -jnp.inf), jnp.arange(12) // 6.0, jnp.full(12, jnp.nan)])
    units = select.best(tied, k)
    assert units.sum(-1).tolist() == [k] * 4
    ids, active = select.to_ids(units, k)
    assert active.tolist() == [k] * 4
    for row in ids.tolist():
        assert len(set(row)) == k and min(row) >= 0 and max(row) < 12 and row == sorted(row)
    one_nan = select.best(jnp.zeros(12).at[3].set(jnp.nan), 11)
    assert not one_nan[3]


def test_ids_are_padded_with_the_last_one():
    units = jnp.array([[0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1], [0] * 6], bool)
    ids, active = select.to_ids(units, 4)
    assert ids.tolist() == [[1, 4, 4, 4], [0, 1, 2, 5], [0, 0, 0, 0]] and active.tolist() == [2, 4, 0]


@pytest.mark.parametrize('ranking', ('local', 'global', 'hybrid'))
def test_dense_layers_stay_and_the_others_keep_their_share(ranking):
    """The layers left whole take no part: what was said is dropped from the others."""
    s = SparsityConfig(0.5, 0.7, block=4, dense_last=1, ranking=ranking)
    units = select.choose(CFG, s, scores(0))
    for part, size, share in (('heads', 2, 0.5), ('neurons', 12, 0.7)):
        got = np.asarray(units[part])
        assert got.shape == (2, 4, size) and got[:, [0, 3]].all()
        if ranking == 'local':
            assert (got[:, 1:3].sum(-1) == kept(size, share)).all()
        wanted = 2 * kept(size, share) if ranking == 'local' else kept(2 * size, share)
        assert (got[:, 1:3].sum((1, 2)) == wanted).all()
    masks = select.expand(CFG, s, units)
    assert masks['heads'].shape == (2, 4, 4) and masks['neurons'].shape == (2, 4, 48)
    np.testing.assert_array_equal(masks['neurons'].reshape(2, 4, 12, 4).min(-1), units['neurons'])
    np.testing.assert_array_equal(masks['neurons'].reshape(2, 4, 12, 4).max(-1), units['neurons'])


def test_global_may_empty_a_layer_and_hybrid_may_not():
    lopsided = scores(1) | {'heads': jnp.zeros((2, 4, 2)).at[:, 1].set(1.0).at[:, 2].set(0.5)}
    got = {ranking: select.choose(CFG, SparsityConfig(0.5, 0.5, block=4, ranking=ranking), lopsided)['heads']
           for ranking in ('global', 'hybrid')}
    assert got['global'].sum(-1).tolist() == [[2, 2, 1, 0]] * 2  # 3 of 6 in the three sparse layers
    assert got['hybrid'].sum(-1).tolist() == [[2, 1, 1, 1]] * 2


def test_what_is_kept_is_what_scores_most():
    """Retained score is maximal, against any other choice as large."""
    given = scores(2)
    best = select.choose(CFG, HALF, given)
    other = select.choose(CFG, HALF, scores(3))
    for part in given:
        mass = lambda units: np.where(units[part], given[part], 0)[:, 1:].sum(-1)
        assert (mass(best) >= mass(other)).all() and (mass(best) > mass(other)).any()


def test_union_is_of_all_rows():
    units = select.choose(CFG, HALF, scores(4))
    joined = select.union(units)
    for part in units:
        np.testing.assert_array_equal(joined[part][0], units[part][0] | units[part][1])
        np.testing.assert_array_equal(joined[part][0], joined[part][1])


def test_counts_follow_what_a_ranking_of_all_layers_keeps():
    """Layers that matter more get more, in sum what was asked for; and they are what the config takes."""
    weight = jnp.array([1.0, 3.0, 1.0, 0.2])[:, None]
    many = jnp.abs(scores(5, rows=40)['neurons']) * weight
    counts = select.allocate(CFG, HALF, 'neurons', many)
    assert counts[0] == 12 and counts[1] > counts[2] > counts[3] >= 1 and sum(counts[1:]) == kept(36, 0.5)
    s = SparsityConfig.of(CFG, {'heads': 0.5, 'neurons': 0.5, 'block': 4, 'counts': list(counts)})
    assert select.choose(CFG, s, scores(6))['neurons'].sum(-1).tolist() == [list(counts)] * 2
    even = select.allocate(CFG, HALF, 'neurons', jnp.ones((3, 4, 12)))  # nothing to choose by: the first ones, all told
    assert sum(even[1:]) == kept(36, 0.5)


@pytest.mark.parametrize('fields, said', (
    ({'heads': 0.0}, 'sparsity.heads .* got 0.0'), ({'neurons': 1.5}, 'sparsity.neurons .* got 1.5'),
    ({'head_unit': 'group'}, "sparsity.head_unit: unknown 'group'"), ({'rows': 'all'}, "sparsity.rows: unknown 'all'"),
    ({'block': 5}, 'sparsity.block 5 does not divide 48'), ({'refresh': 0}, 'sparsity.refresh .* got 0'),
    ({'dense_first': 0}, 'sparsity.dense_first .* got 0'), ({'dense_last': 4}, '1 dense layers first and 4 last'),
    ({'counts': (48, 9, 9)}, 'sparsity.counts needs 4 numbers'), ({'counts': (9, 9, 9, 9)}, 'dense layer must be 48'),
    ({'counts': (48, 9, 9, 9), 'ranking': 'global'}, 'sparsity.counts are for ranking local'),
    ({'depth': 1}, 'sparsity: unknown field depth')))
def test_what_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        SparsityConfig.of(CFG, fields)
