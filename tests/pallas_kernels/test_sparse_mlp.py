"""The gathered ops (sparse_mlp, rows_in, rows_out, moe_gather): what is not chosen is not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import CompilerMissing
from harness import topology
from pallas_kernels import api
from pallas_kernels.errors import KernelError
from pallas_kernels.modes import interpreter

PLATFORMS = ('tpu', 'gpu')


def interpreted(name, platform, *args):
    return api.OPS[name].kernel(platform).run(*args, interpret=interpreter(platform))


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.bfloat16)


def same(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('platform', PLATFORMS)
def test_the_mlp_reads_the_blocks_it_is_told_and_of_its_layer_only(platform):
    """Every other block, the other layer and the padding's block are NaN: one number of them would show."""
    kept = jnp.asarray([3, 0], jnp.int32)
    poison = lambda w, ids: jnp.full_like(w, jnp.nan).at[1, ids].set(w[1, ids])
    up, down = drawn(2, 8, 16, 64), drawn(2, 4, 16, 64)
    up, down = poison(up, jnp.concatenate([kept, 4 + kept])), poison(down, kept)
    args = drawn(2, 64), up.reshape(2, 128, 64), down.reshape(2, 64, 64)
    want = api.sparse_mlp(*args, kept, jnp.int32(2), 1, block=16, implementation='xla')
    assert np.isfinite(want).all()
    padded = jnp.asarray([3, 0, 1, 2], jnp.int32)
    same(interpreted('sparse_mlp', platform, *args, padded, jnp.int32(2), 1, None, None, 16, 'silu'), want)
    # Negative control: with one id more, the poison is read.
    got = interpreted('sparse_mlp', platform, *args, padded, jnp.int32(3), 1, None, None, 16, 'silu')
    assert np.isnan(got).all()


@pytest.mark.parametrize('platform', PLATFORMS)
def test_rows_that_do_not_count_add_nothing_not_even_nan(platform):
    w, ids = drawn(1, 64, 64), jnp.asarray([2, 0, 0], jnp.int32)
    h = drawn(2, 48).at[:, 16:].set(jnp.nan)
    same(interpreted('rows_out', platform, h, w, ids, jnp.int32(1), 0, 16), h[:, :16].astype(jnp.float32) @ w[0, 32:48])


@pytest.mark.parametrize('platform', PLATFORMS)
def test_an_expert_adds_nothing_to_rows_that_do_not_go_through_it(platform):
    """Slot 0 is NaN: a row without it is clean, in a slot that does not count it hurts nobody."""
    x, up, down = drawn(2, 64), drawn(2, 64, 64).at[0].set(jnp.nan), drawn(2, 64, 64)
    slots, weights = jnp.asarray([1, 0], jnp.int32), jnp.asarray([[0.5, 0], [0.25, 1]])
    got = interpreted('moe_gather', platform, x, None, up, down, slots, weights, jnp.int32(2), 'relu')
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()
    alone = interpreted('moe_gather', platform, x, None, up, down, slots, weights, jnp.int32(1), 'relu')
    same(alone, api.moe_gather(x, None, up[1:], down[1:], jnp.zeros(1, jnp.int32), weights[:, :1], activation='relu'))


def test_each_row_may_name_its_own_slots():
    x, up, down = (drawn(*shape).astype(jnp.float32) for shape in ((3, 8), (5, 8, 4), (5, 4, 8)))
    slots, weights = jnp.asarray([[4, 1], [1, 4], [0, 1]], jnp.int32), jnp.asarray([[0.5, 1], [2, 0], [1, 3]])
    one = lambda m, k: weights[m, k] * (jnp.maximum(x[m] @ up[slots[m, k]], 0) @ down[slots[m, k]])
    want = jnp.stack([one(m, 0) + one(m, 1) for m in range(3)])
    np.testing.assert_allclose(api.moe_gather(x, None, up, down, slots, weights, activation='relu'), want, atol=1e-5)


def test_what_is_unknown_is_named():
    w, ids = drawn(1, 32, 64), jnp.zeros(1, jnp.int32)
    with pytest.raises(KernelError, match='activation'):
        api.sparse_mlp(drawn(1, 64), w, w, ids, jnp.int32(1), block=16, activation='swish')
    with pytest.raises(KernelError, match='a block of 4 rows'):
        api.rows_in(drawn(1, 64), w, ids, jnp.int32(1), block=4, implementation='tpu')


def test_no_copy_is_made_of_the_stacked_weights():
    """The compiled program has, for a model of 8 layers, nothing of a layer's size beside its arguments."""
    try:
        devices, _ = topology.get('v5e:1x1')
    except CompilerMissing as error:
        pytest.skip(str(error))
    place = jax.sharding.SingleDeviceSharding(devices[0])
    shape = lambda *a, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(a, dtype, sharding=place)
    run = jax.jit(api.OPS['sparse_mlp'].kernel('tpu').run, static_argnums=(6, 7, 8, 9))
    compiled = run.lower(shape(1, 256), shape(8, 2048, 256), shape(8, 1024, 256), shape(8, dtype=jnp.int32),
                         shape(dtype=jnp.int32), shape(dtype=jnp.int32), None, None, 16, 'silu').compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 256 * 2
    moved = [line for line in compiled.as_text().splitlines() if 'bf16[8,' in line and ' copy' in line]
    assert not moved, moved
