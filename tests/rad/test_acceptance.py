"""Acceptance in one pass is what real drafts from every position have, and one teacher-forced pass is not."""

import jax
import numpy as np
import pytest

from backbone.config import AttentionConfig
from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, embed, finish, forward, sequence_context, unembed
from backbone.sampling import GREEDY
from harness import decode as loop
from harness.baselines import Autoregressive, TwoModel
from harness.decode import generate
from rad import acceptance
from rad.skip import SkipConfig, SkipDrafter, run_skipping
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, layers=3, max_seq_len=64)
PROMPTS = [[1, 2, 3, 4, 5], list(range(20, 31))]
SIZE, BLOCK = 25, 3
SETS = (SkipConfig((1,)), SkipConfig((0, 2)), SkipConfig((0, 1, 2)), SkipConfig((1,), (0,)))


@pytest.fixture(scope='module')
def params():
    return {'base': lively(CFG)}


@pytest.fixture(scope='module')
def cont(params):
    return acceptance.continuation(PlainTarget(CFG), params, PROMPTS, SIZE)


@pytest.fixture(scope='module')
def kept(params, cont):
    run = jax.jit(lambda flags: acceptance.kept(CFG, params['base'], cont, flags, BLOCK))
    return lambda skip: np.asarray(run(skip.flags(3)))


@pytest.fixture(scope='module')
def really_kept(params, cont):
    """f(skip) -> [B, S]: a prefill of every prefix, a draft by the drafter itself, and the continuation beside it."""
    target, drafter = PlainTarget(CFG), SkipDrafter(CFG, None, BLOCK)
    count = SIZE - BLOCK
    rows = [np.asarray(cont.tokens)[b, :int(first) + s] for b, first in enumerate(cont.first) for s in range(count)]
    state = loop.start(target, drafter, params | {'skip': SkipConfig().flags(3)},
                       loop.prepare(target, [row.tolist() for row in rows], max_new_tokens=BLOCK + 2))
    truth = np.stack([np.asarray(cont.tokens)[b, int(first) + s + 1:][:BLOCK]
                      for b, first in enumerate(cont.first) for s in range(count)])
    draft = jax.jit(lambda flags: drafter.draft(params | {'skip': flags}, state.cache, (), state.rng, GREEDY)[0].tokens)

    def count_them(skip):
        right = np.asarray(draft(skip.flags(3))) == truth
        return np.cumprod(right, axis=1).sum(1).reshape(len(PROMPTS), count)
    return count_them


def test_the_continuation_is_plain_decoding(params, cont):
    want = generate(PlainTarget(CFG), Autoregressive(), params, PROMPTS, max_new_tokens=SIZE).tokens
    got = [np.asarray(cont.tokens)[b, n:n + SIZE].tolist() for b, n in enumerate(cont.first)]
    assert got == want


@pytest.mark.parametrize('skip', SETS, ids=str)
def test_one_pass_counts_what_drafting_from_every_position_keeps(kept, really_kept, skip):
    got = kept(skip)
    np.testing.assert_array_equal(got, really_kept(skip))
    assert got.max() > (0 if len(skip.attention) < 3 else -1)  # there is something to count


def test_nothing_skipped_is_all_kept(kept):
    assert (kept(SkipConfig()) == BLOCK).all()


def test_a_teacher_forced_pass_of_the_draft_counts_something_else(params, cont, kept, really_kept):
    """Negative control: its keys and values of the text before are the draft's own, not the target's."""
    base = params['base']

    @jax.jit
    def forced(flags):
        ctx = sequence_context(CFG, cont.tokens.shape)
        x, _ = run_skipping(CFG, base, embed(CFG, base, cont.tokens, ctx.positions), None, ctx, flags)
        return unembed(CFG, base, finish(CFG, base, x)).argmax(-1)

    differ = 0
    for skip in SETS[:2]:
        guess = np.asarray(acceptance.kept_with_own_cache(forced(skip.flags(3)), cont, BLOCK))
        differ += (guess != really_kept(skip)).sum()
        assert (kept(skip) == really_kept(skip)).all()
    assert differ > 5
    whole = acceptance.kept_with_own_cache(forced(SkipConfig().flags(3)), cont, BLOCK)
    assert (np.asarray(whole) == BLOCK).all()  # the comparison itself is sound


@pytest.mark.parametrize('kind', ('skip', 'own cache'))
def test_the_rounds_of_decoding_follow(params, cont, kept, kind):
    """From the counts of all starts: how many rounds decoding takes, and what each of them keeps."""
    if kind == 'skip':
        drafter, mine, found = SkipDrafter(CFG, SETS[1], BLOCK), {}, kept(SETS[1])
    else:
        small = tiny_config(vocab=41, layers=2, max_seq_len=64)
        mine = {'draft': jax.tree.map(lambda a: a[:2] if a.shape[0] == 3 else a, params['base'])}
        drafter = TwoModel(small, BLOCK)
        words = jax.jit(lambda p: forward(small, p, cont.tokens).argmax(-1))(mine['draft'])
        found = np.asarray(acceptance.kept_with_own_cache(words, cont, BLOCK))
    for row, prompt in enumerate(PROMPTS):
        # One token more than the continuation: then the limit cuts none of the rounds that are counted.
        got = generate(PlainTarget(CFG), drafter, params | mine, [prompt], max_new_tokens=SIZE + 1)
        rounds = acceptance.walk(found[row:row + 1], BLOCK)
        last = got.accepted_hist - np.array(rounds)  # what was not counted begins behind the last start
        assert (last >= 0).all() and last.sum() <= BLOCK + 1 and sum(rounds) >= 5
    assert 0 < found.sum() < found.size * BLOCK


def test_a_sliding_window_and_unstacked_parameters(params):
    cfg = CFG.replace(attention=AttentionConfig(4, 2, 8, window=4))
    skip = SETS[0]
    cont = acceptance.continuation(PlainTarget(cfg), params, PROMPTS, 12)
    packed = {'base': pack(params['base'], native=False)}
    other = acceptance.continuation(PlainTarget(cfg, stacked=False), packed, PROMPTS, 12)
    np.testing.assert_array_equal(cont.tokens, other.tokens)
    got = jax.jit(lambda p, c: acceptance.kept(cfg, p, c, skip, 6))
    found = np.asarray(got(params['base'], cont))
    np.testing.assert_array_equal(got(packed['base'], other), found)
    drafter = SkipDrafter(cfg, skip, 6)
    rounds = acceptance.walk(found[:1], 6)
    seen = generate(PlainTarget(cfg), drafter, params, PROMPTS[:1], max_new_tokens=13).accepted_hist
    assert (seen >= np.array(rounds)).all()


def test_counts():
    found = np.array([[2, 0, 1, 3, 0, 2], [0, 0, 0, 0, 0, 0]])
    assert acceptance.histogram(found, 3) == [8, 1, 2, 1]
    assert acceptance.walk(found, 3) == [6, 0, 1, 1]  # 0 -> 3 -> out; and every start of the second row
    assert acceptance.by_position([8, 1, 2, 1]) == [4 / 12, 3 / 4, 1 / 3]
    assert acceptance.by_position([5, 0, 0]) == [0, 0]
    assert acceptance.tokens_a_round([8, 1, 2, 1], 3) == 1 + 8 / 12
    assert acceptance.tokens_a_round([8, 1, 2, 1], 1) == 1 + 4 / 12
    assert acceptance.rate([8, 1, 2, 1]) == pytest.approx(8 / 36) and acceptance.rate([0, 0, 7]) == 1


def test_the_counter_adds_parts_up(params, cont, kept):
    other = acceptance.continuation(PlainTarget(CFG), params, [[3, 3]], SIZE)
    count = acceptance.counter(CFG, params['base'], [cont, other], BLOCK)
    alone = acceptance.counter(CFG, params['base'], [other], BLOCK)(SETS[0])
    found, rounds = count(SETS[0])
    assert found == (np.array(acceptance.histogram(kept(SETS[0]), BLOCK)) + alone[0]).tolist()
    assert rounds == (np.array(acceptance.walk(kept(SETS[0]), BLOCK)) + alone[1]).tolist()
    with pytest.raises(ConfigError, match='no layer 3'):
        count(SkipConfig((3,)))


def test_what_is_refused(params, cont):
    with pytest.raises(ConfigError, match='block 25: from 1 to 24'):
        cont.starts(25)
    for prompts, size in (([], 5), ([[]], 5), ([[1]], 64), ([[1]], 1)):
        with pytest.raises(ConfigError, match='tokens and'):
            acceptance.continuation(PlainTarget(CFG), params, prompts, size)
