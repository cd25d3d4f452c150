"""Contract tests 4 and 10: what the cache holds after a round, and that nothing reads the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.model import PlainTarget, forward
from backbone.sampling import GREEDY, Sampling
from harness import decode as loop
from tests.conftest import lively, tiny_config
from tests.contract.test_greedy import CACHED


@pytest.fixture(scope='module')
def fresh(target, params):
    """Keys and values of each layer by one pass over ids [4, 64]."""
    return jax.jit(lambda tokens: target.forward(params, tokens, target.init_cache(4, 64, 0)).cache.layers)


@pytest.mark.parametrize('sampling', (GREEDY, Sampling(1.0)), ids=('greedy', 'sampled'))
@pytest.mark.parametrize('name', CACHED)
def test_cache_equals_a_fresh_prefill_after_every_round(target, params, prompts, drafters, fresh, name, sampling):
    drafter = drafters[name]
    request = loop.prepare(target, prompts, max_new_tokens=10, sampling=sampling)
    assert request.capacity == 64
    state = loop.start(target, drafter, params, request)
    rounds = 0
    while not state.finished.all():
        state = loop.decode_one(target, drafter, params, state, **request.rounds)
        want = fresh(state.cache.tokens[:, :64])
        live = (jnp.arange(64) < state.cache.pos[:, None])[:, None, :, None]
        for got_leaf, want_leaf in zip(jax.tree.leaves(state.cache.layers), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(jnp.where(live, got_leaf, 0), jnp.where(live, want_leaf, 0), atol=1e-4)
        rounds += 1
    assert rounds >= 2


def test_a_cache_one_slot_off_is_caught(target, params):
    """Negative control of the comparison above: rejected slots kept by mistake do differ."""
    tokens = jnp.arange(1, 17)[None]
    cache = target.forward(params, tokens, target.init_cache(1, 32, 0)).cache
    shifted = caches.commit(cache, jnp.array([9]), jnp.array([3]))
    wrong = target.forward(params, tokens[:, 11:], shifted).cache
    k, v = cache.layers.k, wrong.layers.k
    assert float(jnp.abs(k - v)[:, :, :, :16].max()) > 1e-2


def test_commit_is_the_only_mover(target, params):
    cache = target.init_cache(2, 32, 0)
    output = target.forward(params, jnp.ones((2, 4), jnp.int32), cache)
    assert output.cache.pos.tolist() == [0, 0]
    moved = caches.commit(output.cache, jnp.array([2, -1]), jnp.array([5, 6]))
    assert moved.pos.tolist() == [3, 0]
    assert moved.pending.tolist() == [5, 1]  # a finished row keeps its pending token


def test_writes_past_the_end_are_dropped(target, params):
    """A block over the end of the buffer leaves every live slot alone (a clamped update would not)."""
    cache = target.forward(params, jnp.arange(8)[None], target.init_cache(1, 8, 0)).cache
    full = caches.commit(cache, jnp.array([6]), jnp.array([1]))
    after = target.forward(params, jnp.arange(20, 25)[None], full).cache
    np.testing.assert_array_equal(after.layers.k[..., :7, :], full.layers.k[..., :7, :])
    assert float(jnp.abs(after.layers.k[..., 7, :] - full.layers.k[..., 7, :]).max()) > 0


@pytest.mark.parametrize('window', (None, 3))
def test_causal_by_gradient(window):
    """Logits at s move with embeddings at t exactly when t <= s (and s - t < layers * (window - 1) + 1)."""
    base = tiny_config(layers=2)
    cfg = base.replace(attention=base.attention.__class__(4, 2, 8, window=window))
    params, size = lively(cfg), 10
    tokens = jax.random.randint(jax.random.key(2), (1, size), 0, cfg.vocab_size)

    def energy(table):
        """[S]: one number a position. Distinct ids, so the gradient by table row is the gradient by position."""
        p = params | {'embed': {'tokens': table}}
        return (forward(cfg, p, jnp.arange(size)[None])[0] ** 2).sum(-1)

    moved = jnp.abs(jax.jit(jax.jacrev(energy))(params['embed']['tokens'][tokens[0]])).max(-1) > 0
    for s in range(size):
        reach = range(size) if window is None else range(s - 2 * (window - 1), size)
        assert moved[s].tolist() == [t <= s and t in reach for t in range(size)]


def test_cached_blocks_equal_one_pass(target, cfg, params):
    """Step by step, in blocks, and at once: the same logits."""
    tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, cfg.vocab_size)
    want = forward(cfg, params['base'], tokens)
    step = jax.jit(lambda tokens, cache: target.forward(params, tokens, cache))
    for sizes in ((1,) * 12, (5, 4, 3), (12,)):
        cache, got, at = target.init_cache(2, 16, 0), [], 0
        for size in sizes:
            output = step(tokens[:, at:at + size], cache)
            got.append(output.logits)
            at += size
            cache = caches.commit(output.cache, jnp.full((2,), size - 1), tokens[:, min(at, 11)])
        np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)


def test_window_reads_only_its_slots(cfg, params):
    windowed = PlainTarget(cfg.replace(attention=cfg.attention.__class__(4, 2, 8, window=4)))
    tokens = jnp.arange(1, 13)[None]
    want = windowed.forward(params, tokens, windowed.init_cache(1, 16, 0)).logits
    assert float(jnp.abs(want - forward(cfg, params['base'], tokens)).max()) > 1e-2
    np.testing.assert_allclose(want, forward(windowed.cfg, params['base'], tokens), atol=1e-5)
