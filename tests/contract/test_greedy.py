"""Contract tests 1, 2, 5, 6, 7, 9: greedy decoding, whatever the drafter, is plain decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.model import PlainTarget, forward
from harness import decode as loop
from harness.baselines import Autoregressive, PromptLookup
from harness.decode import generate
from tests.contract.conftest import NEW
from tests.contract.drafters import Ragged, Scripted

NAMES = ('prompt_lookup', 'lookahead', 'early_exit', 'two_model', 'm2r2', 'sparsity', 'skip', 'rad', 'tensorhead')
# For what the cache alone decides: a head never touches it.
CACHED = (*NAMES[:-1], pytest.param(NAMES[-1], marks=pytest.mark.slow))


def test_plain_decoding_is_the_argmax_of_a_full_pass(cfg, params, prompts, plain):
    """The loop against a model without a cache."""
    for prompt, new in zip(prompts, plain, strict=True):
        ids = jnp.array([prompt + new])
        logits = forward(cfg, params['base'], ids)[0]
        assert logits.argmax(-1)[len(prompt) - 1:-1].tolist() == new


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('batch', (1, 4))
def test_identical_to_plain(target, params, prompts, plain, drafters, name, batch):
    for first in range(0, 4, batch):
        rows = slice(first, first + batch)
        got = generate(target, drafters[name], params, prompts[rows], max_new_tokens=NEW)
        assert got.tokens == plain[rows]
        assert 1 <= got.mean_accepted_tokens <= drafters[name].block + 1
        assert got.accepted_hist.sum() == got.rounds.sum()


@pytest.mark.parametrize('name', NAMES)
def test_packed_parameters_decode_alike(packed, prompts, plain, drafters, name):
    target, params = packed
    assert generate(target, drafters[name], params, prompts, max_new_tokens=NEW).tokens == plain


def test_always_right_gives_k_plus_one(target, params, prompts, plain, script):
    got = generate(target, Scripted(3), params | {'script': script}, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    # The first token comes from prefill; 23 more at 4 a round, the last round cut by the limit.
    assert got.rounds.tolist() == [6] * 4
    assert got.accepted_hist.tolist() == [0, 0, 4, 20]


def test_always_wrong_gives_one(target, params, prompts, plain, script):
    got = generate(target, Scripted(3, wrong_from=0), params | {'script': script}, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    assert got.mean_accepted_tokens == 1.0
    assert got.rounds.tolist() == [NEW - 1] * 4


@pytest.mark.parametrize('kept', (1, 2))
def test_right_then_wrong_keeps_the_right_ones(target, params, prompts, plain, script, kept):
    got = generate(target, Scripted(3, wrong_from=kept), params | {'script': script}, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    # 23 tokens a row after prefill's: full rounds of kept + 1, and what the limit leaves of the last one.
    full, rest = divmod(NEW - 1, kept + 1)
    want = [0] * 4
    want[kept] += 4 * full
    want[rest - 1] += 4 * (rest > 0)
    assert got.accepted_hist.tolist() == want


def test_lengths_differ_by_row_and_round(target, params, prompts, plain, script):
    got = generate(target, Ragged(3), params | {'script': script}, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    assert (got.drafted_hist > 0).all()


def test_a_draft_past_its_length_is_ignored(target, params, prompts, plain, script):
    """A right token behind `length` is padding: it must not be kept."""
    class Short(Scripted):
        def draft(self, *args):
            draft, cache, state = super().draft(*args)
            return draft.replace(length=jnp.ones_like(draft.length)), cache, state

    got = generate(target, Short(3), params | {'script': script}, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    assert got.accepted_hist[2:].sum() == 0


@pytest.mark.parametrize('offset', range(4))
def test_stop_token_inside_a_block(target, params, prompts, plain, script, offset):
    """Wherever a stop token falls in a block of 4, the row ends with it and the others go on."""
    stop = plain[2][5 + offset]
    want = [row[:row.index(stop) + 1] if stop in row else row for row in plain]
    for drafter in (Scripted(3), *[Autoregressive()] * (offset == 0)):  # without drafts no offset differs
        got = generate(target, drafter, params | {'script': script}, prompts, max_new_tokens=NEW, stop_tokens=[stop])
        assert got.tokens == want


def test_stop_token_first(target, params, prompts, plain):
    got = generate(target, PromptLookup(4), params, prompts, max_new_tokens=NEW, stop_tokens=[plain[0][0]])
    assert got.tokens[0] == plain[0][:1]


@pytest.mark.parametrize('name', CACHED)
def test_cache_exactly_full(cfg, params, drafters, name):
    """Prompt + new tokens fill the context to the last slot; blocks stick out over its end."""
    target, prompt = PlainTarget(cfg), [list(range(1, 9)), [3] * 60]
    for row in prompt:
        new = cfg.max_seq_len - len(row)
        want = generate(target, Autoregressive(), params, [row], max_new_tokens=new).tokens
        got = generate(target, drafters[name], params, [row], max_new_tokens=new).tokens
        assert got == want and len(got[0]) == new


@pytest.mark.parametrize('name', [name if name in ('prompt_lookup', 'two_model', 'tensorhead') else
                                  pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_one_compilation_a_bucket(target, params, drafters, name):
    """Ten prompts of one bucket, one compiled loop and one compiled prefill."""
    loop.run_prompt.clear_cache()
    loop.decode.clear_cache()
    for length in range(2, 12):
        generate(target, drafters[name], params, [list(range(1, 1 + length))], max_new_tokens=NEW)
    assert loop.run_prompt._cache_size() == 1
    assert loop.decode._cache_size() == 1


@pytest.mark.parametrize('name', NAMES)
def test_slots_past_pos_hold_anything(target, params, prompts, plain, drafters, name):
    """NaN beyond `pos` before every round changes nothing."""
    drafter = drafters[name]
    request = loop.prepare(target, prompts, max_new_tokens=NEW)
    state = loop.start(target, drafter, params, request)

    def poison(cache):
        dead = jnp.arange(request.capacity) >= cache.pos[:, None]
        return cache.replace(
            layers=jax.tree.map(lambda a: jnp.where(dead[:, None, :, None], jnp.nan, a), cache.layers),
            tokens=jnp.where(jnp.arange(request.capacity + 1) > cache.pos[:, None], -1, cache.tokens))

    while not state.finished.all():
        state = state.replace(cache=poison(state.cache))
        if name == 'two_model':
            state = state.replace(drafter=poison(state.drafter))
        state = loop.decode_one(target, drafter, params, state, **request.rounds)
    ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
    assert [ids[r, n:pos[r] + 1].tolist() for r, n in enumerate(request.lengths)] == plain


@pytest.mark.parametrize('name', NAMES)
def test_streaming_gives_the_same_tokens(target, params, prompts, plain, drafters, name):
    seen = [[] for _ in prompts]
    got = generate(target, drafters[name], params, prompts, max_new_tokens=NEW,
                   on_tokens=lambda row, ids: seen[row].extend(ids))
    assert seen == plain == got.tokens
