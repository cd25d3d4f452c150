"""Through a cache: one token at a time, in blocks, after rejected blocks and uneven prompts, in every layout.

Everything is held to the model in numpy (reference.py), which has no cache to get wrong. A few models, each compiled
for one token and for four, serve all of the quick tests; every other pair of model and layout is marked slow.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.cache import WindowState, window_positions
from backbone.errors import ConfigError
from stagformer import layout
from stagformer.model import init_params
from stagformer.target import StagFormerTarget
from tests.conftest import tiny_config
from tests.stagformer.reference import Staggered, staggered
from tests.stagformer.test_model import VOCAB, make, params_of

# Heads of 16, so that the C attention of packed models takes part.
BASE = tiny_config(vocab=VOCAB, hidden=32, layers=4, heads=2, kv_heads=1, max_seq_len=32)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 9), np.int32)
DEPTHS = {1: (4,), 2: (2, 2), 3: (1, 1, 1), 4: (1, 1, 1, 1)}
FORMS = ('storage', 'tuple', 'arrays')
SLOTS, BLOCK = 16, 3

CASES = {f'p={p} w={w}': make(DEPTHS[p], BASE, window=w) for p, w in itertools.product(DEPTHS, (None, 1, 3))} | {
    'shared': make((2, 2), BASE, shared=True),
    'shared, three passes, window': make((2, 2, 2), BASE, shared=True, window=3),
    'all below, window, mixed, uneven': make((1, 2, 1), BASE, context_from='all_prev', window=3, mix=True),
    'mixed': make(DEPTHS[4], BASE, mix=True, window=3),
    'no norm, no positions, one key head': make((2, 2), BASE, context_norm=False, cross_rope=False, cross_kv_heads=1),
    'not staggered': make((2, 2), BASE, lag=0),
    'not staggered, window': make((2, 2), BASE, lag=0, window=3),
}


def holds(cfg, form):
    try:
        layout.check_form(cfg, form)
    except ConfigError:
        return False
    return True


EVERY = [(case, form) for case, form in itertools.product(CASES, FORMS) if holds(CASES[case], form)]


def quick(*pairs):
    """Parameters of a test: these pairs of case and form in the suite, all others as slow ones."""
    return pytest.mark.parametrize('case, form', [
        *pairs, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY if pair not in pairs)])


@functools.cache
def ready(cfg, form, dtype='float32', **options):
    """(target, its parameters, the parameters as stored, its compiled forward)."""
    stored = params_of(cfg, dtype)
    packed = stored if form == 'storage' else layout.pack(cfg, stored, form=form)
    target = StagFormerTarget(cfg, dtype, form, **options)
    return target, packed, stored, jax.jit(
        lambda tokens, cache, **options: target.forward(packed, jnp.asarray(tokens), cache, **options))


def feed(forward, cache, tokens, sizes):
    """Runs tokens [B, S] block by block and keeps all of them. Returns logits [B, S, V] and the cache."""
    got, at = [], 0
    for size in sizes:
        output = forward(tokens[:, at:at + size], cache)
        got.append(output.logits)
        at += size
        cache = commit(output.cache, np.full(len(tokens), size - 1, np.int32), tokens[:, min(at, tokens.shape[1] - 1)])
    return np.concatenate(got, 1), cache


commit = jax.jit(caches.commit)


def rounding(case):
    """Of a logit in float32. Without a norm on what is read, and in the control without stagger, it rounds coarser."""
    return 1e-5 if CASES[case].context_norm and CASES[case].lag else 5e-5


def references(cfg, stored, tokens=TOKENS):
    return np.stack([staggered(cfg, stored, row)[0] for row in tokens])


@quick(('p=2 w=3', 'tuple'), ('mixed', 'arrays'), ('shared, three passes, window', 'tuple'),
       ('all below, window, mixed, uneven', 'tuple'))
def test_every_way_through_a_cache_is_the_whole_pass(case, form):
    """From an empty cache, and after a prompt in blocks that cross the window."""
    target, _, stored, forward = ready(CASES[case], form)
    want = references(target.cfg, stored)
    for sizes in ((1,) * 9, (4, 1, 4)):
        got, _ = feed(forward, target.init_cache(2, SLOTS, BLOCK), TOKENS, sizes)
        np.testing.assert_allclose(got, want, atol=rounding(case))


@pytest.mark.parametrize('case', [c if c == 'p=2 w=1' else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_in_float64(case):
    with jax.enable_x64(True):
        target, _, stored, forward = ready(CASES[case], 'storage', 'float64')
        want = references(target.cfg, stored)
        for sizes in ((1,) * 9, (4, 1, 4)):
            got, _ = feed(forward, target.init_cache(2, SLOTS, BLOCK), TOKENS, sizes)
            np.testing.assert_allclose(got, want, atol=1e-9)


def prompted(target, forward, tokens, lengths):
    """Logits of the last token of each row's prompt, right-padded, and the cache after it."""
    last = np.array(lengths, np.int32) - 1
    output = forward(tokens, target.init_cache(2, SLOTS, BLOCK), logits_at=last)
    return output.logits[:, 0], commit(output.cache, last, TOKENS[np.arange(2), last + 1])


@quick(('mixed', 'arrays'), ('all below, window, mixed, uneven', 'tuple'))
def test_rows_of_different_length(case, form):
    """Prompts shorter and longer than the window, right-padded: the padding is seen by nobody, now or later."""
    lengths, padded, rows = np.array([2, 4], np.int32), TOKENS[:, :4].copy(), np.arange(2)
    padded[0, 2:] = 0
    target, _, stored, forward = ready(CASES[case], form)
    want = references(target.cfg, stored)
    first, cache = prompted(target, forward, padded, lengths)
    np.testing.assert_allclose(first, want[rows, lengths - 1], atol=rounding(case))
    for at in range(4):
        output = forward(TOKENS[rows, lengths + at][:, None], cache)
        np.testing.assert_allclose(output.logits[:, 0], want[rows, lengths + at], atol=rounding(case))
        cache = commit(output.cache, np.zeros(2, np.int32), TOKENS[rows, lengths + at + 1])


def after_rejections(case, form, room):
    """Rounds of four tokens of which three, two, one or none are kept: the largest error of what they say."""
    rng, pos, worst = np.random.default_rng(2), 0, 0.0
    target, _, stored, forward = ready(CASES[case], form)
    want, cache = references(target.cfg, stored), target.init_cache(2, SLOTS, room)
    for kept in (3, 1, 0, 2, 1):  # none: as for rows that are finished
        tokens = rng.integers(0, VOCAB, (2, 4), np.int32)
        tokens[:, :kept] = TOKENS[:, pos:pos + kept]
        output = forward(tokens, cache)
        worst = max([worst, *np.abs(output.logits[:, :kept] - want[:, pos:pos + kept]).ravel()])
        pos += kept
        cache = commit(output.cache, np.full(2, kept - 1, np.int32), TOKENS[:, pos])
    return worst


@quick(('p=2 w=3', 'tuple'), ('p=2 w=None', 'arrays'))
def test_rejected_blocks_leave_no_trace(case, form):
    assert after_rejections(case, form, BLOCK) < rounding(case)


def test_a_ring_without_room_for_a_block_is_caught():
    """Negative control: there rejected tokens overwrite what the next one still reads."""
    assert after_rejections('p=2 w=3', 'tuple', 0) > 1e-2


def poison(target, cache, also=-1):
    """NaN in every slot that no query at pos or later may read. also: a position that a ring's queries may."""
    pos = np.asarray(cache.pos)[:, None]

    def spoil(memory):
        if isinstance(memory, WindowState):
            held = np.asarray(window_positions(memory, cache.pos))
            dead = (held < 0) | (held < pos - target.cfg.window) | (held == also)
        else:
            dead = np.arange(memory.k.shape[-2]) >= pos
        return jax.tree.map(lambda a: jnp.asarray(np.where(dead[:, None, :, None], np.nan, a), a.dtype), memory)

    return cache.replace(layers=jax.tree.map(
        spoil, cache.layers, is_leaf=lambda m: isinstance(m, (WindowState, caches.KVState))))


@quick(('mixed', 'arrays'), ('all below, window, mixed, uneven', 'tuple'))
def test_slots_nobody_may_read_hold_anything(case, form):
    target, _, stored, forward = ready(CASES[case], form)
    if target.cfg.lag == 0:
        pytest.skip('reads further: its ring holds a position more than this says')
    want = references(target.cfg, stored)
    _, cache = feed(forward, target.init_cache(2, SLOTS, BLOCK), TOKENS[:, :5], (4, 1))
    for size in (1, 4):
        got = forward(TOKENS[:, 5:5 + size], poison(target, cache))
        np.testing.assert_allclose(got.logits, want[:, 5:5 + size], atol=rounding(case))
    if target.cfg.window == 3:  # control: the oldest position in sight
        assert np.isnan(forward(TOKENS[:, 5:6], poison(target, cache, also=2)).logits).any()


# --- the approximation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('window, form', [(3, 'tuple'), *(
    pytest.param(*p, marks=pytest.mark.slow) for p in itertools.product((None, 3), FORMS) if p != (3, 'tuple'))])
def test_recurrent_decoding(window, form):
    """After a prompt the first token is the exact model's, and the second is not: it is what a single pass says that
    reads its own outputs. One token at a time and in blocks."""
    cfg = make((2, 2), BASE, shared=True, window=window)
    target, _, stored, forward = ready(cfg, form, recurrent=True)
    assert not target.exact and target.reference == dataclasses.replace(target, recurrent=False)
    want, exact = [], references(cfg, stored)
    for row in TOKENS:
        model = Staggered(cfg, stored)
        want.append([model.step(token, recurrent=at >= 4)[0] for at, token in enumerate(row)])
    want = np.array(want)
    np.testing.assert_allclose(want[:, :5], exact[:, :5], atol=1e-9)
    assert np.abs(want - exact)[:, 5:].max(-1).min() > 1e-3
    first, cache = prompted(target, forward, TOKENS[:, :4], (4, 4))
    np.testing.assert_allclose(first, want[:, 3], atol=2e-5)
    for sizes in ((1,) * 5, (4, 1)):
        got, _ = feed(forward, cache, TOKENS[:, 4:], sizes)
        np.testing.assert_allclose(got, want[:, 4:], atol=2e-5)


# --- what a step does -------------------------------------------------------------------------------------------------

PRODUCTS = ('dot_general', 'ffi_call')


def longest(jaxpr, begin) -> tuple[list[int], int]:
    """(products behind each output on the longest way to it, products in all). begin: those behind each input."""
    behind, total = dict(zip(jaxpr.invars, begin, strict=True)), 0
    for eqn in jaxpr.eqns:
        before = [behind.get(v, 0) if not hasattr(v, 'val') else 0 for v in eqn.invars]
        inner = [sub for value in eqn.params.values() for sub in (value if isinstance(value, tuple) else (value,))
                 if hasattr(sub, 'jaxpr') or hasattr(sub, 'eqns')]
        if inner:  # of several branches the one that computes most stands for all
            runs = [longest(*(lambda j: (j, before[len(before) - len(j.invars):]))(getattr(sub, 'jaxpr', sub)))
                    for sub in inner]
            after, count = max(runs, key=lambda run: run[1])
        else:
            count = int(eqn.primitive.name in PRODUCTS)
            after = [max(before, default=0) + count] * len(eqn.outvars)
        behind |= dict(zip(eqn.outvars, after, strict=True))
        total += count
    return [behind.get(v, 0) for v in jaxpr.outvars], total


def products(cfg, form) -> tuple[int, int]:
    """Matrix products of one step: (on the longest way to the logits, in all)."""
    target, stored = StagFormerTarget(cfg, form=form), jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    params = jax.eval_shape(lambda p: layout.pack(cfg, p, form=form), stored)
    cache = jax.eval_shape(lambda: target.init_cache(1, SLOTS, 0))
    traced = jax.make_jaxpr(lambda p, c: target.forward(p, jnp.ones((1, 1), jnp.int32), c).logits)(params, cache)
    (way,), total = longest(traced.jaxpr, [0] * len(traced.jaxpr.invars))
    return way, total


@pytest.mark.parametrize('shared', (False, pytest.param(True, marks=pytest.mark.slow)))
def test_one_step_runs_all_stacks_at_once(shared):
    """With a stack axis a step is as many products as one stack has, whatever the number of stacks: 6 a layer and 4 of
    its cross-attention, the head, and one that publishes. In no form does the longest chain grow with the stacks; one
    pass after another, which the model without stagger needs, is the control."""
    depth, step = 2, 2 * (6 + 4) + 1
    models = [make((depth,) * p, BASE, window=3, shared=shared) for p in (2, 4)]
    # Publishing is behind the logits, so on nobody's way to them.
    assert [products(cfg, 'arrays') for cfg in models] == [(step, step + 1)] * 2
    ways = [products(cfg, 'tuple')[0] for cfg in models]  # a few more: there C writes the cache
    assert step <= ways[0] == ways[1] < 1.2 * step
    waiting = [products(dataclasses.replace(cfg, lag=0), 'tuple')[0] for cfg in models]
    assert waiting[0] > 1.5 * step and waiting[1] > 3 * step
