"""What a round emits is the base's law, exactly: every draft and every way to verify it, enumerated in float64.

Total variation over the first four tokens of a random full-prefix table. Mistakes that others made, each by its name,
leave a gap a hundred thousand million times larger.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.contract import DenseLaw
from backbone.sampling import Sampling, law
from tensorhead import cp
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter
from tests.tensorhead import enumeration
from tests.tensorhead.enumeration import World, base_law, emitted_law, total_variation, world

V, D, N, STEPS = 3, 4, 3, 4
PLAIN = Sampling(1.0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(components=0, ids=None, **fields):
    """A drafter of three tokens of vocabulary with random parameters far from each other."""
    cfg = TensorHeadConfig(D, V, N, init_std=1.0, draft_vocab=len(ids or ()), **fields)
    drafter = TensorHeadDrafter(cfg, components)
    head = drafter.init_params(jax.random.key(1))
    head |= {'draft_ids': jnp.array(ids, jnp.int32)} if ids else {}
    unembed = jax.random.normal(jax.random.key(2), (V, D))
    return drafter, {'base': {'embed': {'tokens': unembed}}, 'tensorhead': head}


CASES = {
    'two components': (dict(rank=2, mode='full'), PLAIN),
    'processed': (dict(rank=2, mode='full'), Sampling(0.7, top_k=2)),
    'two of three components, two of three words': (
        dict(rank=3, mode='lowrank_shared', inner_rank=2, components=2, ids=[0, 2]), Sampling(1.3, top_p=0.9)),
    'one of three components': (dict(rank=3, mode='linear_shared', components=1), PLAIN),
    'rank one, two words': (dict(rank=1, mode='medusa_shared', ids=[1, 2]), PLAIN),
}


@pytest.mark.parametrize('case', [pytest.param(c, marks=pytest.mark.slow) if c == 'processed' else c for c in CASES])
def test_emitted_is_the_bases_law(case):
    fields, sampling = CASES[case]
    w = world(V, D, STEPS + N - 1)
    got, [(tokens, chance, kept)] = emitted_law(w, *make(**fields), STEPS, sampling)
    assert total_variation(got, base_law(w, STEPS, sampling)) < 1e-12
    # The first draft is kept as often as two laws overlap: sum of min(p, q) in every context.
    p, size = np.asarray(law(w.logits, sampling)), (fields.get('ids') and 2 or V) ** (N - 1)
    contexts = [(i,) for i in range(V)] + [(i, j) for i in range(V) for j in range(V)]
    for at, context in enumerate(contexts):
        rows = slice(at * size, (at + 1) * size)
        q = np.bincount(tokens[rows, 0], chance[rows], V)
        assert abs(q.sum() - 1) < 1e-12
        overlap = np.minimum(p[w.code(context)], q).sum()
        np.testing.assert_allclose((chance * kept[:, 0])[rows].sum(), overlap, atol=1e-12)


def mixture(drafter, params, cache, state):
    head, e = drafter.ready(params['tensorhead'], params['base']), state['e']
    return drafter._mixture(head, e, e, cache.pending)


def with_marginals(static, params, cache, state, forced):
    """The weights of the mixture are not updated by the drafts before."""
    [(draft, chance)] = enumeration.propose(static, params, cache, state, forced)
    log_w, logp = mixture(static[0], params, cache, state)
    probs = jnp.exp(cp.row(log_w[:, None], logp))
    return [(draft.replace(law=DenseLaw(probs, gold_of(probs, draft))), chance)]


def by_component(mixed_residual: bool):
    """Drafts are drawn, and kept, by one component's law; the residual is taken of the mixture's, or of the same."""
    def propose(static, params, cache, state, forced):
        [(draft, _)] = enumeration.propose(static, params, cache, state, forced)
        log_w, logp = mixture(static[0], params, cache, state)
        branches = []
        for a in range(log_w.shape[-1]):
            probs = jnp.exp(logp[:, :, a])
            gold = gold_of(probs, draft)
            drafted = draft.law.replace(gold=gold) if mixed_residual else DenseLaw(probs, gold)
            branches.append((draft.replace(law=drafted), jnp.exp(log_w[:, a]) * gold.prod(1)))
        return branches
    return propose


def gold_of(probs, draft):
    return jnp.take_along_axis(probs, draft.tokens[..., None], -1)[..., 0]


def redrawing(least: int):
    """After `least` kept drafts or more, a rejection is followed by a draw from p instead of the residual."""
    def check(sampling, logits, draft, u):
        n, next_law = enumeration.verify(sampling, logits, draft, u)
        p = jnp.take_along_axis(law(logits, sampling), n[:, None, None], axis=1)[:, 0]
        return n, jnp.where(((n >= least) & (n < draft.length))[:, None], p, next_law)
    return check


def one_ratio(sampling, logits, draft, u):
    """The whole draft's p over its q decides at every position."""
    p = gold_of(law(logits, sampling)[:, :-1], draft)
    ratio = (p / draft.law.gold).prod(1, keepdims=True)  # u * (p / ratio) < p  <=>  u < ratio
    return redrawing(0)(sampling, logits, draft.replace(law=draft.law.replace(gold=p / ratio)), u)


MISTAKES = {
    'q is the marginal of its position': dict(propose=with_marginals),
    'kept by a component, residual of the mixture': dict(propose=by_component(True)),
    'residual dropped and redrawn after a kept draft': dict(check=redrawing(1)),
    'p instead of the residual': dict(check=redrawing(0)),
    'one ratio for every position': dict(check=one_ratio),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_seen(mistake):
    w = world(V, D, STEPS + N - 1)
    got, _ = emitted_law(w, *make(rank=2, mode='full'), STEPS, PLAIN, **MISTAKES[mistake])
    assert abs(got.sum() - 1) < 1e-12
    assert total_variation(got, base_law(w, STEPS, PLAIN)) > 0.01


def test_a_component_alone_is_right_too():
    """Kept by the component's law and its residual: exact, as long as both are the same law."""
    w = world(V, D, STEPS + N - 1)
    got, _ = emitted_law(w, *make(rank=2, mode='full'), STEPS, PLAIN, propose=by_component(False))
    assert total_variation(got, base_law(w, STEPS, PLAIN)) < 1e-12


@pytest.mark.parametrize('rank', (V * V, 1))
def test_a_head_that_is_the_base_is_always_kept(rank):
    """A Markov chain: component (y, z) stands for 'first y, then z' and knows what follows z. One component cannot."""
    rng = np.random.default_rng(3)
    first, step = rng.normal(size=V), rng.normal(size=(V, V))
    w = world(V, 1, STEPS + N - 1)
    prefixes = [p for size in range(STEPS + N) for p in itertools.product(range(V), repeat=size)]
    w = World(V, np.array([step[p[-1]] if p else first for p in prefixes]), np.ones_like(w.e))
    sure = 1e4 * np.eye(V)
    kernel = np.stack([np.repeat(sure, V, 0), np.tile(sure, (V, 1)), np.tile(step, (V, 1))])[:, :rank, None]
    # Which y comes is the verifier's business: w(y, z) ~ p(z | y), whatever stands before y.
    weights = (step - np.logaddexp.reduce(step, -1, keepdims=True)).ravel()[:rank]
    head = {'gate': {'kernel': jnp.zeros((1, rank)), 'bias': jnp.array(weights)},
            'factors': {'kernel': jnp.array(kernel)}}
    drafter = TensorHeadDrafter(TensorHeadConfig(1, V, N, rank, 'full'))
    got, [(_, chance, kept)] = emitted_law(w, drafter, {'base': {}, 'tensorhead': head}, STEPS, PLAIN)
    assert total_variation(got, base_law(w, STEPS, PLAIN)) < 1e-12
    always = (kept[chance > 0] > 1 - 1e-12).all()
    assert always == (rank > 1) and chance.max() > 0.1
