"""What a set is worth: the formula of tokens a round against chance, the model of tau, and how tau is timed."""

import jax
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.model import PlainTarget, forward
from rad import acceptance, diagnose
from rad.diagnose import Costs
from rad.skip import SkipConfig
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, layers=3, max_seq_len=64)
COSTS = Costs(1.0, 2.0, 3.0, (10.0, 11.0, 12.0), 'test')


@pytest.mark.parametrize('a', (0.3, 0.8))
def test_tokens_a_round_of_independent_drafts(a):
    """Each draft kept with probability a: drawn, counted as a search counts, and walked through as decoding would."""
    right = np.random.default_rng(0).random((40, 5000, 4)) < a
    found = np.asarray(acceptance.leading(right))
    for counts in (acceptance.histogram(found, 4), acceptance.walk(found, 4)):
        for block in (1, 2, 4):
            mean = acceptance.tokens_a_round(counts, block)
            assert mean == pytest.approx(diagnose.expected_tokens(a, block), rel=0.01)
            assert abs(mean - diagnose.expected_tokens(a + 0.05, block)) > 0.02  # the check would see another a


def test_its_ends():
    assert diagnose.expected_tokens(1.0, 4) == 5 and diagnose.expected_tokens(0.0, 4) == 1
    assert diagnose.expected_tokens(1 - 1e-9, 4) == pytest.approx(5)


def test_model_tau_by_hand():
    skip = SkipConfig((0, 2), (1,))
    assert COSTS.draft(3, skip) == 1 * 1 + 2 * 2 + 3
    counts = [1, 1, 2]  # (1 + 2 * 2) / 4 drafts kept of two, 3 / 4 of one
    assert diagnose.model_tau(COSTS, 3, skip, counts, 2) == pytest.approx((1 + 5 / 4) / (2 * 8 + 12))
    assert diagnose.model_tau(COSTS, 3, skip, counts, 1) == pytest.approx((1 + 3 / 4) / (8 + 11))
    assert diagnose.best_tau(COSTS, 3, skip, counts) == (pytest.approx(1.75 / 19), 1)
    for block, said in ((3, 'block 3 with acceptance of drafts up to 2'), (0, 'block 0')):
        with pytest.raises(ConfigError, match=said):
            diagnose.model_tau(COSTS, 3, skip, counts, block)
    with pytest.raises(ConfigError, match='costs of verifying up to 2'):
        diagnose.model_tau(COSTS, 3, skip, [1] * 5, 3)


def test_costs():
    """From three timed steps; by weights a plain step is 1 and a draft what it reads; and back from a file."""
    timed = Costs.of_times(3, 12.0, 9.0, 3.0, [10.0, 11.0, 12.0])
    assert (timed.attention, timed.mlp, timed.head, timed.verify) == (1.0, 2.0, 3.0, (10.0, 11.0, 12.0))
    with pytest.raises(ConfigError, match='do not fall'):
        Costs.of_times(3, 12.0, 13.0, 3.0, [10.0])
    weights = Costs.of_weights(CFG, 4)
    every = SkipConfig((0, 1, 2), (0, 1, 2))
    assert weights.draft(3, SkipConfig()) == pytest.approx(1) and weights.verify == (1.0,) * 5
    layers = 3 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)
    assert weights.draft(3, every) == pytest.approx(32 * 41 / (layers + 32 * 41))
    assert Costs.from_dict(weights.to_dict()) == weights
    # A draft that is always right and costs as much as the target gains nothing.
    assert diagnose.best_tau(weights, 3, SkipConfig(), [0, 0, 0, 0, 9])[0] == pytest.approx(1)


def test_measured_tau_warms_up_takes_turns_and_is_a_median():
    calls, slow = [], iter([9.0] + [9.0] * 5)

    def decode(name):
        calls.append(name)
        return 20, {'plain': 2.0, 'skip': 1.0}.get(name) or next(slow)

    found = diagnose.measured_tau(decode, ['plain', 'skip', 'slow'], repeats=4)
    assert calls[:3] == ['plain', 'skip', 'slow']  # for nothing
    assert calls[3:] == [*'plain skip slow slow plain skip skip slow plain plain skip slow'.split()]
    assert (found['plain']['tau'], found['skip']['tau'], found['skip']['speedup']) == (10.0, 20.0, 2.0)
    assert len(found['skip']['all']) == 4 and found['slow']['speedups'] == [pytest.approx(2 / 9)] * 4
    times = iter([1.0, 1.0, 5.0, 1.0])  # the first one warms up
    assert diagnose.measured_tau(lambda _: (10, next(times)), ['plain'], 3)['plain']['tau'] == 10.0
    with pytest.raises(ConfigError, match='at least 3 repeats, got 2'):
        diagnose.measured_tau(decode, ['plain'], 2)
    counts = iter([5, 5, 5, 4])
    with pytest.raises(ConfigError, match='made 4 tokens, and 5 before'):
        diagnose.measured_tau(lambda _: (next(counts), 1.0), ['plain'], 3)


def test_output_kl():
    """None where nothing is left out, and the same as from two whole passes by hand."""
    base = lively(CFG)
    cont = acceptance.continuation(PlainTarget(CFG), {'base': base}, [[1, 2, 3], [5] * 6], 6)
    run = jax.jit(lambda base, flags: diagnose.output_kl(CFG, base, cont, flags))
    assert float(run(base, SkipConfig().flags(3))) == 0
    skip = SkipConfig((1,), (2,))
    cut = jax.tree.map(lambda a: a, base)
    cut['layers']['attn']['o']['kernel'] = base['layers']['attn']['o']['kernel'].at[1].set(0)
    cut['layers']['mlp']['down']['kernel'] = base['layers']['mlp']['down']['kernel'].at[2].set(0)
    p, q = (np.asarray(jax.nn.log_softmax(forward(CFG, params, cont.tokens)), np.float64) for params in (base, cut))
    kl = (np.exp(p) * (p - q)).sum(-1)
    want = np.mean([kl[row, first - 1:first + 4] for row, first in ((0, 3), (1, 6))])
    assert float(run(base, skip.flags(3))) == pytest.approx(want, rel=1e-4) and want > 0.01
