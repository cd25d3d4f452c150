"""The head is the formula it claims to be, in every mode; its unembedding is the base's own rows."""

import functools

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
IDS = np.array([0, 3, 4, 7, 11, 12, 19])


def config(mode='lowrank_shared', **changes):
    return TensorHeadConfig(D, V, N, R, mode, K, **changes)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def fresh(mode):
    return jax.jit(lambda key: heads.init(config(mode), key))(jax.random.key(0))


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
    head = jax.tree.map(lambda a: a + 0.5 * normal(a.size, *a.shape), fresh(mode))
    e, U = normal(1, 2, 3, D), normal(2, V, D)

    @jax.jit
    def run(head, e, U):
        mixture = heads.factors(cfg, head, e)
        some = heads.factors(cfg, head, e, positions=(1, 2) if mode == 'full' else (2, 0))
        return [mixture.log_w] + [heads.logits(cfg, head, m, U) for m in (mixture, some)]

    log_w, z, some = run(head, e, U)
    assert (log_w.shape, z.shape) == ((2, 3, R), (2, 3, N, R, V))
    for i in np.ndindex(2, 3):
        want_w, want_z = by_hand(mode, head, e[i], U)
        np.testing.assert_allclose(log_w[i], want_w, atol=1e-5)
        np.testing.assert_allclose(z[i], want_z, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(some, z[..., (1, 2) if mode == 'full' else (2, 0), :, :], atol=1e-5)
    assert np.abs(z[..., 1:, :, :] - z[..., :-1, :, :]).max() > 0.1  # or the check above would say nothing


def test_products_for_decoding_agree_and_bfloat16_sums_in_float32():
    cfg = config()
    head, e, U = fresh(cfg.mode), normal(1, 2, D), normal(2, V, D)
    mixture = heads.factors(cfg, head, e)
    np.testing.assert_allclose(heads.logits(cfg, head, mixture, U, packed=True),
                               heads.logits(cfg, head, mixture, U), atol=1e-5)
    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (head, e, U))
    half = heads.factors(cfg, *small[:2])
    z = heads.logits(cfg, small[0], half, small[2])
    assert (half.h.dtype, half.log_w.dtype, z.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(z, heads.logits(cfg, head, mixture, U), atol=0.2)


@pytest.mark.parametrize('mode', MODES)
def test_a_new_head_is_the_base_and_noise_that_tells_components_apart(mode):
    cfg = config(mode)
    e, U = normal(1, 2, D), normal(2, V, D)
    dense = jax.jit(lambda head: heads.logits(cfg, head, heads.factors(cfg, head, e), U))
    still, noisy = dense(jax.tree.map(jnp.zeros_like, fresh(mode))), dense(fresh(mode))
    base = 0 * still if mode == 'full' else jnp.broadcast_to((e @ U.T)[:, None, None], still.shape)
    np.testing.assert_allclose(still, base, atol=1e-5)  # without noise: r equal components, the trap
    gap = jnp.abs(noisy[:, :, 1:] - noisy[:, :, :1]).max((0, 1, 3))
    assert (gap > 0.01).all() and jnp.abs(noisy - base).max() < 2


def test_low_rank_noise_is_as_large_as_full_noise():
    f = fresh('lowrank_shared')['factors']
    product = np.einsum('srdk,srkc->srdc', f['down'], f['up'])
    full = fresh('linear_shared')['factors']['kernel']
    assert np.std(product) == pytest.approx(0.02, rel=0.15) and np.std(full) == pytest.approx(0.02, rel=0.15)


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


@pytest.mark.parametrize('ids, words', ((None, 7), (IDS, 0), (IDS, 6), (IDS[::-1], 7), (IDS + 1, 7), (IDS - 1, 7),
                                        (np.zeros(7, int), 7)))
def test_draft_ids_that_do_not_fit_are_refused(ids, words):
    assert 'draft_ids' in jax.eval_shape(lambda: heads.init(config(draft_vocab=7), jax.random.key(0), IDS))
    with pytest.raises(ConfigError, match='draft_vocab'):
        heads.init(config(draft_vocab=words), jax.random.key(0), ids)
