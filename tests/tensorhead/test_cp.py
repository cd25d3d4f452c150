"""The closed forms against the joint itself: all W^n sequences of a small mixture, summed in numpy, float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorhead import cp
from tests.contract.test_sampled import chi_square

N, R, W = 3, 3, 4
ALL = np.array(list(itertools.product(range(W), repeat=N)))  # [W^N, N]


# One compilation a shape, where operation by operation it would be ten.
log_joint, conditionals, row, condition_on, next_token, seq_greedy, expert_argmax = map(jax.jit, (
    cp.log_joint, cp.conditionals, cp.row, cp.condition_on, cp.next_token, cp.seq_greedy, cp.expert_argmax))
prefixes = jax.jit(lambda log_w, logp: (cp.mixture_weights(cp.prefix_log(log_w, logp)),
                                        cp.log_prefix(cp.prefix_log(log_w, logp))))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_normalised(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def mixture(r: int = R, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """log_w [r], logp [N, r, W] of components that differ."""
    rng = np.random.default_rng(seed)
    return log_normalised(rng.normal(size=r)), log_normalised(2 * rng.normal(size=(N, r, W)))


def brute_force(log_w: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """The joint, [W, W, W]."""
    return np.einsum('a,ai,aj,ak->ijk', np.exp(log_w), *np.exp(logp))


def of(logp: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """logp [N, r, W] of sequences [B, N] -> [B, N, r]."""
    return logp[np.arange(N), :, tokens]


def test_the_worked_example():
    log_w = np.log([.25, .75])
    logp = np.log([[[.8, .2], [.4, .6]], [[.1, .9], [.5, .5]]])  # [n, r, W]
    pairs = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    gold = logp[np.arange(2), :, pairs]
    np.testing.assert_allclose(np.exp(log_joint(log_w, gold)), [.17, .33, .23, .27], atol=1e-12)
    np.testing.assert_allclose(np.exp(next_token(log_w, logp[0])), [.5, .5], atol=1e-12)
    np.testing.assert_allclose(np.exp(row(log_w, logp[1])), [.4, .6], atol=1e-12)
    for first, omega, law in ((0, [.4, .6], [.34, .66]), (1, [.1, .9], [.46, .54])):
        seen = condition_on(log_w, logp[0, :, first])
        np.testing.assert_allclose(np.exp(seen), omega, atol=1e-12)
        np.testing.assert_allclose(np.exp(row(seen, logp[1])), law, atol=1e-12)
    weights = np.exp(prefixes(log_w, gold[1])[0])  # after 0, 1 and 2 tokens of (0, 1)
    np.testing.assert_allclose(weights, [[.25, .75], [.4, .6], [6 / 11, 5 / 11]], atol=1e-12)
    nll = lambda gate: -log_joint(jax.nn.log_softmax(gate), gold[1])
    np.testing.assert_allclose(jax.grad(nll)(jnp.array(log_w)), [.25 - 6 / 11, .75 - 5 / 11], atol=1e-12)


def test_the_joint_is_a_law():
    log_w, logp = mixture()
    joint = np.exp(log_joint(log_w, of(logp, ALL)))
    np.testing.assert_allclose(joint, brute_force(log_w, logp).ravel(), atol=1e-15)
    assert (joint >= 0).all() and abs(joint.sum() - 1) < 1e-12
    mean_of_logs = np.exp((np.exp(log_w) * of(logp, ALL).sum(1)).sum(-1))  # a bound, not the model
    assert abs(mean_of_logs.sum() - 1) > 0.1


def test_rank_one_is_independent_heads():
    log_w, logp = mixture(1)
    gold = of(logp, ALL)
    np.testing.assert_allclose(log_joint(log_w, gold), gold.sum((1, 2)), atol=1e-12)
    np.testing.assert_allclose(conditionals(log_w, gold), gold[..., 0], atol=1e-12)
    alike = np.repeat(gold, 5, axis=-1)
    weights = log_normalised(np.arange(5.))
    np.testing.assert_allclose(log_joint(weights, alike), gold.sum((1, 2)), atol=1e-12)
    np.testing.assert_allclose(conditionals(weights, alike), gold[..., 0], atol=1e-12)


def test_prefixes_are_marginals_of_the_joint():
    log_w, logp = mixture()
    joint = brute_force(log_w, logp)
    ahead = np.exp(prefixes(log_w, of(logp, ALL))[1]).reshape(W, W, W, N + 1)
    np.testing.assert_allclose(ahead[..., 0], 1, atol=1e-12)
    np.testing.assert_allclose(ahead[..., 1], np.broadcast_to(joint.sum((1, 2))[:, None, None], (W,) * 3), atol=1e-14)
    np.testing.assert_allclose(ahead[..., 2], np.broadcast_to(joint.sum(2)[..., None], (W,) * 3), atol=1e-14)
    np.testing.assert_allclose(ahead[..., 3], joint, atol=1e-15)
    np.testing.assert_allclose(np.exp(row(log_w, logp[1])), joint.sum((0, 2)), atol=1e-14)  # the middle axis
    left_out = of(logp, ALL) * np.array([1, 0, 1])[:, None]
    np.testing.assert_allclose(np.exp(log_joint(log_w, left_out)).reshape(W, W, W)[:, 0], joint.sum(1), atol=1e-14)


def chain(log_w, logp, weights_after, factor=lambda k: k) -> np.ndarray:
    """The joint as a product of conditional rows, [W^N]. weights_after(log_w, gold of one position) -> log_w."""
    total, weights = 0, np.broadcast_to(log_w, (len(ALL), len(log_w)))
    for k in range(N):
        total += np.asarray(row(weights, logp[factor(k)]))[np.arange(len(ALL)), ALL[:, k]]
        weights = weights_after(weights, logp[k][:, ALL[:, k]].T)
    return np.exp(total)


def test_the_chain_rule():
    log_w, logp = mixture()
    joint = brute_force(log_w, logp).ravel()
    np.testing.assert_allclose(chain(log_w, logp, condition_on), joint, atol=1e-15)
    np.testing.assert_allclose(conditionals(log_w, of(logp, ALL)).sum(-1), np.log(joint), atol=1e-12)
    rows = row(condition_on(log_w, logp[0].T), logp[1])  # one row for each first token, [W, W]
    np.testing.assert_allclose(np.exp(rows).sum(-1), 1, atol=1e-12)


@pytest.mark.parametrize('wrong', (
    {'weights_after': lambda w, gold: w},  # marginals: the tokens before are not seen
    {'weights_after': lambda w, gold: jax.nn.log_softmax(gold)},  # only the last one is
    {'weights_after': condition_on, 'factor': lambda k: N - 1},  # the last factor instead of the position's
), ids=('stale', 'forgetful', 'last factor'))
def test_the_chain_rule_catches(wrong):
    log_w, logp = mixture()
    assert np.abs(chain(log_w, logp, **wrong) - brute_force(log_w, logp).ravel()).sum() > 0.05


def test_conditionals_see_the_tokens_before():
    log_w, logp = mixture()
    for k in range(N):
        marginal = np.asarray(row(log_w, logp[k]))[ALL[:, k]]
        apart = np.abs(np.asarray(conditionals(log_w, of(logp, ALL)))[:, k] - marginal).max()
        assert apart > 0.1 if k else apart < 1e-12


def test_order_of_components_and_of_positions():
    log_w, logp = mixture()
    gold, by, at = of(logp, ALL), np.array([2, 0, 1]), np.array([1, 2, 0])
    want = conditionals(log_w, gold)
    np.testing.assert_allclose(conditionals(log_w[by], gold[..., by]), want, atol=1e-12)
    assert np.abs(conditionals(log_w[by], gold) - want).max() > 0.1
    np.testing.assert_allclose(log_joint(log_w, gold[:, at]), log_joint(log_w, gold), atol=1e-12)
    assert np.abs(conditionals(log_w, gold[:, at]) - want[:, at]).max() > 0.1


def test_far_out_numbers_stay_finite():
    """Log-probabilities of -1e4 and a component that has none of the weight, float32, sixteen positions."""
    rng = np.random.default_rng(0)
    logp = log_normalised(rng.choice([-1e4, 0, 1e4], (16, 64, 7))).astype(np.float32)
    log_w = log_normalised(np.where(np.arange(64) == 3, -1e4, 0)).astype(np.float32)
    loss = lambda gate, gold: -cp.conditionals(jax.nn.log_softmax(gate), gold).sum()
    for got in (row(log_w, logp[0]), *jax.jit(jax.value_and_grad(loss, (0, 1)))(log_w, logp[..., 2])):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_greedy_is_not_the_likeliest_sequence():
    """Component 1 is sure of (a, c); component 2, likelier, begins with b and then does not know."""
    with np.errstate(divide='ignore'):
        log_w, logp = np.log([.4, .6]), np.log([[[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 1, 0], [.25] * 4]])
    score = lambda tokens: np.exp(log_joint(log_w, logp[np.arange(2), :, np.array(tokens)]))
    greedy = seq_greedy(log_w, logp)
    assert greedy[0] == 1 and abs(score(greedy) - .15) < 1e-12
    tokens, value = cp.map_exact(log_w, logp)
    assert tokens == (0, 2) and abs(np.exp(value) - .4) < 1e-12
    candidates, scores = expert_argmax(log_w, logp)
    assert candidates[0].tolist() == [0, 2]
    np.testing.assert_allclose(np.exp(scores), [.4, .15], atol=1e-12)


def test_searches_against_all_sequences():
    for seed in range(5):
        log_w, logp = mixture(seed=seed)
        joint = brute_force(log_w, logp)
        tokens, value = cp.map_exact(log_w, logp)
        assert tokens == np.unravel_index(joint.argmax(), joint.shape) and abs(np.exp(value) - joint.max()) < 1e-12
        first = joint.sum((1, 2)).argmax()
        second = joint.sum(2)[first].argmax()
        assert seq_greedy(log_w, logp).tolist() == [first, second, joint[first, second].argmax()]
        candidates, scores = expert_argmax(log_w, logp)
        assert candidates.tolist() == logp.argmax(-1).T.tolist()
        np.testing.assert_allclose(np.exp(scores), [joint[tuple(c)] for c in np.asarray(candidates)], atol=1e-14)
        assert scores.max() <= value + 1e-12


ROWS = 20_000


def from_marginals(log_w, logp, rng):
    return jax.random.categorical(rng, row(log_w[:, None], logp))


@pytest.mark.parametrize('sampler, keys, right', (
    (cp.sample_ancestral, 'one', True), (cp.sample_ancestral, 'a row', True), (cp.sample_sequential, 'one', True),
    (cp.sample_sequential, 'a row', True), (from_marginals, 'one', False)))
def test_samplers_follow_the_joint(sampler, keys, right):
    """Two ways to draw, one law; positions drawn apart from each other, the negative control, have another."""
    log_w, logp = mixture()
    rng = jax.random.key(1) if keys == 'one' else jax.random.split(jax.random.key(2), ROWS)
    tokens = jax.jit(lambda rng: sampler(jnp.broadcast_to(log_w, (ROWS, R)),
                                         jnp.broadcast_to(logp, (ROWS, N, R, W)), rng))(rng)
    counts = np.bincount(np.asarray(tokens) @ W ** np.arange(N)[::-1], minlength=W ** N)
    statistic, freedom = chi_square(counts, brute_force(log_w, logp).ravel())
    assert (statistic < freedom + 5 * np.sqrt(2 * freedom)) == right
