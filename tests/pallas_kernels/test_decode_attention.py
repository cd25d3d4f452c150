"""What is decode_attention's own: that it is the rooms' attention, what it reads, and what it must not notice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.cache import WindowState
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.layers import attend, make_context
from pallas_kernels.decode_attention import OP
from pallas_kernels.decode_attention.limits import BOUNDS, limits
from pallas_kernels.decode_attention.ref import decode_attention, positions, visible
from pallas_kernels.modes import interpreter
from stagformer import state as states
from stagformer.config import StagFormerConfig

BASE = ModelConfig('llama', 97, 32, 2, 96, AttentionConfig(4, 2, 8), MlpConfig(48))


def data(batch, size, heads, groups, hd, slots, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    return make(batch, size, heads, hd), make(batch, groups, slots, hd), make(batch, groups, slots, hd)


@pytest.mark.parametrize('window', (None, 7))
def test_it_is_the_attention_of_the_backbone(window):
    cfg = BASE.replace(attention=AttentionConfig(4, 2, 8, window=window))
    pos, (q, k, v) = jnp.array([0, 11, 29]), data(3, 3, 4, 2, 8, 32)
    want = attend(q, k, v, make_context(cfg, pos, 3, 32))
    np.testing.assert_allclose(decode_attention(q, k, v, pos, 0, window), want, atol=1e-6)


@pytest.mark.parametrize('window, slots', ((None, 24), (5, 9)))
def test_its_mask_is_what_a_stack_sees_of_the_one_below(window, slots):
    """A ring where there is a window, before and after it has gone round."""
    cfg = StagFormerConfig(BASE, (1, 1), window=window)
    pos = jnp.array([0, 3, 9, 20])
    at = positions(pos, 1)
    empty = jnp.zeros((4, 1, slots, 8))
    memory = states.KVState(empty, empty) if window is None else WindowState(empty, empty)
    want = states.remembered(cfg, memory, at, pos)
    np.testing.assert_array_equal(visible(at, slots, 1, window, window is not None), want)
    assert not want[0].any() and want[2].any()


@pytest.mark.parametrize('lag, window, ring', ((0, None, False), (1, None, False), (0, 5, False), (1, 6, True)))
def test_the_blocks_that_kernels_read_hold_all_that_is_seen_and_no_block_more(lag, window, ring):
    slots, block, size = 30, 4, 3
    pos = jnp.array([0, 1, 4, 13, 27, *((40, 62) if ring else ())])
    above, latest, bounds = limits(pos, size, slots, block, lag, window, ring)
    mask = np.asarray(visible(positions(pos, size), slots, lag, window, ring))
    first, count, turn, base, lowest, highest = (np.asarray(bounds[:, i, None]) for i in range(len(BOUNDS)))
    slot = np.arange(slots)
    held = slot + turn - slots * (slot > base)
    seen = (held[:, None] > np.asarray(above)[..., None]) & (held[:, None] <= np.asarray(latest)[..., None])
    np.testing.assert_array_equal(seen, mask)
    np.testing.assert_array_equal((held > lowest) & (held <= highest), mask.any(1))
    read = (slot // block >= first) & (slot // block < first + count)
    assert not (mask.any(1) & ~read).any()
    if not ring:
        used = np.pad(mask.any(1), ((0, 0), (0, -slots % block))).reshape(len(pos), -1, block).any(-1)
        np.testing.assert_array_equal(used.sum(1), count[:, 0])


@functools.cache
def poisoned(platform):
    """Arguments with NaN wherever no query looks, and the same with zeros there."""
    q, k, v = data(2, 2, 2, 1, 64, 128, jnp.bfloat16)
    pos = jnp.array([3, 70])
    unseen = ~visible(positions(pos, 2), 128, 0, 40, False).any(1)[:, None, :, None]
    run = OP.kernel(platform).run
    call = lambda k, v: np.asarray(run(q, k, v, pos, 0, 40, False, interpret=interpreter(platform)), np.float32)
    fill = lambda value: call(*(jnp.where(unseen, value, a) for a in (k, v)))
    return fill(jnp.nan), fill(0), call(k, v.at[0, 0, 4].set(jnp.nan))


@pytest.mark.parametrize('platform', ('tpu', 'gpu'))
def test_what_no_query_sees_has_no_effect(platform):
    with_nan, with_zeros, needed = poisoned(platform)
    np.testing.assert_array_equal(with_nan, with_zeros)
    assert np.isnan(needed[0, 1]).all() and np.isfinite(needed[1]).all()  # control: a slot that is looked at


@pytest.mark.parametrize('platform', ('tpu', 'gpu'))
def test_two_streams_at_once_are_each_alone(platform):
    """Slow and fast stream of a token: two queries at one position, over the slow stream's keys."""
    q, k, v = data(2, 2, 2, 1, 64, 64, jnp.bfloat16)
    pos = jnp.array([9, 50])
    run = functools.partial(OP.kernel(platform).run, interpret=interpreter(platform))
    both = run(q, k, v, jnp.stack([pos, pos], 1))
    for stream in range(2):
        alone = decode_attention(q[:, stream:stream + 1], k, v, pos)
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (both[:, stream:stream + 1], alone)), atol=2e-2)


def test_a_query_that_sees_nothing_gets_exactly_zero():
    q, k, v = data(2, 1, 2, 1, 8, 16)
    y = decode_attention(q, k, v, jnp.array([0, 1]), 1)
    assert not y[0].any()
    np.testing.assert_allclose(y[1, 0], jnp.broadcast_to(v[1, :, 0], (2, 8)), atol=1e-6)


def test_what_does_not_fit_is_refused():
    q, k, v = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in data(2, 1, 3, 2, 64, 64, jnp.bfloat16))
    pos = jax.ShapeDtypeStruct((2,), jnp.int32)
    fits = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)
    for kernel in OP.kernels:
        assert 'does not fit' in kernel.refuses(q, k, v, pos)
        assert kernel.refuses(fits, k, v, pos) is None
        assert 'alike' in kernel.refuses(fits, k, jax.ShapeDtypeStruct((2, 2, 32, 64), jnp.bfloat16), pos)
        assert 'pos' in kernel.refuses(fits, k, v, jax.ShapeDtypeStruct((3,), jnp.int32))
