"""Chunked log-sum-exp: equal to the dense one with its gradients, and what it never makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorhead import head as heads
from tensorhead import losses, lse
from tensorhead.config import TensorHeadConfig
from tensorhead.lse import linear_lse

ROWS, W, D, CHUNK = (3, 7, 4), 517, 16, 128  # 84 rows; neither the words nor the rows fill their last block
R = 84


def data(dtype=np.float32):
    rng = np.random.default_rng(0)
    h, U, g = (rng.standard_normal(shape, np.float32) for shape in ((*ROWS, D), (W, D), ROWS))
    return jnp.asarray(h, dtype), jnp.asarray(U, dtype), jnp.asarray(g)


@functools.cache
def dense():
    """lse and gradients in float64, by numpy: what every form is held to."""
    h, U, g = (np.asarray(a, np.float64) for a in data())
    return exact(h, U, g)


def exact(h, U, g):
    z = h @ U.T
    top = z.max(-1, keepdims=True)
    norm = np.log(np.exp(z - top).sum(-1, keepdims=True)) + top
    p = np.exp(z - norm) * g[..., None]
    return norm[..., 0], p @ U, p.reshape(R, W).T @ h.reshape(R, D)


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(h, U, g, chunk, frozen):
    value, back = jax.vjp(lambda h, U: linear_lse(h, U, chunk, frozen), h, U)
    return value, *back(g)


@pytest.mark.parametrize('chunk, frozen', ((CHUNK, False), (CHUNK, True), (1000, True), (0, True), (0, False)))
def test_chunks_equal_the_whole(chunk, frozen):
    value, dh, dU = run(*data(), chunk, frozen)
    want = dense()
    np.testing.assert_allclose(value, want[0], atol=3e-6)
    np.testing.assert_allclose(dh, want[1], atol=5e-6)
    np.testing.assert_allclose(dU, 0 * want[2] if frozen else want[2], atol=5e-6)
    assert np.abs(want[2]).max() > 0.1


def test_words_counted_twice_would_be_seen(monkeypatch):
    """The last chunk reaches back over the one before: control for the mask."""
    part = lse._part
    monkeypatch.setattr(lse, '_part', lambda U, i, size: part(U, i, size)[:2] + (jnp.ones(size, bool),))
    assert np.abs(lse._forward(*data()[:2], CHUNK, False)[0] - dense()[0]).max() > 1e-2


@pytest.mark.parametrize('frozen', (False, True))
def test_bfloat16_sums_in_float32(frozen):
    h, U, g = data(jnp.bfloat16)
    value, dh, dU = run(h, U, g, CHUNK, frozen)
    assert (value.dtype, dh.dtype, dU.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    want = exact(*(np.asarray(a, np.float64) for a in (h, U, g)))
    np.testing.assert_allclose(value, want[0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(dh, np.float64), want[1], atol=0.02)
    np.testing.assert_allclose(np.asarray(dU, np.float64), 0 * want[2] if frozen else want[2], atol=0.02)
    control = jax.nn.logsumexp(h @ U.T, axis=-1)  # logits and sum in bfloat16
    assert np.abs(np.asarray(control, np.float64) - want[0]).max() > 1e-2


def test_large_logits_stay_finite():
    """Logits of +-1e4; a row of equal ones has the middle of U as its gradient."""
    h, U, g = data()
    h, U = h.at[0, 0].set(0) * 1e4, U / jnp.linalg.norm(U, axis=-1, keepdims=True)
    value, dh, dU = run(h, U, g, CHUNK, False)
    assert all(np.isfinite(a).all() for a in (value, dh, dU)) and np.abs(value).max() > 5e3
    np.testing.assert_allclose(value[0, 0], np.log(W), atol=1e-5)
    np.testing.assert_allclose(dh[0, 0], g[0, 0][:, None] * U.mean(0), atol=1e-6)


# What a traced program holds: sizes of its arrays, and products with chunks of the vocabulary.

def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)


def largest(fn, *args):
    """Elements of the largest array that fn makes."""
    return max(v.aval.size for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr) for v in eqn.outvars)


def products(fn, *args):
    """Matrix products in a trace of fn, and how many passes (scans) they are in."""
    names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr)]
    return names.count('dot_general'), names.count('scan')


def test_no_array_is_larger_than_a_chunk_of_logits():
    h, U, g = data()
    both = lambda chunk, frozen: lambda h, U: jax.grad(lambda h, U: (linear_lse(h, U, chunk, frozen) * g).sum(),
                                                       argnums=(0, 1))(h, U)
    for frozen in (False, True):
        assert largest(both(CHUNK, frozen), h, U) <= R * CHUNK
    assert largest(both(0, False), h, U) >= R * W  # the check sees dense logits


def test_a_frozen_unembedding_is_passed_once():
    """Forward: one pass, which makes the mean vector too where a gradient is wanted. Backward: no product at all."""
    h, U, g = data()
    forms = {frozen: lambda h, U, frozen=frozen: linear_lse(h, U, CHUNK, frozen) for frozen in (False, True)}
    assert products(forms[True], h, U) == products(forms[False], h, U) == (1, 1)
    saved = {frozen: jax.vjp(form, h, U) for frozen, form in forms.items()}
    assert products(lambda h, U: jax.vjp(forms[True], h, U)[0], h, U) == (2, 1)
    assert products(saved[True][1], g) == (0, 0)
    assert products(saved[False][1], g) == (3, 1)  # the control: logits again, then both gradients


def test_the_whole_loss_at_a_published_vocabulary_makes_no_logits():
    """Traced, not run: 4 x 8 positions, n = r = 4, 50257 words, of which 1024 at a time."""
    cfg = TensorHeadConfig(64, 50257, 4, 4, 'lowrank_shared', 8)
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    head = jax.eval_shape(lambda: heads.init(cfg, jax.random.key(0)))
    args = head, of(50257, 64), of(4, 8, 64), of(4, 8, 4, dtype=jnp.int32)
    rows = 4 * 8 * 4 * 4

    def loss(head, U, e, index, chunk, frozen):
        mixture = heads.factors(cfg, head, e)
        logp = losses.gold_logp(cfg, head, mixture, U, index, jnp.ones(index.shape, bool), chunk, frozen)
        return losses.discounted_nll(mixture.log_w, logp, jnp.ones(index.shape[:2]), jnp.ones(4))

    def gradient(chunk, frozen):
        return lambda head, *rest: jax.grad(lambda head: loss(head, *rest, chunk, frozen))(head)

    assert largest(gradient(1024, True), *args) <= max(rows * 1024, 50257 * 64) < rows * 50257
    assert largest(gradient(0, True), *args) == rows * 50257
    assert products(gradient(1024, True), *args)[1] == 1  # one pass over the vocabulary in all
    assert products(gradient(1024, False), *args)[1] == 2
