"""The hybrid drafts for its base: what it keeps is what one pass over the text says it would, and packed alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, forward
from backbone.sampling import Sampling
from harness import decode as loop
from harness.decode import generate
from rad import acceptance, distill, model
from rad.config import RadConfig
from rad.drafter import RadDrafter
from rad.task import RadTask
from tests.rad.hybrids import hybrid

pytestmark = pytest.mark.usefixtures('quick_compile')
PROMPTS, NEW, BLOCK = [[1, 2, 3, 4, 5, 1, 2], [7], list(range(5, 22)), [9, 9, 30, 9]], 24, 3


@pytest.fixture(scope='module')
def pair():
    """(config, RadConfig, params, continuation) of a hybrid that remembers for long and is often right: its mixers are
    slow, and say a tenth of what they could."""
    cfg, rcfg, params = hybrid(layers=(1, 2))
    quiet = params['rad']['mixers'] | {'out_proj': {'kernel': 0.1 * params['rad']['mixers']['out_proj']['kernel']}}
    params = params | {'rad': {'mixers': quiet}}
    return cfg, rcfg, params, acceptance.continuation(PlainTarget(cfg), params, PROMPTS, NEW)


@pytest.fixture(scope='module')
def drafted(pair):
    cfg, rcfg, params, _ = pair
    return generate(PlainTarget(cfg), RadDrafter(cfg, rcfg, BLOCK), params, PROMPTS, max_new_tokens=NEW)


def test_one_pass_over_the_text_says_what_is_kept(pair, drafted):
    """The loss's own count, the count over a continuation, and real rounds: one number."""
    cfg, rcfg, params, cont = pair
    assert drafted.tokens == [np.asarray(cont.tokens)[row, n:n + NEW].tolist() for row, n in enumerate(cont.first)]
    ids = cont.tokens

    @jax.jit
    def words(params):
        both = model.forward(cfg, rcfg, params, ids), forward(cfg, params['base'], ids)
        return [logits.argmax(-1) for logits in both]

    mine, theirs = words(params)
    found = np.asarray(acceptance.kept_with_own_cache(mine, cont, BLOCK))
    assert 0 < found.mean() < BLOCK, 'some drafts are kept and some are not'
    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    slots = jnp.arange(ids.shape[1])
    inside = (slots >= cont.first[:, None] - 1) & (slots < cont.first[:, None] + NEW - 1)
    kept, known = distill.drafts_kept(mine == theirs, theirs == following, jnp.ones_like(ids), inside, BLOCK)
    starts = np.asarray(cont.starts(BLOCK))
    assert np.take_along_axis(np.asarray(known), starts, 1).all()
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(kept), starts, 1), found)
    # Rounds as decoding comes by them; it cuts the last one or two of a row short.
    rounds = acceptance.walk(found, BLOCK)
    assert abs(drafted.accepted_hist - np.array(rounds)).sum() <= 2 * len(PROMPTS)


def test_a_text_that_the_base_would_not_write_is_not_counted():
    yes = jnp.ones((1, 6), bool)
    segments, weights = jnp.array([[1, 1, 1, 1, 2, 2]]), jnp.array([[1, 1, 1, 1, 1, 0]])
    agreement, greedy = yes.at[0, 1].set(False), yes.at[0, 2].set(False)
    kept, known = distill.drafts_kept(agreement, greedy, segments, weights, 2)
    assert kept[0, :5].tolist() == [1, 0, 2, 2, 2]
    # 2: the text went on otherwise; 3: the document ends; 4: what follows does not count.
    assert known[0].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize('train', ('ssm_only', 'ssm_plus_norms', 'all'))
def test_packed_beside_the_base_it_shares(pair, drafted, train):
    """Of whatever was trained: the same text, the same rounds; the base's arrays are not copied where they are its."""
    cfg, rcfg, params, _ = pair
    task = RadTask(cfg, rcfg, train=train, share_out=train == 'ssm_plus_norms')
    mine = jax.tree.map(lambda a: 1.05 * a, task.own(params['base'], jax.random.key(0)) | (
        {} if task.share_out else params['rad']))
    base = pack(params['base'])
    drafter = RadDrafter(cfg, rcfg, BLOCK)
    ready = drafter.ready(mine, base)
    assert ('base' in ready) == (train != 'ssm_only')
    if train == 'ssm_plus_norms':
        assert ready['mixers'][0]['out_proj'] == base['layers'][1]['attn']['o']
        assert ready['base']['layers'][1]['mlp'] is base['layers'][1]['mlp']
    run = lambda stacked, tree: generate(PlainTarget(cfg, stacked=stacked), drafter, tree, PROMPTS, max_new_tokens=NEW)
    stacked, packed = run(True, {'base': params['base'], 'rad': mine}), run(False, {'base': base, 'rad': ready})
    assert stacked.tokens == packed.tokens == drafted.tokens
    assert packed.accepted_hist.tolist() == stacked.accepted_hist.tolist()
    assert drafter.ready(ready, base) is ready, 'packed already'


def worst_state(cfg, rcfg, params, rounds=3) -> float:
    """Largest error, over some rounds, of the drafter's states against a clean pass over what was kept."""
    target, drafter = PlainTarget(cfg), RadDrafter(cfg, rcfg, BLOCK)
    request, worst = loop.prepare(target, PROMPTS, max_new_tokens=NEW), 0.0
    fresh = jax.jit(lambda tokens, pos: drafter.hybrid.forward(
        params, tokens, drafter.init_state(len(PROMPTS), request.capacity), logits_at=pos - 1).cache.layers)
    state = loop.start(target, drafter, params, request)
    for _ in range(rounds):
        state = loop.decode_one(target, drafter, params, state, **request.rounds)
        clean = fresh(state.cache.tokens[:, :request.capacity], state.cache.pos)
        assert state.drafter.pos.tolist() == state.cache.pos.tolist()
        for got, want in zip(state.drafter.layers, clean, strict=True):
            if hasattr(got, 'log'):
                pairs = (got.state, want.state), (got.tail, want.tail)
                worst = max(worst, *(float(jnp.abs(a - b).max()) for a, b in pairs))
    return worst


def test_after_every_round_its_states_are_those_of_the_text_that_was_kept(pair, monkeypatch):
    """And a drafter that keeps all it drafted is caught: words alone would not tell."""
    cfg, rcfg, params, _ = pair
    assert worst_state(cfg, rcfg, params) < 1e-3
    right = RadDrafter.commit

    def keeps_all(self, params, state, output, n):
        in_round = output.tokens.shape[1] == BLOCK + 1
        moved = right(self, params, state, output, jnp.where(n >= 0, BLOCK, n) if in_round else n)
        return right(self, params, state, output, n).replace(layers=moved.layers)

    monkeypatch.setattr(RadDrafter, 'commit', keeps_all)
    loop.decode_one.clear_cache()
    assert worst_state(cfg, rcfg, params) > 1e-2
    loop.decode_one.clear_cache()


def test_sampled_drafts_say_what_law_they_are_from(pair):
    cfg, rcfg, params, _ = pair
    drafter = RadDrafter(cfg, rcfg, 2)
    request = loop.prepare(PlainTarget(cfg), PROMPTS, max_new_tokens=4, sampling=Sampling(1.0))
    state = loop.start(PlainTarget(cfg), drafter, params, request)
    draft, _, _ = jax.jit(lambda s: drafter.draft(params, s.cache, s.drafter, s.rng, Sampling(1.0)))(state)
    np.testing.assert_allclose(draft.law.probs.sum(-1), 1, rtol=1e-5)
    gold = np.take_along_axis(np.asarray(draft.law.probs), np.asarray(draft.tokens)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(gold, draft.law.gold)


def test_what_cannot_draft_is_named(pair):
    cfg, rcfg, _, _ = pair
    for wrong, says in ((lambda: RadDrafter(cfg, rcfg, 0), 'block'),
                        (lambda: RadDrafter(cfg, dataclasses.replace(rcfg, parallel=True)), 'dearer'),
                        (lambda: RadDrafter(cfg, RadConfig.of(cfg, {'layers': (9,)})), '9')):
        with pytest.raises(ConfigError, match=says):
            wrong()
