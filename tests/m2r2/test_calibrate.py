"""Thresholds with a bound: against sums of binomial terms, and by drawing the held-out positions many times."""

import math

import numpy as np
import pytest

from backbone.errors import ConfigError
from m2r2 import calibrate

EXITS, LAYERS = (2, 4), 6


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores uniform in 0..1, [2, n]; an exit agrees at rate 0.5 + 0.5 score, the second 0.6 + 0.4 score."""
    scores = rng.random((2, n))
    return scores, rng.random((2, n)) < np.array([[0.5], [0.6]]) + np.array([[0.5], [0.4]]) * scores


def true_risk(thresholds: tuple[float, ...]) -> float:
    """Of that law: the share of all tokens that leave with another word, the first exit first."""
    wrong = lambda t, most: most * (1 - min(t, 1)) ** 2 / 2  # integral of most (1 - s) over s >= t
    return wrong(thresholds[0], 0.5) + min(thresholds[0], 1) * wrong(thresholds[1], 0.4)


@pytest.mark.parametrize(('errors', 'n', 'delta'), ((0, 50, 0.05), (3, 100, 0.1), (40, 60, 0.01), (7, 2000, 0.025)))
def test_the_bound_is_the_rate_at_which_so_few_errors_have_probability_delta(errors, n, delta):
    at = lambda rate: math.fsum(math.comb(n, k) * rate ** k * (1 - rate) ** (n - k) for k in range(errors + 1))
    bound = calibrate.upper_bound(errors, n, delta)
    assert at(bound) == pytest.approx(delta, rel=1e-6) and bound > errors / n
    assert calibrate.upper_bound(n, n, delta) == 1.0
    if not errors:
        assert bound == pytest.approx(1 - delta ** (1 / n))


@pytest.mark.parametrize('choose', (calibrate.per_exit, calibrate.shared))
def test_the_risk_is_kept_in_nearly_all_draws_and_an_uncorrected_threshold_does_not(choose):
    rng, target, delta, draws = np.random.default_rng(0), 0.95, 0.1, 300
    grid = np.round(np.linspace(1, 0, 41), 3).tolist()
    safe, naive, depths = 0, 0, []
    for _ in range(draws):
        scores, agrees = draw(rng, 400)
        found = choose(scores, agrees, EXITS, LAYERS, target=target, delta=delta, grid=grid)
        safe += true_risk(found.thresholds) <= 1 - target
        depths.append(found.mean_depth)
        sweep = calibrate.sweep(scores, agrees, EXITS, LAYERS, grid)
        lowest = min(row['threshold'] for row in sweep if row['agreement'] >= target)  # as if seen were sure
        naive += true_risk((lowest, lowest)) <= 1 - target
    # Three standard deviations of a share of `draws`.
    slack = 3 * math.sqrt(delta * (1 - delta) / draws)
    assert safe / draws >= 1 - delta - slack
    assert naive / draws < 1 - delta - slack
    assert np.mean(depths) < LAYERS - 0.2, 'a bound that never lets anyone leave would be safe too'


def test_one_sequence_of_tests_leaves_more_room_than_sharing_out():
    scores, agrees = draw(np.random.default_rng(1), 4000)
    parted, whole = (choose(scores, agrees, EXITS, LAYERS, target=0.9) for choose in (calibrate.per_exit,
                                                                                     calibrate.shared))
    assert whole.mean_depth < parted.mean_depth < LAYERS
    for found in (parted, whole):
        assert found.bound <= 0.1 and found.agreement >= 0.9 and found.n == 4000
        assert sum(found.shares) == pytest.approx(1) and found.to_dict()['thresholds'] == found.thresholds


def test_no_exit_is_safe_where_none_is():
    scores = np.random.default_rng(0).random((2, 500)) * 0.5 + 0.5
    found = calibrate.per_exit(scores, np.zeros((2, 500), bool), EXITS, LAYERS, target=0.99, grid=(0.5, 0.0))
    assert found.thresholds == (calibrate.NEVER,) * 2 and min(found.thresholds) > 1
    assert found.bound == 0 and found.mean_depth == LAYERS and found.agreement == 1
    few = draw(np.random.default_rng(2), 20)  # even twenty agreeing positions do not show 0.99
    assert calibrate.shared(few[0], few[0] >= 0, EXITS, LAYERS, target=0.99).thresholds == (calibrate.NEVER,) * 2
    # Testing stops at the first failure: what is safe by chance further on is not taken.
    assert calibrate.safest_first([0, 90, 0], 1000, 0.05, 0.1) == 1


def test_the_sweep_is_monotone_in_mean_depth_and_ends_where_it_must():
    scores, agrees = draw(np.random.default_rng(3), 2000)
    scores = np.round(scores, 2)  # ties
    rows = calibrate.sweep(scores, agrees, EXITS, LAYERS, (2.0, *calibrate.GRID))
    depths = [row['mean_depth'] for row in rows]
    assert depths == sorted(depths, reverse=True) and depths[0] == LAYERS and depths[-1] == EXITS[0]
    assert rows[0]['agreement'] == 1 and rows[-1]['agreement'] == pytest.approx(agrees[0].mean())
    middle = rows[101]
    first, rest = scores[0] >= middle['threshold'], scores[0] < middle['threshold']
    second = rest & (scores[1] >= middle['threshold'])
    assert middle['mean_depth'] == pytest.approx((2 * first + 4 * second + 6 * (rest & ~second)).mean())
    assert middle['agreement'] == pytest.approx(1 - ((first & ~agrees[0]) | (second & ~agrees[1])).mean())


def test_scores_become_rates_of_agreement():
    rng = np.random.default_rng(4)
    rate = rng.random(20000)
    agrees = rng.random(20000) < rate
    logit = np.log(rate / (1 - rate))
    scores = 1 / (1 + np.exp(-(3 * logit + 1)))  # overconfident and shifted
    scale, bias = calibrate.fit_scale(scores, agrees)
    assert scale == pytest.approx(1 / 3, rel=0.1) and bias == pytest.approx(-1 / 3, abs=0.1)
    fixed = calibrate.scaled(scores, scale, bias)
    rows, error = calibrate.reliability(fixed, agrees)
    assert error < 0.02 < 0.08 < calibrate.reliability(scores, agrees)[1]
    assert sum(row['n'] for row in rows) == 20000 and all(row['low'] <= row['score'] <= row['high'] for row in rows)
    assert calibrate.auc(fixed, agrees) == pytest.approx(calibrate.auc(scores, agrees), abs=1e-4)
    once = calibrate.fold({'scale': 2.0, 'bias': 0.5, 'read': 1}, scale, bias)
    assert once == {'scale': 2 * scale, 'bias': 0.5 * scale + bias, 'read': 1}
    assert calibrate.fit_scale(scores[:50], np.ones(50))[0] > 0, 'one class alone'


@pytest.mark.parametrize(('changes', 'named'), (
    ({'target': 1.0}, 'target and delta'), ({'delta': 0.0}, 'target and delta'), ({'exits': (2,)}, '1 exits'),
    ({'grid': (0.1, 0.5)}, 'must fall'), ({'grid': ()}, 'must fall'), ({'agrees': np.ones((2, 3))}, 'positions')))
def test_a_wrong_request_is_named(changes, named):
    scores, agrees = draw(np.random.default_rng(5), 10)
    given = {'scores': scores, 'agrees': agrees, 'exits': EXITS, 'num_layers': LAYERS, 'target': 0.9} | changes
    for choose in (calibrate.per_exit, calibrate.shared):
        with pytest.raises(ConfigError, match=named):
            choose(**given)


def test_a_gate_without_parameters_cannot_be_scaled():
    with pytest.raises(ConfigError, match='no scale'):
        calibrate.fold({}, 1.0, 0.0)
