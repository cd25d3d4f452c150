"""The head is the formula it claims to be, in every mode; its unembedding is the base's own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.model import unembed
from tensorhead import head as heads
from tensorhead.config import MODES, TensorHeadConfig
from tests.conftest import tiny_config

D, V, N, R, K = 8, 20, 3, 4, 5
IDS = np.array([0, 3, 4, 7, 11, 12, 17])


def config(mode='lowrank_shared', **changes):
    return TensorHeadConfig(D, V, N, R, mode, K, **changes)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(mode, fill):
    """A head of the right shapes; fill(shape) makes each leaf."""
    return jax.tree.map(lambda a: fill(a.shape), jax.eval_shape(lambda: heads.init(config(mode), jax.random.key(0))))


def lively(mode):
    return filled(mode, lambda shape: 0.5 * normal(len(shape), *shape))


@pytest.fixture(scope='module')
def fresh():
    key = jax.random.key(0, impl='rbg')  # compiles in a tenth of the default's time
    return jax.jit(lambda key: heads.init(config(), key))(key)


def by_hand(mode, head, e, U):
    """log w [r] and logits [n, r, W] of one hidden state, one factor at a time."""
    f = {k: np.asarray(v, np.float64) for k, v in head['factors'].items()}
    e, U = np.asarray(e, np.float64), np.asarray(U, np.float64)
    gate = e @ np.asarray(head['gate']['kernel'], np.float64) + np.asarray(head['gate']['bias'], np.float64)
    z = np.zeros((N, R, len(U)))
    for s in range(N):
        for a in range(R):
            if mode == 'full':
                z[s, a] = f['kernel'][s, a].T @ e
            elif mode == 'linear_shared':
                z[s, a] = U @ (e + f['kernel'][s, a].T @ e)
            elif mode == 'lowrank_shared':
                z[s, a] = U @ (e + f['up'][s, a].T @ (f['down'][s, a].T @ e))
            else:
                x = f['kernel'][s, a].T @ e + f['bias'][s, a]
                z[s, a] = U @ (e + x / (1 + np.exp(-x)))
    return gate - np.log(np.exp(gate).sum()), z


@pytest.mark.parametrize('mode', MODES)
def test_a_head_is_its_formula(mode):
    cfg = config(mode)
    head, e, U = lively(mode), normal(1, 2, 3, D), normal(2, V, D)

    @jax.jit
    def run(head, e, U):
        mixture = heads.factors(cfg, head, e)
        return mixture.log_w, heads.logits(cfg, head, mixture, U)

    log_w, z = run(head, e, U)
    assert (log_w.shape, z.shape) == ((2, 3, R), (2, 3, N, R, V))
    for i in np.ndindex(2, 3):
        want_w, want_z = by_hand(mode, head, e[i], U)
        np.testing.assert_allclose(log_w[i], want_w, atol=1e-5)
        np.testing.assert_allclose(z[i], want_z, atol=1e-4, rtol=1e-5)
    assert min(np.abs(np.flip(z, axis) - z).max() for axis in (-3, -2)) > 0.1  # factors do differ


def test_bfloat16_products_sum_in_float32():
    cfg = config()
    head, e, U = lively(cfg.mode), normal(1, 2, D), normal(2, V, D)
    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (head, e, U))

    def run(head, e, U):
        mixture = heads.factors(cfg, head, e)
        return mixture.h, mixture.log_w, heads.logits(cfg, head, mixture, U)

    half, whole = jax.jit(run)(*small), jax.jit(run)(head, e, U)
    assert [a.dtype for a in half] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(half, whole, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize('mode', MODES)
def test_without_its_noise_a_head_is_the_base_r_times(mode):
    cfg, e, U = config(mode), normal(1, 2, D), normal(2, V, D)
    dense = jax.jit(lambda head: heads.logits(cfg, head, heads.factors(cfg, head, e), U))
    still, noisy = dense(filled(mode, jnp.zeros)), dense(lively(mode))
    base = 0 * still if mode == 'full' else jnp.broadcast_to((e @ U.T)[:, None, None], still.shape)
    np.testing.assert_allclose(still, base, atol=1e-5)
    assert jnp.abs(noisy - base).max() > 0.1


def test_a_new_head_has_components_that_differ_a_little(fresh):
    """Equal ones would stay equal for ever (tests/tensorhead/test_losses.py trains some)."""
    cfg, e, U = config(), normal(1, 2, D), normal(2, V, D)
    z = heads.logits(cfg, fresh, heads.factors(cfg, fresh, e), U)
    gap = np.abs(z[:, :, 1:] - z[:, :, :1]).max((0, 1, 3))
    assert (gap > 0.01).all() and np.abs(z - (e @ U.T)[:, None, None]).max() < 2
    assert np.ptp(fresh['gate']['kernel'], axis=1).min() > 0 and not np.any(fresh['gate']['bias'])


def test_low_rank_noise_is_as_large_as_that_of_a_full_matrix(fresh):
    down, up = (np.std(fresh['factors'][name]) for name in ('down', 'up'))
    assert K ** 0.5 * down * up == pytest.approx(config().init_std, rel=0.1)  # of a sum of K products


@pytest.mark.parametrize('layout', ('tied', 'untied', 'packed', 'projected'))
def test_unembedding_is_the_bases_own(layout):
    """Rows of U at the draft ids give the logits that the whole model gives those words."""
    width = 6 if layout == 'projected' else D
    base = {'embed': {'tokens': normal(0, V, width)}}
    if layout == 'projected':
        base['embed']['project_out'] = {'kernel': normal(1, D, width)}
    elif layout != 'tied':
        own = normal(1, V, D)
        base['lm_head'] = {'kernel': own.T} if layout == 'untied' else {'kernel_t': own}
    base = jax.tree.map(jnp.asarray, base)
    cfg = tiny_config(vocab=V, hidden=D, heads=2, kv_heads=2)
    e = normal(3, 5, D)
    want = unembed(cfg, base, e)
    for head, ids in (({}, np.arange(V)), ({'draft_ids': jnp.asarray(IDS)}, IDS)):
        U = heads.unembedding(base, head)
        assert U.shape == (len(ids), D)
        np.testing.assert_allclose(e @ U.T, want[:, ids], atol=1e-5)


def test_base_ids_to_draft_ids_and_back():
    head = {'draft_ids': jnp.asarray(IDS)}
    tokens = np.arange(V).reshape(4, 5)
    index, known = heads.index_of(head, jnp.asarray(tokens))
    np.testing.assert_array_equal(known, np.isin(tokens, IDS))
    np.testing.assert_array_equal(IDS[np.asarray(index)][known], tokens[known])
    assert index.min() >= 0 and index.max() < len(IDS)  # an unknown token's index is masked, so it must be some word's
    every, all_known = heads.index_of({}, jnp.asarray(tokens))
    np.testing.assert_array_equal(every, tokens)
    assert all_known.all()


@pytest.mark.parametrize('ids, words', ((None, 7), (IDS, 0), (IDS, 6), (IDS[::-1], 7), (IDS + 3, 7), (IDS - 1, 7),
                                        (np.zeros(7, int), 7)))
def test_draft_ids_that_do_not_fit_are_refused(ids, words):
    assert 'draft_ids' in jax.eval_shape(lambda: heads.init(config(draft_vocab=7), jax.random.key(0), IDS))
    with pytest.raises(ConfigError, match='draft_vocab'):
        heads.init(config(draft_vocab=words), jax.random.key(0), ids)
