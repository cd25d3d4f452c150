"""Thresholds for the gates, with a bound on how often a token that leaves early is another one than the whole model's.

Held-out positions give, for each exit, a score and whether the exit's first choice is the whole model's. Then

    risk(t) = share of ALL tokens that leave, at thresholds t, with another word than the whole model's

is at most 1 - target with probability 1 - delta over the draw of those n positions: thresholds are tried from the
safest one on, each against the exact binomial bound at level delta, until the first that fails. Testing in a fixed
order costs no correction for the many thresholds (Learn then Test, Angelopoulos et al., 2021, arXiv 2110.01052; for
early exit: Schuster et al., 2022, arXiv 2207.07061). The bound is for independent positions, from the text the model
will see, and for states as computed there: take few positions of each text, and expect less where skipped layers leave
the cache approximate. numpy and scipy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from backbone.errors import ConfigError

NEVER = 2.0  # a threshold no score reaches
GRID = tuple(np.round(np.linspace(1.0, 0.0, 201), 6).tolist())


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """thresholds: of each exit, NEVER where none is safe. bound: upper bound on the risk, at level delta; target: 1 -
    the risk asked for. n: positions. agreement, mean_depth (layers), shares (of tokens, by exit, the last layer's
    last): what these thresholds give on the same positions."""

    thresholds: tuple[float, ...]
    bound: float
    target: float
    delta: float
    n: int
    agreement: float
    mean_depth: float
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def upper_bound(errors: int, n: int, delta: float) -> float:
    """The largest rate under which `errors` or fewer of n have probability delta (Clopper and Pearson, 1934)."""
    return 1.0 if errors >= n else float(scipy.stats.beta.ppf(1 - delta, errors + 1, n - errors))


def safest_first(errors: Sequence[int], n: int, risk: float, delta: float) -> int:
    """Hypotheses in a fixed order, safest first: how many are shown to have at most `risk` before the first is not.

    errors: of n, by hypothesis.
    """
    for i, count in enumerate(errors):
        if upper_bound(int(count), n, delta) > risk:
            return i
    return len(errors)


def per_exit(scores: np.ndarray, agrees: np.ndarray, exits: Sequence[int], num_layers: int, *, target: float,
             delta: float = 0.05, grid: Sequence[float] = GRID) -> Calibrated:
    """A threshold for each exit. scores, agrees [J, n].

    Risk and delta are shared out evenly: an exit alone errs with at most (1 - target) / J at level delta / J. Together
    they err at most as often as all would alone, whoever leaves first. Errors: ConfigError.
    """
    scores, agrees, grid = _checked(scores, agrees, exits, target, delta, grid)
    count, n = scores.shape
    thresholds, bound = [], 0.0
    for s, right in zip(scores, agrees, strict=True):
        errors = [int(((s >= t) & ~right).sum()) for t in grid]
        passed = safest_first(errors, n, (1 - target) / count, delta / count)
        thresholds.append(grid[passed - 1] if passed else NEVER)
        bound += upper_bound(errors[passed - 1], n, delta / count) if passed else 0.0
    return _calibrated(thresholds, bound, scores, agrees, exits, num_layers, target, delta)


def shared(scores: np.ndarray, agrees: np.ndarray, exits: Sequence[int], num_layers: int, *, target: float,
           delta: float = 0.05, grid: Sequence[float] = GRID) -> Calibrated:
    """One threshold for all exits: a single sequence of tests, so nothing is shared out. Arguments as `per_exit`.

    Of use where scores mean the same at every exit: after `fit_scale`, on other positions than these.
    """
    scores, agrees, grid = _checked(scores, agrees, exits, target, delta, grid)
    n = scores.shape[1]
    errors = [int((~_outcome(scores, agrees, [t] * len(exits))[1]).sum()) for t in grid]
    passed = safest_first(errors, n, 1 - target, delta)
    bound = upper_bound(errors[passed - 1], n, delta) if passed else 0.0
    threshold = grid[passed - 1] if passed else NEVER
    return _calibrated([threshold] * len(exits), bound, scores, agrees, exits, num_layers, target, delta)


def sweep(scores: np.ndarray, agrees: np.ndarray, exits: Sequence[int], num_layers: int,
          grid: Sequence[float] = GRID) -> list[dict[str, Any]]:
    """What each shared threshold gives: agreement with the whole model, mean depth (layers), shares by exit. A lower
    one never makes a token leave later."""
    scores, agrees = np.asarray(scores), np.asarray(agrees, bool)
    return [{'threshold': float(t)} | _summary(scores, agrees, [t] * len(exits), exits, num_layers) for t in grid]


def fit_scale(scores: np.ndarray, agrees: np.ndarray) -> tuple[float, float]:
    """(scale, bias) for sigmoid(scale logit(score) + bias) to be the rate of agreement: least negative log-likelihood.

    Temperature scaling (Guo et al., 2017, arXiv 1706.04599) with a bias beside it, as training weighs both classes
    alike. The order of the scores stays: scale is kept above 0.
    """
    x, y = _logit(np.ravel(scores)), np.ravel(agrees).astype(float)

    def nll(at: np.ndarray) -> tuple[float, np.ndarray]:
        scale = np.exp(at[0])
        z = scale * x + at[1]
        off = scipy.special.expit(z) - y
        ridge = 1e-6 * float(at @ at)  # one class alone has no least value
        return (float((np.logaddexp(0, z) - y * z).mean()) + ridge,
                np.array([(off * x).mean() * scale, off.mean()]) + 2e-6 * at)

    found = scipy.optimize.minimize(nll, np.zeros(2), jac=True, method='L-BFGS-B', bounds=[(-5, 5), (-20, 20)])
    return float(np.exp(found.x[0])), float(found.x[1])


def scaled(scores: np.ndarray, scale: float, bias: float) -> np.ndarray:
    return scipy.special.expit(scale * _logit(scores) + bias)


def fold(params_j: dict, scale: float, bias: float) -> dict:
    """The parameters of a gate (m2r2/gates.py) that gives `scaled` scores. Errors: ConfigError where it has none."""
    if not params_j:
        raise ConfigError('a gate without parameters has no scale: its scores stay as they are')
    return params_j | {'scale': params_j['scale'] * scale, 'bias': params_j['bias'] * scale + bias}


def reliability(scores: np.ndarray, agrees: np.ndarray, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """(rows of {low, high, n, score, agreement} for each bin that holds something, expected calibration error)."""
    scores, agrees = np.ravel(scores), np.ravel(agrees).astype(float)
    at = np.minimum((scores * bins).astype(int), bins - 1)
    rows = [{'low': i / bins, 'high': (i + 1) / bins, 'n': int((at == i).sum()), 'score': float(scores[at == i].mean()),
             'agreement': float(agrees[at == i].mean())} for i in range(bins) if (at == i).any()]
    return rows, sum(row['n'] * abs(row['score'] - row['agreement']) for row in rows) / len(scores)


def auc(scores: np.ndarray, agrees: np.ndarray) -> float:
    """Probability that an agreeing position has the higher score, ties half; NaN where one class is missing."""
    agrees = np.ravel(agrees).astype(bool)
    ranks = scipy.stats.rankdata(np.ravel(scores))
    right, wrong = int(agrees.sum()), int((~agrees).sum())
    return float((ranks[agrees].sum() - right * (right + 1) / 2) / (right * wrong)) if right and wrong else float('nan')


def _outcome(scores: np.ndarray, agrees: np.ndarray, thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(exit each token leaves at, J: none; whether its word is the whole model's), [n] each."""
    left = scores >= np.asarray(thresholds)[:, None]
    first = np.where(left.any(0), left.argmax(0), len(scores))
    whole = np.concatenate([agrees, np.ones((1, scores.shape[1]), bool)])
    return first, whole[first, np.arange(scores.shape[1])]


def _summary(scores: np.ndarray, agrees: np.ndarray, thresholds: Sequence[float], exits: Sequence[int],
             num_layers: int) -> dict[str, Any]:
    first, right = _outcome(scores, agrees, thresholds)
    shares = np.bincount(first, minlength=len(exits) + 1) / len(first)
    return {'agreement': float(right.mean()), 'mean_depth': float(shares @ [*exits, num_layers]),
            'shares': tuple(shares.tolist())}


def _calibrated(thresholds, bound, scores, agrees, exits, num_layers, target, delta) -> Calibrated:
    found = _summary(scores, agrees, thresholds, exits, num_layers)
    return Calibrated(tuple(map(float, thresholds)), bound, target, delta, scores.shape[1], **found)


def _checked(scores, agrees, exits, target, delta, grid) -> tuple[np.ndarray, np.ndarray, list[float]]:
    scores, agrees = np.asarray(scores, float), np.asarray(agrees, bool)
    if not 0 < target < 1 or not 0 < delta < 1:
        raise ConfigError(f'target and delta must lie within 0..1, got {target} and {delta}')
    if scores.ndim != 2 or scores.shape != agrees.shape or len(scores) != len(exits) or not scores.shape[1]:
        raise ConfigError(f'scores {scores.shape} and agrees {agrees.shape} must be [{len(exits)} exits, positions]')
    if list(grid) != sorted(grid, reverse=True) or not len(grid):
        raise ConfigError('the grid of thresholds must fall: the safest is tested first')
    return scores, agrees, list(grid)


def _logit(scores: np.ndarray) -> np.ndarray:
    return scipy.special.logit(np.clip(np.asarray(scores, float), 1e-6, 1 - 1e-6))
