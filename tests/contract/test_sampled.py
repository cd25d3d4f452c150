"""Contract test 3: what sampled decoding emits follows the target's law exactly.

Five tokens of vocabulary, four emitted: all 625 continuations are enumerated, 20,000 rows are decoded at once,
and a chi-square statistic compares them. Negative controls, verifiers wrong in the ways people get them
wrong, must fail the same statistic.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.contract import Accepted, DenseLaw, Draft
from backbone.model import PlainTarget, forward
from backbone.sampling import Sampling, draw, law
from harness import decode as loop
from harness import verify as verifier
from harness.baselines import Autoregressive, EarlyExit, Lookahead, PromptLookup, TwoModel
from harness.decode import generate
from m2r2.config import M2R2Config
from m2r2.drafter import M2R2Drafter
from m2r2.gates import GateConfig
from rad import drafter as rad
from rad.skip import ExitRule, SkipConfig, SkipDrafter
from sparsity import drafter as sparsity
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter
from tests.conftest import lively, tiny_config

VOCAB, STEPS, ROWS = 5, 4, 20_000
HEAD = TensorHeadConfig(16, VOCAB, horizon=4, rank=2, mode='full', draft_vocab=4, init_std=0.5)
ACCELERATED = {'exits': (1,), 'rank': 4, 'carry': 8, 'draft_vocab': 4}
GATED = {'block': 2, 'doubt': 50, 'gate': GateConfig('arla_tokens', 4)}  # some drafts stop early
PROMPT = [1, 3, 1]
SETTINGS = {'plain': Sampling(1.0), 'warped': Sampling(0.7, top_k=4, top_p=0.9)}


@pytest.fixture(scope='module')
def model():
    cfg = tiny_config(vocab=VOCAB, hidden=16, layers=2, heads=2, kv_heads=1, max_seq_len=16)
    small = tiny_config(vocab=VOCAB, hidden=8, layers=1, heads=1, kv_heads=1, max_seq_len=16)
    head = TensorHeadDrafter(HEAD).init_params(jax.random.key(7))
    fast = M2R2Drafter(cfg, M2R2Config.of(cfg, ACCELERATED), **GATED).init_params(jax.random.key(8))
    fast = jax.tree.map(lambda a: a + 0.1 if a.ndim > 1 else a, fast)
    mixers = drafters(cfg, small)['rad'].init_params(jax.random.key(9))
    return cfg, small, {'base': jax.tree.map(lambda a: 2 * a, lively(cfg, 5)), 'draft': lively(small, 6),
                        'tensorhead': head, 'm2r2': fast, 'rad': mixers}


@pytest.fixture(scope='module')
def follows(model):
    """Whether what a drafter's rounds emit has the target's law: f(drafter, sampling, seed=0)."""
    laws = {sampling: exact_law(model[0], model[2], sampling) for sampling in SETTINGS.values()}
    return lambda drafter, sampling, seed=0: emitted_follow(model, drafter, sampling, laws[sampling], seed)


def exact_law(cfg, params, sampling) -> np.ndarray:
    """Probability of each of VOCAB ** STEPS continuations, by full passes over all of them."""
    chains = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)))
    ids = jnp.concatenate([jnp.tile(jnp.array(PROMPT), (len(chains), 1)), chains], axis=1)
    laws = jax.jit(lambda base: law(forward(cfg, base, ids), sampling))(params['base'])[:, len(PROMPT) - 1:-1]
    return np.asarray(jnp.take_along_axis(laws, chains[..., None], -1)[..., 0].prod(-1), np.float64)


def drafters(cfg, small):
    return {'none': Autoregressive(), 'prompt_lookup': PromptLookup(3), 'lookahead': Lookahead(3, 2),
            'early_exit': EarlyExit(cfg, 1, 2), 'm2r2': M2R2Drafter(cfg, M2R2Config.of(cfg, ACCELERATED), **GATED),
            'sparsity': sparsity.build(cfg, {'heads': 1.0, 'neurons': 0.25, 'refresh': 2}, 'random', block=2),
            'skip': SkipDrafter(cfg, SkipConfig((0,), (1,)), 3, ExitRule(0.5)),
            'rad': rad.build(cfg, {'layers': (1,)}, block=3),
            'two_model': TwoModel(small, 3), 'tensorhead': TensorHeadDrafter(HEAD)}


def chi_square(counts: np.ndarray, probs: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom; outcomes expected fewer than five times are pooled."""
    assert abs(probs.sum() - 1) < 1e-4
    expected = probs * counts.sum()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    want = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    if want[-1] < 5:
        assert seen[-1] < 30, 'outcomes of (almost) no probability were emitted'
        seen, want = seen[:-1], want[:-1]
    return float(((seen - want) ** 2 / want).sum()), len(want) - 1


def keys(numbers) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.array(numbers))


def emitted_follow(model, drafter, sampling, exact, seed) -> bool:
    cfg, _, params = model
    rows = generate(PlainTarget(cfg), drafter, params, [PROMPT] * ROWS, max_new_tokens=STEPS, sampling=sampling,
                    seed=seed).tokens
    codes = np.array(rows) @ VOCAB ** np.arange(STEPS)[::-1]
    statistic, freedom = chi_square(np.bincount(codes, minlength=VOCAB ** STEPS), exact)
    return statistic < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


# Warped is the harder setting; one deterministic and one drawn draft show that the plain one works, too.
# A head's law is enumerated exactly in tests/tensorhead/test_lossless.py.
@pytest.mark.parametrize('name, setting', [
    *itertools.product(('none', 'prompt_lookup', 'early_exit'), SETTINGS),
    *itertools.product(('lookahead', 'two_model', 'm2r2', 'sparsity', 'skip', 'rad', 'tensorhead'), ('warped',)),
    *(pytest.param(name, 'plain', marks=pytest.mark.slow) for name in ('lookahead', 'two_model', 'tensorhead'))])
def test_output_law_is_the_targets(model, follows, name, setting):
    assert follows(drafters(*model[:2])[name], SETTINGS[setting])


def _accept_everything(logits, draft, rng, sampling):
    last = law(logits[:, -1], sampling)
    return Accepted(draft.length, draw(last, rng))


def _redraw_from_p(logits, draft, rng, sampling):
    """Forgets the residual: after a rejection draws from p itself."""
    accepted = verifier.verify_sample(logits, draft, rng, sampling)
    p = jnp.take_along_axis(law(logits, sampling), accepted.n[:, None, None], axis=1)[:, 0]
    return accepted.replace(next_token=draw(p, jax.random.fold_in(rng, 1)))


def _target_not_warped(logits, draft, rng, sampling):
    return verifier.verify_sample(logits, draft, rng, Sampling(1.0))


def _accept_where_p_exceeds_q(logits, draft, rng, sampling):
    """A threshold instead of a coin."""
    p = jnp.take_along_axis(law(logits, sampling)[:, :-1], draft.tokens[..., None], -1)[..., 0]
    gold = jnp.where(p > draft.law.gold, 0.0, jnp.inf)
    return verifier.verify_sample(logits, draft.replace(law=draft.law.replace(gold=gold)), rng, sampling)


def _ratio_upside_down(logits, draft, rng, sampling):
    p = jnp.take_along_axis(law(logits, sampling)[:, :-1], draft.tokens[..., None], -1)[..., 0]
    gold = p * p / draft.law.gold  # u * gold < p  <=>  u < q / p
    return verifier.verify_sample(logits, draft.replace(law=draft.law.replace(gold=gold)), rng, sampling)


WRONG = (_accept_everything, _redraw_from_p, _target_not_warped, _accept_where_p_exceeds_q, _ratio_upside_down)


@pytest.mark.parametrize('wrong', WRONG)
def test_wrong_verifiers_are_caught(model, follows, monkeypatch, wrong):
    monkeypatch.setattr(loop, 'verify', wrong)
    loop.decode.clear_cache()
    assert not follows(EarlyExit(model[0], 1, 2), SETTINGS['warped'])
    loop.decode.clear_cache()


def test_a_drawn_draft_may_be_called_deterministic(model, follows, monkeypatch):
    """Not a mistake, though it looks like one: accepting x with p(x) and else drawing from p without x emits
    q(y) p(y) + (1 - q(y)) p(y) = p(y). It only accepts less."""
    monkeypatch.setattr(loop, 'verify', lambda logits, draft, rng, sampling: verifier.verify_sample(
        logits, draft.replace(law=None), rng, sampling))
    loop.decode.clear_cache()
    assert follows(EarlyExit(model[0], 1, 2), SETTINGS['warped'])
    loop.decode.clear_cache()


@dataclasses.dataclass(frozen=True)
class Unwarped(EarlyExit):
    """Draws at temperature 1 and reports the warped law: q is not what the token came from."""

    def draft(self, params, cache, state, rng, sampling):
        draft, cache, state = super().draft(params, cache, state, rng, Sampling(1.0))
        probs = law(jnp.log(draft.law.probs), sampling)
        gold = jnp.take_along_axis(probs, draft.tokens[..., None], -1)[..., 0]
        return draft.replace(law=DenseLaw(probs, gold)), cache, state


def test_a_draft_with_the_wrong_law_is_caught(model, follows):
    assert not follows(Unwarped(model[0], 1, 2), SETTINGS['warped'])


@dataclasses.dataclass(frozen=True)
class Peeks(M2R2Drafter):
    """A gate that looks at the word drawn: the words it lets through do not have the law that they were drawn from."""

    def draft(self, *args):
        draft, cache, state = super().draft(*args)
        let_through = jnp.cumprod(draft.tokens != PROMPT[0], axis=1).sum(axis=1)
        return draft.replace(length=jnp.minimum(draft.length, let_through)), cache, state


def test_a_gate_that_sees_the_word_is_caught(model, follows):
    drafter = Peeks(model[0], M2R2Config.of(model[0], ACCELERATED), 2)
    assert not follows(drafter, SETTINGS['warped'])


def test_acceptance_is_one_minus_total_variation():
    """A draft from q is kept with probability sum min(p, q), whatever p and q."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), 2)
    rows = 40_000
    tokens = draw(jnp.tile(q, (rows, 1)), jax.random.key(0))[:, None]
    probs = jnp.tile(q, (rows, 1, 1))
    draft = Draft(tokens, jnp.ones(rows, jnp.int32), DenseLaw(probs, jnp.take_along_axis(probs[:, 0], tokens, 1)))
    logits = jnp.log(jnp.tile(p, (rows, 2, 1)))
    accepted = verifier.verify_sample(logits, draft, jax.random.key(1), Sampling(1.0))
    assert abs(float(accepted.n.mean()) - np.minimum(p, q).sum()) < 4 * 0.5 / np.sqrt(rows)


def test_equal_laws_reject_nothing():
    """p == q to the last bit: the residual vanishes and must not divide by zero."""
    p = jnp.tile(jnp.array([0.2, 0.3, 0.5]), (64, 2, 1))
    tokens = draw(p[:, 0], jax.random.key(0))[:, None]
    probs = law(jnp.log(p), Sampling(1.0))
    draft = Draft(tokens, jnp.ones(64, jnp.int32), DenseLaw(probs[:, :1], jnp.take_along_axis(probs[:, 0], tokens, 1)))
    accepted = verifier.verify_sample(jnp.log(p), draft, jax.random.key(1), Sampling(1.0))
    assert accepted.n.tolist() == [1] * 64
    assert ((accepted.next_token >= 0) & (accepted.next_token < 3)).all()


@pytest.mark.parametrize('name', ('none', 'two_model', pytest.param('tensorhead', marks=pytest.mark.slow)))
def test_with_a_key_a_row_each_row_is_on_its_own(model, name):
    """The same key gives the same tokens, whatever rows stand beside it and in whatever place."""
    cfg, small, params = model
    prompts, drafter = [[1, 3, 1], [2], [4, 4, 0, 2], [3, 3]] * 2, drafters(cfg, small)[name]

    def run(rows, numbers):
        return generate(PlainTarget(cfg), drafter, params, [prompts[row] for row in rows], max_new_tokens=8,
                        sampling=Sampling(1.0), seed=keys(numbers)).tokens

    first = run([0, 1, 2, 3], [0, 1, 2, 3])
    other = run([3, 5, 0, 4], [3, 5, 0, 4])
    assert (other[0], other[2]) == (first[3], first[0])
    assert other[3] != first[0]  # the same prompt under another key


def test_output_law_with_a_key_a_row(model, follows):
    assert follows(EarlyExit(model[0], 1, 2), SETTINGS['warped'], seed=keys(range(ROWS)))


def test_one_key_for_every_row_is_caught(model, follows):
    """Negative control: rows that share a key are one sample many times over."""
    assert not follows(EarlyExit(model[0], 1, 2), SETTINGS['warped'], seed=keys([0] * ROWS))


def test_same_seed_same_tokens(model):
    cfg, _, params = model
    run = lambda seed: generate(PlainTarget(cfg), EarlyExit(cfg, 1, 2), params, [PROMPT] * 8, max_new_tokens=STEPS,
                                sampling=Sampling(1.0), seed=seed).tokens
    assert run(3) == run(3) != run(4)
