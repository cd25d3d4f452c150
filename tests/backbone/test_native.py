"""The C products against XLA's, over every shape the tiles treat apart; and the promise of equal bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone import layers, native
from backbone.layers import Context
from backbone.matmul import contract_packed, dense

pytestmark = pytest.mark.skipif(not native.available(), reason=f'no native code: {native.problem()}')
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-6}  # both sum in float32


def rand(seed, *shape, dtype='float32'):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('n', 'k'), ((576, 1536), (1, 1), (3, 17), (70, 48), (130, 33), (4097, 64)))
def test_product_equals_float64(dtype, n, k):
    w = rand(0, n, k, dtype=dtype)
    for m in (1, 2, 3, 4, 5, 8, 11, 16):
        x = rand(m, m, k, dtype=dtype)
        want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        got = jax.jit(native.matmul)(x, w)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * k**0.5 * 4)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_a_row_has_the_same_bits_alone_and_in_a_block(dtype):
    """What makes block verification exact also in bfloat16."""
    w, x = rand(0, 576, 576, dtype=dtype), rand(1, 16, 576, dtype=dtype)
    alone = jnp.concatenate([native.matmul(x[i:i + 1], w) for i in range(16)])
    for m in (2, 3, 5, 16):
        np.testing.assert_array_equal(native.matmul(x[:m], w), alone[:m])


def context(mask):
    return Context(jnp.zeros(mask.shape[:2], jnp.int32), mask, None, native=True)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize(('b', 's', 'h', 'kh', 'hd', 'c'),
                         ((1, 1, 9, 3, 64, 192), (3, 5, 4, 2, 16, 37), (2, 16, 4, 4, 48, 16), (1, 2, 8, 1, 256, 20)))
def test_attention_equals_the_reference(dtype, b, s, h, kh, hd, c):
    q, k, v = rand(0, b, s, h, hd), rand(1, b, kh, c, hd, dtype=dtype), rand(2, b, kh, c, hd, dtype=dtype)
    mask = jnp.asarray(np.random.default_rng(3).random((b, s, c)) < 0.6).at[:, :, 0].set(True)
    got = jax.jit(lambda *a: layers.attend(*a, context(mask)))(q, k, v)
    # The reference rounds q and the weights to the cache's dtype, so it is given a float32 copy of the cache.
    want = layers._attend(q, k.astype(jnp.float32), v.astype(jnp.float32), mask)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_large_scores_do_not_overflow():
    q, k, v = 1e3 * rand(0, 1, 1, 2, 64), rand(1, 1, 2, 40, 64), rand(2, 1, 2, 40, 64)
    mask = jnp.ones((1, 1, 40), bool)
    np.testing.assert_allclose(layers.attend(q, k, v, context(mask)), layers._attend(q, k, v, mask), atol=1e-5)


def test_a_query_has_the_same_bits_alone_and_in_a_block():
    q, k, v = rand(0, 2, 8, 4, 64), rand(1, 2, 2, 50, 64), rand(2, 2, 2, 50, 64)
    mask = jnp.arange(50) <= 20 + jnp.arange(8)[:, None]
    mask = jnp.broadcast_to(mask, (2, 8, 50))
    block = native.attend(q, k, v, mask)
    for i in range(8):
        np.testing.assert_array_equal(block[:, i:i + 1], native.attend(q[:, i:i + 1], k, v, mask[:, i:i + 1]))


def test_unreadable_slots_may_hold_nan():
    q, k, v = rand(0, 1, 2, 2, 64), rand(1, 1, 2, 30, 64), rand(2, 1, 2, 30, 64)
    mask = jnp.broadcast_to((jnp.arange(30) < 20) & (jnp.arange(30) != 4), (1, 2, 30))
    want = native.attend(q, k, v, mask)
    dead = ~mask[0, 0][None, None, :, None]
    poisoned = native.attend(q, jnp.where(dead, jnp.nan, k), jnp.where(dead, jnp.nan, v), mask)
    np.testing.assert_array_equal(poisoned, want)


def test_many_products_at_once():
    """Independent products of one program, and programs of several threads, share the workers without a mix-up."""
    from concurrent.futures import ThreadPoolExecutor
    w = [rand(i, 300, 64) for i in range(4)]
    x = [rand(10 + i, 4, 64) for i in range(4)]
    both = jax.jit(lambda x, w: [native.matmul(a, b) for a, b in zip(x, w, strict=True)])
    want = [a @ b.T for a, b in zip(x, w, strict=True)]

    def many(_):
        for _ in range(100):
            for got, right in zip(both(x, w), want, strict=True):
                np.testing.assert_allclose(got, right, atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))


def test_many_rows_and_other_types_go_to_xla():
    w = rand(0, 40, 32)
    for m in (native.MAX_ROWS, native.MAX_ROWS + 1, 100):
        x = rand(m, 2, m, 32)
        np.testing.assert_allclose(contract_packed(x, w), x @ w.T, atol=1e-5)
    text = jax.jit(contract_packed).lower(rand(0, native.MAX_ROWS + 1, 32), w).as_text()
    assert 'headway_matmul' not in text
    assert 'headway_matmul' in jax.jit(contract_packed).lower(rand(0, native.MAX_ROWS, 32), w).as_text()


def test_other_platforms_never_see_it():
    """The same traced function lowers for a TPU and a GPU without the CPU's custom call."""
    traced = jax.jit(lambda x, w: dense({'kernel_t': w}, x)).trace(rand(0, 1, 32), rand(1, 40, 32))
    for platform in ('tpu', 'cuda'):
        assert 'headway_matmul' not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_wrong_shapes_are_an_error_not_a_crash():
    with pytest.raises(Exception, match='headway_matmul'):
        jax.ffi.ffi_call('headway_matmul', jax.ShapeDtypeStruct((1, 4), jnp.float32))(rand(0, 1, 8), rand(1, 4, 9))


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_store_equals_the_scatter_and_drops_what_is_outside(dtype):
    cache, block = rand(0, 3, 2, 10, 16, dtype=dtype), rand(1, 3, 4, 2, 16).at[0, 0, 0, 0].set(jnp.nan)
    for pos in ([0, 3, 6], [7, 8, 9], [10, 12, 0]):
        pos = jnp.array(pos, jnp.int32)
        got = jax.jit(lambda c, b, p: caches._put(c, b, p, True))(cache, block, pos)
        want = caches._scatter(cache, block, pos)
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_store_leaves_its_argument_alone():
    """The alias is XLA's to grant: a caller that still holds the old cache must not see it change."""
    cache, block = rand(0, 1, 1, 4, 16), rand(1, 1, 2, 1, 16)
    before = np.array(cache)
    new = jax.jit(native.store)(cache, block, jnp.array([1], jnp.int32))
    np.testing.assert_array_equal(cache, before)
    assert not np.array_equal(new, before)


def test_store_is_in_place_in_a_loop():
    """A donated cache in a while_loop: no copy of it in the compiled program."""
    shape = (1, 3, 4096, 64)

    def run(cache, block):
        body = lambda i, c: caches._put(c, block + i, jnp.array([i], jnp.int32), True)
        return jax.lax.fori_loop(0, 5, body, cache)

    text = jax.jit(run, donate_argnums=0).lower(jnp.zeros(shape), rand(0, 1, 1, 3, 64)).compile().as_text()
    assert 'headway_store' in text
    assert not [line for line in text.splitlines() if ' copy(' in line and 'f32[1,3,4096,64]' in line]


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_rows_equal_the_gather(dtype):
    table, ids = rand(0, 50, 24, dtype=dtype), jnp.array([0, 49, 7, 7], jnp.int32)
    np.testing.assert_array_equal(native.rows(table, ids), np.asarray(table, np.float32)[np.asarray(ids)])
    assert np.isfinite(native.rows(table, jnp.array([-5, 1000], jnp.int32))).all()  # clamped, as XLA clamps


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('n', 'k', 'block'), ((96, 640, 16), (30, 33, 1), (24, 8, 3)))
def test_products_with_some_rows(dtype, n, k, block):
    """Those that count, and no others; the bits of the whole product, and the same for a row alone and in a block."""
    w = rand(0, n, k, dtype=dtype)
    blocks = w.reshape(-1, block, k)
    ids = jnp.asarray(np.random.default_rng(1).permutation(n // block)[:5], jnp.int32)
    active = jnp.int32(4)
    for m in (1, 3, 16):
        x, h = rand(m, m, k, dtype=dtype), rand(m, m, 5 * block).at[:, 4 * block:].set(jnp.nan)
        got, whole = native.rows_in(x, blocks, ids, active), native.matmul(x, w).reshape(m, -1, block)
        np.testing.assert_array_equal(got[:, :4 * block], whole[:, ids[:4]].reshape(m, -1))
        assert (got[:, 4 * block:] == 0).all()
        got = native.rows_out(h, blocks, ids, active)
        rows = np.asarray(blocks[ids[:4]], np.float64).reshape(-1, k)
        np.testing.assert_allclose(got, np.asarray(h, np.float64)[:, :4 * block] @ rows, atol=1e-4)
        for i in range(0, m, 5):
            np.testing.assert_array_equal(native.rows_out(h[i:i + 1], blocks, ids, active), got[i:i + 1])
    with pytest.raises(Exception, match='headway_gather'):
        native.rows_in(rand(0, 1, k + 1, dtype=dtype), blocks, ids, active)
