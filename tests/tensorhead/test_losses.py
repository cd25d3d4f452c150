"""Losses of the head against brute force over every continuation and closed forms, and at the edges of float32."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backbone.errors import ConfigError
from tensorhead import cp, losses
from tensorhead import head as heads
from tensorhead.config import TensorHeadConfig

N, R, W, D = 3, 2, 5, 5
KINDS = ('switch', 'cv2', 'neg_entropy')


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def lively(mode, rank=R):
    """A head whose components differ a lot."""
    cfg = TensorHeadConfig(D, W, N, rank, mode)
    shape = {'full': (N, rank, D, W), 'linear_shared': (N, rank, D, D)}[mode]
    return cfg, {'gate': {'kernel': normal(1, D, rank), 'bias': normal(2, rank)},
                 'factors': {'kernel': normal(3, *shape)}}


def batch(rows=4, size=6):
    """targets, segments, weights with documents that end inside, padding, and targets that do not count."""
    rng = np.random.default_rng(5)
    segments = np.sort(rng.integers(1, 3, (rows, size)), axis=1).astype(np.int32)
    segments[-1, -2:] = 0
    weights = (segments > 0) & (rng.random((rows, size)) < 0.8)
    weights[:, :-1] &= segments[:, 1:] == segments[:, :-1]
    return rng.integers(0, W, (rows, size)).astype(np.int32), segments, weights.astype(np.float32)


def gold(cfg, head, U, e, index, valid, chunk=0, frozen=False):
    mixture = heads.factors(cfg, head, e)
    return mixture, losses.gold_logp(cfg, head, mixture, U, index, valid, chunk, frozen)


# Windows.

def test_windows_end_with_their_document():
    targets, segments, weights = batch()
    future, valid, weight = losses.windows(targets, segments, weights, N)
    cut = resumed = 0
    for b, t in np.ndindex(targets.shape):
        alive = True
        for s in range(N):
            there = t + s < targets.shape[1]
            counts = there and segments[b, t + s] == segments[b, t] and weights[b, t + s] > 0
            resumed += counts and not alive
            alive = alive and counts
            assert valid[b, t, s] == alive
            cut += there and not alive
            if there:
                assert future[b, t, s] == targets[b, t + s]
        assert weight[b, t] == weights[b, t]
    assert cut > 10 and resumed > 0  # windows do end before the row does, for good


def test_a_target_of_another_document_does_not_count_even_with_a_weight():
    ones = np.ones((1, 4), np.float32)
    _, valid, _ = losses.windows(np.zeros((1, 4), int), np.array([[1, 1, 2, 2]]), ones, 2)
    np.testing.assert_array_equal(valid[0], [[1, 1], [1, 0], [1, 1], [1, 0]])


@pytest.fixture(scope='module')
def table():
    """log q of every continuation [rows, S, W, W, W] in float64, of the lively head."""
    cfg, head = lively('linear_shared')
    e, U = normal(6, 4, 6, D), normal(7, W, D)
    mixture = heads.factors(cfg, head, e)
    logp = np.asarray(jax.nn.log_softmax(heads.logits(cfg, head, mixture, U)), np.float64)
    q = np.einsum('bta,btau,btav,btaw->btuvw', np.exp(np.asarray(mixture.log_w, np.float64)),
                  *(np.exp(logp[..., s, :, :]) for s in range(N)))
    assert abs(q.sum((2, 3, 4)) - 1).max() < 1e-5
    return cfg, head, e, U, q


def test_a_masked_suffix_is_summed_out(table):
    """The loss of each window is -log of the brute-force joint, summed over what lies past its document's end."""
    cfg, head, e, U, q = table
    index, valid, weight = losses.windows(*batch(), N)
    each = jax.vmap(jax.vmap(losses.joint_nll))

    @jax.jit
    def run(valid):
        mixture, logp = gold(cfg, head, U, e, index, valid)
        return each(mixture.log_w, logp, weight)

    got, unmasked = run(valid), run(jnp.ones_like(valid))
    differ = 0
    for b, t in np.argwhere(weight > 0):
        k = int(valid[b, t].sum())
        want = -np.log(q[b, t][tuple(index[b, t, :k])].sum())
        assert got[b, t] == pytest.approx(want, abs=1e-5)
        differ += abs(unmasked[b, t] - want) > 0.1
    assert differ > 3 and (got[weight == 0] == 0).all()


# Gold log-probabilities.

@pytest.mark.parametrize('mode, chunk', itertools.product(('linear_shared', 'full'), (0, 2)))
def test_gold_logp_and_its_gradients_equal_dense_logits(mode, chunk):
    cfg, head = lively(mode)
    e, U = normal(6, 4, 6, D), normal(7, W, D)
    index, valid, _ = losses.windows(*batch(), N)
    weigh = normal(8, 4, 6, N, R)

    def plain(head, U, e):
        z = jax.nn.log_softmax(heads.logits(cfg, head, heads.factors(cfg, head, e), U))
        return jnp.where(valid[..., None], jnp.take_along_axis(z, index[..., None, None], axis=-1)[..., 0], 0)

    ours = lambda head, U, e: gold(cfg, head, U, e, index, valid, chunk)[1]

    def both(fn):
        value, back = jax.vjp(fn, head, U, e)
        return value, back(weigh)

    got, want = jax.jit(lambda: (both(ours), both(plain)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


# Gradients in closed form.

def hand():
    """Two components over two words and positions; gate logits are the log weights, tokens (0, 1)."""
    rows = np.log([[[.8, .2], [.4, .6]], [[.1, .9], [.5, .5]]]).astype(np.float32)  # [n, r, W]
    return np.log([.25, .75]).astype(np.float32), rows, np.array([0, 1])


def of_logits(gate, z, y, loss=losses.joint_nll, *more):
    """A loss of one window from gate logits [r] and factor logits [n, r, W]."""
    logp = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None, None], axis=-1)[..., 0]
    return loss(jax.nn.log_softmax(gate), logp, jnp.ones(()), *more)


def test_gate_gradient_of_the_hand_vector():
    gate, z, y = hand()
    value, grad = jax.jit(jax.value_and_grad(of_logits))(gate, z, y)
    assert value == pytest.approx(-np.log(.33), abs=1e-6)
    np.testing.assert_allclose(grad, [-.2954545, .2954545], atol=1e-6)


def test_joint_gradient_is_responsibility_times_softmax_error():
    gate, z, y = normal(1, 3), normal(2, 4, 3, 5), np.array([0, 4, 2, 2])
    grads = jax.jit(jax.grad(of_logits, argnums=(0, 1)))(gate, z, y)
    w, p = np.asarray(jax.nn.softmax(gate)), np.asarray(jax.nn.softmax(z))
    joint = w * np.prod([p[s, :, y[s]] for s in range(4)], axis=0)
    resp = joint / joint.sum()
    np.testing.assert_allclose(grads[0], w - resp, atol=1e-6)
    np.testing.assert_allclose(grads[1], resp[:, None] * (p - np.eye(5)[y][:, None]), atol=1e-6)


@pytest.fixture(scope='module')
def streamed():
    """(value, gradients) of the closed form, of autodiff, and of the same with per-position marginals; with c: the
    discounts 0.8^k, ones, and one whose first entry is 0. log_w is not normalised."""
    log_w, logp, weight = normal(1, 7, R + 1), -np.abs(normal(2, 7, N, R + 1)), np.abs(normal(3, 7))

    def plain(log_w, logp, weight, c):
        ahead = [jax.nn.logsumexp(log_w + logp[:, :k].sum(1), axis=-1) for k in range(N + 1)]
        return -sum((weight * c[k] * (ahead[k + 1] - ahead[k])).sum() for k in range(N)) / weight.sum()

    def marginal(log_w, logp, weight, c):
        one = jax.nn.logsumexp(jax.nn.log_softmax(log_w)[:, None] + logp, axis=-1)
        return -(weight * (one * c).sum(-1)).sum() / weight.sum()

    @jax.jit
    def run(c):
        of = lambda fn: jax.value_and_grad(fn, argnums=(0, 1))(log_w, logp, weight, c)
        joint = jax.value_and_grad(lambda a, b: losses.joint_nll(jax.nn.log_softmax(a), b, weight), (0, 1))(log_w, logp)
        return of(losses.discounted_nll), of(plain), of(marginal), joint

    return {name: run(np.array(c, np.float32))
            for name, c in {'decayed': .8 ** np.arange(N), 'ones': np.ones(N), 'given': (0, 1, .5)}.items()}


@pytest.mark.parametrize('c', ('decayed', 'ones', 'given'))
def test_streaming_gradient_equals_autodiff(streamed, c):
    got, want, marginal, _ = streamed[c]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    assert np.abs(got[1][1] - marginal[1][1]).max() > 1e-2  # the control: conditionals are not marginals


def test_no_discount_is_the_joint(streamed):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), streamed['ones'][0], streamed['ones'][3])
    assert abs(streamed['decayed'][0][0] - streamed['ones'][0][0]) > 0.1


def test_rank_one_is_cross_entropy_of_independent_heads():
    """Loss and gradients; and so for two equal components under any gate."""
    cfg, head = lively('linear_shared', rank=1)
    twin_cfg = TensorHeadConfig(D, W, N, 2, 'linear_shared')
    twins = {'gate': {'kernel': normal(4, D, 2), 'bias': normal(5, 2)},
             'factors': {'kernel': jnp.repeat(head['factors']['kernel'], 2, axis=1)}}
    e, U, y = normal(6, 8, D), normal(7, W, D), np.random.default_rng(1).integers(0, W, (8, N))
    valid, weight = np.ones((8, N), bool), np.ones(8, np.float32)

    def ours(cfg, head):
        mixture, logp = gold(cfg, head, U, e, y, valid, 2, True)
        return losses.joint_nll(mixture.log_w, logp, weight)

    def independent(head):
        z = heads.logits(cfg, head, heads.factors(cfg, head, e), U)[:, :, 0]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).sum(-1).mean()

    one, want, two = jax.jit(lambda: (jax.value_and_grad(lambda h: ours(cfg, h))(head),
                                      jax.value_and_grad(independent)(head),
                                      jax.value_and_grad(lambda h: ours(twin_cfg, h))(twins)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-6), one, want)
    assert two[0] == pytest.approx(float(one[0]), rel=1e-6)
    np.testing.assert_allclose(two[1]['factors']['kernel'].sum(1), one[1]['factors']['kernel'][:, 0], atol=5e-6)
    np.testing.assert_allclose(two[1]['gate']['bias'], 0, atol=5e-6)


# Distillation. U is the identity, so that a teacher's "hidden state" is its logits and can be any law.

@pytest.fixture(scope='module')
def distilled():
    """[kind][teacher] -> KL of each position [n], of chunks 0 and 2, with the laws in float64."""
    cfg, head = lively('linear_shared')
    e, U, y = normal(6, 3, D), np.eye(W, dtype=np.float32), np.random.default_rng(1).integers(0, W, (3, N))
    valid, weight = np.ones((3, N), bool), np.array([1, 2, 0.5], np.float32)
    valid[2, 2] = False

    @jax.jit
    def laws():
        mixture, logp = gold(cfg, head, U, e, y, valid)
        log_p = jax.nn.log_softmax(heads.logits(cfg, head, mixture, U))
        omega = cp.mixture_weights(cp.prefix_log(mixture.log_w, logp))[..., :-1, :]
        mix = lambda w: jax.nn.logsumexp(w[..., None] + log_p, axis=-2)
        return mix(omega), mix(jnp.broadcast_to(mixture.log_w[:, None], omega.shape))

    conditional, marginal = laws()
    teachers = {'conditional': conditional, 'marginal': marginal, 'other': jnp.asarray(normal(9, 3, N, W))}

    @jax.jit
    def run(teacher):
        def kl(kind, chunk, head=head):
            mixture, logp = gold(cfg, head, U, e, y, valid)
            at = lambda c: kind(cfg, head, mixture, U, teacher, logp, y, valid, weight, c, chunk)
            return jax.vmap(at)(jnp.eye(N))

        grads = [jax.grad(lambda h: kl(losses.kl_full, chunk, h).sum())(head) for chunk in (0, 2)]
        return {'full': kl(losses.kl_full, 0), 'chunked': kl(losses.kl_full, 2), 'grads': grads,
                'bernoulli': kl(losses.kl_bernoulli, 2)}

    found = {name: run(teacher) for name, teacher in teachers.items()}
    log_q, t = np.asarray(conditional, np.float64), np.asarray(teachers['other'], np.float64)
    log_p = t - np.log(np.exp(t).sum(-1, keepdims=True))
    mean = lambda kl: (kl * valid * weight[:, None]).sum(0) / weight.sum()
    pick = lambda a: np.take_along_axis(a, y[..., None], axis=-1)[..., 0]
    p, q = np.exp(pick(log_p)), np.exp(pick(log_q))
    found['by hand'] = {'full': mean((np.exp(log_p) * (log_p - log_q)).sum(-1)),
                        'bernoulli': mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))}
    return found


def test_kl_is_by_hand_and_in_chunks_the_same(distilled):
    for kind in ('full', 'bernoulli'):
        np.testing.assert_allclose(distilled['other'][kind], distilled['by hand'][kind], atol=1e-5)
    np.testing.assert_allclose(distilled['other']['full'], distilled['other']['chunked'], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *distilled['other']['grads'])


def test_kl_to_itself_is_nothing_and_marginals_are_not_itself(distilled):
    np.testing.assert_allclose(distilled['conditional']['full'], 0, atol=1e-6)
    np.testing.assert_allclose(distilled['conditional']['bernoulli'], 0, atol=1e-6)
    far = distilled['marginal']['full']
    assert abs(far[0]) < 1e-6 and (far[1:] > 5e-5).all() and far[1] > 0.1  # they agree at the first position only


def test_bernoulli_kl_is_a_lower_bound(distilled):
    for teacher in ('marginal', 'other'):
        assert (distilled[teacher]['bernoulli'] <= distilled[teacher]['full'] + 1e-6).all()
    assert (distilled['other']['full'] - distilled['other']['bernoulli'] > 1e-3).all()


# Numbers at the edge.

@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_nothing_overflows(dtype):
    """Logits of +-1e4, 64 components of which one has no weight, 16 positions: finite loss and gradients."""
    cfg = TensorHeadConfig(4, 6, 16, 64, 'linear_shared')
    head = {'gate': {'kernel': jnp.zeros((4, 64)), 'bias': jnp.zeros(64).at[3].set(-1e4)},
            'factors': {'kernel': jnp.asarray(normal(1, 16, 64, 4, 4))}}
    head, U = jax.tree.map(lambda a: jnp.asarray(a, dtype), (head, 1e4 * normal(2, 6, 4)))
    e, y = jnp.asarray(normal(3, 2, 4), dtype), np.random.default_rng(0).integers(0, 6, (2, 16))
    valid, weight, teacher = np.ones((2, 16), bool), np.ones(2), jnp.asarray(normal(4, 2, 16, 4), dtype)

    def loss(head):
        mixture, logp = gold(cfg, head, U, e, y, valid, 4, True)
        c = np.full(16, 0.9, np.float32) ** np.arange(16)
        each = [losses.joint_nll(mixture.log_w, logp, weight), losses.discounted_nll(mixture.log_w, logp, weight, c)]
        if dtype == jnp.float32:
            each += [kind(cfg, head, mixture, U, teacher, logp, y, valid, weight, c, 4)
                     for kind in (losses.kl_full, losses.kl_bernoulli)]
            each += [losses.balance(mixture.log_w, weight, kind) for kind in KINDS]
        return sum(each), jnp.stack(each)

    grads, each = jax.jit(jax.grad(loss, has_aux=True))(head)
    grads = [np.asarray(g, np.float32) for g in jax.tree.leaves(grads)]
    assert np.isfinite(each).all() and all(np.isfinite(g).all() for g in grads)
    assert each.dtype == jnp.float32 and each[0] > 1e3 and np.abs(grads[0]).max() > 1  # nor is anything cut off


# Balance and usage.


def test_balance_is_least_when_even_and_pulls_a_collapsed_gate_back():
    weight = jnp.ones(6)
    even = jnp.log(jnp.full((6, 4), 0.25))
    gate = jnp.zeros(4).at[1].set(10.0)
    term = lambda b, kind: losses.balance(jnp.broadcast_to(jax.nn.log_softmax(b), (6, 4)), weight, kind)
    found = jax.jit(lambda: [(losses.balance(even, weight, kind), *jax.value_and_grad(term)(gate, kind))
                             for kind in KINDS])()
    for (at_even, value, pull), least, most in zip(found, (1, 0, 0), (4, 3, np.log(4)), strict=True):
        assert at_even == pytest.approx(least, abs=1e-6) and value == pytest.approx(most, abs=0.02)
        assert pull[1] > 0 and (np.delete(pull, 1) < 0).all()  # descent lowers the one, raises the others
    with pytest.raises(ConfigError, match='square'):
        losses.balance(even, weight, 'square')


def test_balance_is_of_the_whole_batch():
    """Each half uses one component only: together they are even. A mean over halves (shards) would say collapsed."""
    log_w = np.log(np.where(np.arange(8)[:, None] // 4 == np.arange(2), 0.99, 0.01)).astype(np.float32)
    weight = np.ones(8, np.float32)
    for kind, least in zip(KINDS, (1, 0, 0), strict=True):
        assert losses.balance(log_w, weight, kind) == pytest.approx(least, abs=1e-6)
        assert np.mean([losses.balance(log_w[i:i + 4], weight[:4], kind) for i in (0, 4)]) > least + 0.5
        weighed = losses.balance(log_w, np.repeat([1, 0], 4).astype(np.float32), kind)
        assert weighed == pytest.approx(float(losses.balance(log_w[:4], weight[:4], kind)), abs=1e-6)


def test_switch_by_hand():
    """r sum_a f_a P_a with f = (3/4, 1/4) and P = (5/8, 3/8); the gradient is that of P alone."""
    w, weight = np.array([[.5, .5], [.9, .1], [.2, .8]], np.float32), np.array([1, 2, 1], np.float32)
    value, grad = jax.jit(jax.value_and_grad(lambda w: losses.balance(jnp.log(w), weight, 'switch')))(w)
    assert value == pytest.approx(1.125, abs=1e-6)
    np.testing.assert_allclose(grad, 2 * weight[:, None] / 4 * np.array([.75, .25]), atol=1e-6)


def test_usage_by_hand():
    log_w = np.log([[.5, .5], [.9, .1], [.2, .8]]).astype(np.float32)
    after = np.log([[.3, .1], [1, 3], [.5, .5]])  # up to a constant a row
    found = losses.usage(log_w, after, np.array([1., 1, 2]))
    h = lambda *p: -sum(x * np.log(x) for x in p)
    want = {'usage_entropy': h(.45, .55), 'row_entropy': (h(.5, .5) + h(.9, .1) + 2 * h(.2, .8)) / 4,
            'responsibility': (.75 + .75 + 2 * .5) / 4, 'share_1': .5, 'share_2': .5}
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


# What training can reach. The law: x_1 uniform over V words and x_2 = x_1, seen from one hidden state.

V = 4


def bound(rank):
    """The least NLL of a rank-r mixture: ln V + (1/V) sum_i g_i ln g_i for a balanced partition of V in r groups."""
    groups = [len(part) for part in np.array_split(np.arange(V), rank)]
    return np.log(V) + sum(g * np.log(g) for g in groups) / V


@pytest.fixture(scope='module')
def trained():
    """Losses along training [runs, steps] and last parameters. Runs: 4 seeds of ranks 1..4 (what is not used of 4
    components gets a gate of -1e4), then one of rank 4 whose components start equal."""
    cfg = TensorHeadConfig(V, V, 2, V, 'full')
    ranks = np.repeat(np.arange(1, V + 1), 4)
    kernel = 0.5 * normal(1, len(ranks) + 1, 2, V, V, V)
    kernel[-1] = kernel[-1][:, :1]
    gate = 0.5 * normal(2, len(ranks) + 1, V, V)
    gate[-1] = 0
    bias = np.where(np.arange(V) < np.append(ranks, V)[:, None], 0, -1e4).astype(np.float32)
    start = {'gate': {'kernel': gate, 'bias': bias}, 'factors': {'kernel': kernel}}
    e, y = jnp.ones((V, V)), jnp.repeat(jnp.arange(V)[:, None], 2, axis=1)
    adam = optax.adam(0.05)

    def loss(head):
        mixture, logp = gold(cfg, head, None, e, y, jnp.ones((V, 2), bool))
        return losses.joint_nll(mixture.log_w, logp, jnp.ones(V))

    def step(carry, _):
        head, state = carry
        value, grads = jax.value_and_grad(loss)(head)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(head, updates), state), value

    def run(head):
        (head, _), values = jax.lax.scan(step, (head, adam.init(head)), length=300)
        return values, head

    values, last = jax.jit(jax.vmap(run))(start)
    return ranks, np.asarray(values), last


def test_training_reaches_the_limit_of_its_rank_and_never_beats_it(trained):
    ranks, values, _ = trained
    assert [round(bound(r), 6) for r in range(1, V + 1)] == [2.772589, 2.079442, 1.732868, 1.386294]
    for rank in range(1, V + 1):
        mine = values[:-1][ranks == rank]
        assert mine.min() > bound(rank) - 1e-4  # below it the head would know its targets
        assert mine[:, -1].min() < bound(rank) + 0.05
    assert np.isfinite(values).all()


def test_equal_components_stay_equal_and_noise_frees_them(trained):
    _, values, last = trained
    equal = np.asarray(last['factors']['kernel'][-1])
    np.testing.assert_allclose(equal, np.repeat(equal[:, :1], V, axis=1), atol=1e-6)
    assert values[-1, -1] > bound(1) - 1e-4  # rank 4 in name, rank 1 in law
    noisy = values[:-1][trained[0] == V]
    assert (noisy[:, -1] < 0.75 * bound(1)).all()
