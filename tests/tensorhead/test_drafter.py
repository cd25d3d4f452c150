"""The drafter against the mixture written out word by word; in the loop: what it reads and what it must not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.contract import DenseLaw, Draft
from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, forward, hidden_states
from backbone.sampling import GREEDY, Sampling, draw, law
from harness import decode as loop
from harness.baselines import Autoregressive
from harness.decode import generate
from harness.verify import verify
from tensorhead import cp
from tensorhead import head as heads
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter, build
from tensorhead.marginal import MarginalTarget
from tests.conftest import lively, tiny_config
from tests.contract.test_sampled import follows
from tests.contract.test_sampled import model as five_words  # noqa: F401, a fixture

V, D, NEW = 23, 16, 20
IDS = [0, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 21]
PROMPTS = [[1, 2, 3, 1], [7], [5, 6, 7, 8, 9, 10], [9, 9, 20]]
SAMPLED = Sampling(0.8)


@pytest.fixture(scope='module')
def model():
    cfg = tiny_config(vocab=V, hidden=D, layers=1, heads=2, kv_heads=1, max_seq_len=48)
    base = lively(cfg, 3)
    return cfg, base | {'lm_head': {'kernel': 10 * base['lm_head']['kernel']}}  # words that differ


@pytest.fixture(scope='module')
def packed(model):
    return pack(model[1])


def make(base, components=0, ids=None, seed=1, **fields):
    fields = dict(horizon=4, rank=3, inner_rank=5, init_std=0.5) | fields
    drafter = TensorHeadDrafter(TensorHeadConfig(D, V, draft_vocab=len(ids or ()), **fields), components)
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(drafter.init_params, jax.random.key(0))
    head = jax.tree.map(lambda a: drafter.cfg.init_std * rng.normal(size=a.shape).astype(np.float32), shapes)
    return drafter, {'base': base, 'tensorhead': head | ({'draft_ids': jnp.array(ids, jnp.int32)} if ids else {})}


@functools.partial(jax.jit, static_argnums=0)
def dense(cfg, params, e):
    """The head as it trains: e [..., d] -> log_w [..., r], logits [..., n, r, W]."""
    mixture = heads.factors(cfg, params['tensorhead'], e)
    unembed = heads.unembedding(params['base'], params['tensorhead'])
    return mixture.log_w, heads.logits(cfg, params['tensorhead'], mixture, unembed)


def written_out(drafter, ids, log_w, z, pending, tokens):
    """log q [K, W] of one row's conditionals, each given the pending token and the drafts before it."""
    log_w, z, ids = np.asarray(log_w, np.float64), np.asarray(z, np.float64), ids.tolist()
    p = np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))  # [n, r, W]
    weights = np.exp(log_w) * (p[0, :, ids.index(pending)] if pending in ids else 1)
    best = np.argsort(-weights)[:drafter.components or len(weights)]
    weights, rows = weights[best], []
    for s, token in enumerate(tokens, 1):
        rows.append(weights / weights.sum() @ p[s, best])
        weights = weights * p[s, best, ids.index(token)]
    return np.log(rows).astype(np.float32)


CASES = {
    'full, two components': dict(mode='full', components=2, ids=IDS),
    'linear': dict(mode='linear_shared', ids=IDS),
    'low rank, one component': dict(mode='lowrank_shared', components=1),
    'medusa, rank one': dict(mode='medusa_shared', rank=1),
}


@pytest.mark.parametrize('case', CASES)
def test_drafts_and_their_law(model, packed, case):
    """Pending tokens in and out of the draft vocabulary; row by row alone, and together."""
    drafter, params = make(model[1], **CASES[case])
    e, pending = np.random.default_rng(2).normal(size=(3, D)).astype(np.float32), np.array([[3, 0], [1, 0], [16, 0]])
    ids = np.asarray(params['tensorhead'].get('draft_ids', np.arange(V)))
    keys = jax.random.split(jax.random.key(5), 3)

    @jax.jit
    def run(params, e, pending, keys):
        cache = caches.Cache(jnp.zeros(len(e), jnp.int32), pending, ())
        greedy, sampled = (drafter.draft(params, cache, {'e': e}, keys, how)[0] for how in (GREEDY, SAMPLED))
        return greedy, sampled, jnp.stack([sampled.law.row(jnp.full(len(e), k)) for k in range(drafter.block)], 1)

    greedy, sampled, rows = jax.tree.map(np.asarray, run(params, e, pending, keys))
    assert greedy.law is None and greedy.tokens.shape == (3, 3) and rows.shape == (3, 3, V)
    laws, others = [], []
    for b, (log_w, z) in enumerate(zip(*dense(drafter.cfg, params, e), strict=True)):
        want = lambda tokens, at=pending[b, 0]: written_out(drafter, ids, log_w, z, at, tokens.tolist())
        assert greedy.tokens[b].tolist() == ids[want(greedy.tokens[b]).argmax(-1)].tolist()
        laws.append(want(sampled.tokens[b]))
        np.testing.assert_array_equal(sampled.law.gold[b], rows[b][np.arange(3), sampled.tokens[b]])
        others.append([want(sampled.tokens[b], at) for at in range(V)])
    np.testing.assert_allclose(rows[..., ids], law(jnp.array(laws), SAMPLED), atol=2e-5)
    np.testing.assert_array_equal(np.delete(rows, ids, axis=-1), 0)
    # Negative control: with another pending token it is another law, unless there is but one component.
    assert (np.abs(np.array(others) - np.array(laws)[:, None]).max() > 0.1) == (drafter.cfg.rank > 1)

    if not drafter.components:
        return
    # Ready to decode, beside the base in its other layout, alone in the batch (another path): the same drafts.
    ready = {'base': packed, 'tensorhead': jax.jit(drafter.ready)(params['tensorhead'], packed)}
    *alone, row = run(ready, e[:1], pending[:1], keys[:1])
    assert [d.tokens[0].tolist() for d in alone] == [d.tokens[0].tolist() for d in (greedy, sampled)]
    np.testing.assert_allclose(row[0], rows[0], atol=1e-5)


@pytest.mark.parametrize('components', (0, 1))
def test_a_shorter_draft_is_the_start_of_the_whole(model, components):
    """Factors that are left out are summed out: what is drafted before them, and its law, stay as they were."""
    long, params = make(model[1], components, mode='lowrank_shared')
    short = dataclasses.replace(long, drafts=1)
    assert (long.block, short.block) == (3, 1)
    target = PlainTarget(model[0])
    state = loop.start(target, long, params, loop.prepare(target, PROMPTS, max_new_tokens=4))
    draws = [jax.jit(lambda c, s, d=d: d.draft(params, c, s, jax.random.key(3), SAMPLED)[0])(state.cache, state.drafter)
             for d in (long, short)]
    assert draws[1].tokens.shape == (4, 1)
    if components != 1:  # one component draws all positions by one key, so their number moves the draws, not the law
        assert np.array_equal(draws[0].tokens[:, :1], draws[1].tokens)
    np.testing.assert_allclose(draws[0].law.row(jnp.zeros(4, int)), draws[1].law.row(jnp.zeros(4, int)), atol=1e-6)
    with pytest.raises(ConfigError, match='drafts'):
        dataclasses.replace(long, drafts=4)


LOOPS = {
    'rank one, one draft': dict(mode='full', rank=1, horizon=2),
    'six drafts of noise': dict(mode='linear_shared', horizon=7, init_std=30.0),
    'eight components': dict(mode='medusa_shared', rank=8, horizon=3),
}


@pytest.fixture(scope='module')
def plain(model):
    return generate(PlainTarget(model[0]), Autoregressive(), {'base': model[1]}, PROMPTS, max_new_tokens=NEW).tokens


def to_stop(plain):
    """A stop token in the middle of a text, and what plain decoding says up to it."""
    stop = plain[2][7]
    want = [row[:row.index(stop) + 1] if stop in row else row for row in plain]
    assert want != plain
    return stop, want


@pytest.mark.slow
@pytest.mark.parametrize('case', LOOPS)
def test_greedy_text_is_the_bases(model, plain, case):
    """To a stop token, wherever in a block it falls; every pass of the trunk emits what it kept and one more."""
    drafter, params = make(model[1], **LOOPS[case])
    stop, want = to_stop(plain)
    got = generate(PlainTarget(model[0]), drafter, params, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop])
    assert got.tokens == want
    kept = (got.accepted_hist * np.arange(drafter.block + 1)).sum()
    assert got.num_tokens == kept + got.rounds.sum() + len(PROMPTS)


def test_round_by_round(model, plain, monkeypatch):
    """One component, some words. After every round e is the hidden state just before the pending token, of a pass over
    the text so far; the text is the base's own; a round runs the trunk once and emits what it kept and one token more.
    """
    cfg, base = model
    ids = np.argsort(-np.bincount(sum(plain, []), minlength=V))[:3]  # the commonest words: some drafts will be right
    drafter, params = make(base, mode='lowrank_shared', components=1, ids=sorted(ids.tolist()), seed=2)
    passes, real = [], PlainTarget.forward
    monkeypatch.setattr(PlainTarget, 'forward', lambda *args, **kw: passes.append(1) or real(*args, **kw))
    target, (stop, want) = PlainTarget(cfg), to_stop(plain)
    request = loop.prepare(target, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop])
    state = loop.start(target, drafter, params, request)
    hidden = jax.jit(lambda tokens: hidden_states(cfg, base, tokens))
    passes.clear()
    loop.decode_one.clear_cache()
    moves = set()
    while True:
        text, pos = np.asarray(hidden(state.cache.tokens[:, :48])), np.asarray(state.cache.pos)
        np.testing.assert_allclose(state.drafter['e'], text[np.arange(4), pos - 1], atol=1e-5)
        assert np.abs(state.drafter['e'] - text[np.arange(4), pos]).max() > 1e-2  # negative control: one further
        if state.finished.all():
            break
        state = loop.decode_one(target, drafter, params, state, **request.rounds)
        moves |= set((np.asarray(state.cache.pos) - pos).tolist())
    ids = np.asarray(state.cache.tokens)
    assert [ids[row, n:pos[row] + 1].tolist() for row, n in enumerate(request.lengths)] == want
    assert len(passes) == 1  # traced once, and once in a round: drafting runs no trunk
    assert {0, 1, 2} <= moves  # finished rows stood still, others kept no draft or some
    kept = (np.asarray(state.accepted) * np.arange(drafter.block + 1)).sum()
    assert sum(map(len, want)) == kept + np.asarray(state.rounds).sum() + len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize('forgets', (False, True))
def test_a_mixture_that_forgets_is_caught(five_words, forgets):  # noqa: F811
    """Through the jitted loop, 20,000 rows: the contract's check of the law sees marginals for what they are."""
    cfg, _, params = five_words

    class Forgets(TensorHeadDrafter):
        def draft(self, params, cache, state, rng, sampling):
            draft, cache_, state_ = super().draft(params, cache, state, rng, sampling)
            head, e = self.ready(params['tensorhead'], params['base']), state['e']
            log_w, logp = self._mixture(head, e, e, cache.pending)
            probs = law(cp.row(log_w[:, None], logp), sampling)
            gold = jnp.take_along_axis(probs, draft.tokens[..., None], -1)[..., 0]
            return draft.replace(law=draft.law.replace(probs=probs, gold=gold)), cache_, state_

    cfg_head = TensorHeadConfig(16, 5, 4, 3, 'full', init_std=1.0)
    head = heads.init(cfg_head, jax.random.key(0))
    head['factors']['kernel'] = head['factors']['kernel'].at[0].set(0)  # neither the pending token nor the gate
    head['gate'] = jax.tree.map(jnp.zeros_like, head['gate'])  # says which component it is: the drafts themselves do
    drafter = (Forgets if forgets else TensorHeadDrafter)(cfg_head)
    assert follows((cfg, None, params | {'tensorhead': head}), drafter, Sampling(1.0)) != forgets


@pytest.fixture(scope='module')
def marginal(model):
    drafter, params = make(model[1], mode='lowrank_shared')
    return MarginalTarget(model[0], drafter.cfg), drafter, params


def test_marginal_target(model, marginal):
    """Its law is the mixture's own, all logits or one; so what the mixture draws for its first position is kept."""
    target, drafter, params = marginal
    tokens, last = jax.random.randint(jax.random.key(0), (2, 9), 0, V), jnp.array([8, 3])

    @jax.jit
    def passes(params):
        run = lambda **kw: target.forward(params, tokens, target.init_cache(2, 16, 0), **kw)
        whole = run(taps=('hidden:last',))
        return whole.logits, run(logits_at=last).logits, whole.taps, forward(model[0], params['base'], tokens)

    logits, alone, taps, base_logits = passes(params)
    log_w, z = jax.tree.map(lambda a: np.asarray(a, np.float64), dense(drafter.cfg, params, taps['hidden:last']))
    p = np.exp(z[:, :, 0] - np.logaddexp.reduce(z[:, :, 0], -1, keepdims=True))
    q = (np.exp(log_w)[..., None] * p).sum(-2)
    np.testing.assert_allclose(np.exp(logits), q, atol=1e-5)
    np.testing.assert_allclose(alone[:, 0], np.stack([logits[0, 8], logits[1, 3]]), atol=1e-5)

    rows = 2000
    first = jnp.tile(jnp.array(q[0, -1], jnp.float32), (rows, 1))
    guess = draw(first, jax.random.key(1))[:, None]
    draft = Draft(guess, jnp.ones(rows, jnp.int32), DenseLaw(first[:, None], jnp.take_along_axis(first, guess, 1)))
    for own, always in ((logits, True), (base_logits, False)):
        kept = verify(jnp.tile(own[:1, -1:], (rows, 2, 1)), draft, jax.random.key(2), Sampling(1.0)).n
        assert bool((kept == 1).all()) == always


@pytest.mark.slow
def test_marginal_target_decodes(marginal):
    target, drafter, params = marginal
    plain = generate(target, Autoregressive(), params, PROMPTS, max_new_tokens=NEW).tokens
    assert generate(target, drafter, params, PROMPTS, max_new_tokens=NEW).tokens == plain


def test_what_does_not_fit_is_named(model):
    cfg, _ = model
    with pytest.raises(ConfigError, match='horizon must be at least 2'):
        TensorHeadDrafter(TensorHeadConfig(D, V, horizon=1))
    with pytest.raises(ConfigError, match=r'components must be in 0\.\.4 .* got 5'):
        TensorHeadDrafter(TensorHeadConfig(D, V), 5)
    with pytest.raises(ConfigError, match='draft_vocab must be 0, got 7'):
        MarginalTarget(cfg, TensorHeadConfig(D, V, draft_vocab=7))
    with pytest.raises(ConfigError, match='hidden_size 8 is not the 16'):
        MarginalTarget(cfg, TensorHeadConfig(8, V))
    with pytest.raises(ConfigError, match='hidden_size 8 is not the 16'):
        build(cfg, {'hidden_size': 8})
    with pytest.raises(ConfigError, match='unknown ranks'):
        build(cfg, {'ranks': 8})
    assert build(cfg, {'rank': 2}, components=1) == TensorHeadDrafter(TensorHeadConfig(D, V, rank=2), 1)
