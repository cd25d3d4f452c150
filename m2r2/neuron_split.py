"""Which neurons of a dense MLP make an expert, and what the router starts as: from the weights and from a text.

Neurons that work together are put together, into experts of one size: k-means with equal groups, on the gate's columns
or on which neurons are active at which tokens. The most used neurons may stay outside, as an expert every token passes.
A router is then the least-squares map from what the layer reads to how much each expert would say. After Zhang et al.,
2022, "MoEfication" (arXiv 2110.01786), which does it for ReLU models; the choices here are our own. NumPy, a layer at a
time; the same seed gives the same split on one machine, and what was chosen is kept in a file (upcycle.py).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from backbone.config import MlpConfig, ModelConfig, MoeConfig
from backbone.errors import ConfigError
from backbone.layers import norm
from backbone.mlp import glu
from backbone.model import embed, run_layers, sequence_context

BY = ('activity', 'weights')


def balanced_kmeans(features: np.ndarray, groups: int, seed: int, iterations: int = 8) -> np.ndarray:
    """features [N, D] -> the group of each [N], every group exactly N / groups large.

    Each round is the best assignment there is to the means of the round before (Malinen and Franti, 2014).
    Errors: ConfigError where the groups do not come out even.
    """
    count = len(features)
    if groups < 1 or count % groups:
        raise ConfigError(f'{count} neurons do not make {groups} experts of one size')
    room, rng = count // groups, np.random.default_rng(seed)
    features = np.asarray(features, np.float64)
    means = _spread_out(features, groups, rng)
    chosen = None
    for _ in range(iterations):
        cost = (means**2).sum(1) - 2 * features @ means.T  # |x|^2 is the same for every mean
        _, seats = linear_sum_assignment(np.repeat(cost, room, axis=1))
        found = seats // room
        if chosen is not None and (found == chosen).all():
            break
        chosen = found
        means = np.stack([features[chosen == group].mean(0) for group in range(groups)])
    return chosen


def _spread_out(features: np.ndarray, groups: int, rng: np.random.Generator) -> np.ndarray:
    """First means: drawn in proportion to the squared distance from those there are (k-means++)."""
    means = [features[rng.integers(len(features))]]
    while len(means) < groups:
        far = np.min([((features - mean) ** 2).sum(1) for mean in means], axis=0)
        share = far / far.sum() if far.sum() > 0 else None
        means.append(features[rng.choice(len(features), p=share)])
    return np.stack(means)


def order_neurons(features: np.ndarray, use: np.ndarray, moe: MoeConfig, seed: int) -> np.ndarray:
    """Neurons in the order upcycle.convert takes them [F]: the shared ones, then expert by expert.

    features [F, D]: what makes neurons alike. use [F]: how much each says; the most used are shared.
    """
    shared = np.sort(np.argsort(-use, kind='stable')[:moe.shared_size])
    rest = np.setdiff1d(np.arange(len(use)), shared)
    group = balanced_kmeans(features[rest], moe.num_experts, seed)
    return np.concatenate([shared, rest[np.argsort(group, kind='stable')]]).astype(np.int32)


def neurons(cfg: MlpConfig, mlp: dict, x: np.ndarray) -> np.ndarray:
    """x [N, d] -> what each neuron says [N, F], before its row of `down`. mlp: one layer's."""
    return np.asarray(glu(cfg, x @ mlp['gate']['kernel'], x @ mlp['up']['kernel']))


def features_of(by: str, mlp: dict, said: np.ndarray, seed: int, tokens: int = 1024) -> np.ndarray:
    """[F, D]: what makes neurons alike. 'weights': the direction of its gate column. 'activity': at which tokens it is
    more active than it mostly is. said [N, F]: of `neurons`."""
    if by == 'weights':
        columns = np.asarray(mlp['gate']['kernel'], np.float64).T
        return columns / np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1e-12)
    some = np.random.default_rng(seed).permutation(len(said))[:tokens]
    strength = np.abs(said[some]).T.astype(np.float64)
    strength -= strength.mean(1, keepdims=True)
    return strength / np.maximum(np.linalg.norm(strength, axis=1, keepdims=True), 1e-12)


def says(moe: MoeConfig, mlp: dict, said: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[N, E]: the length of what each expert would add at each token."""
    down = np.asarray(mlp['down']['kernel'])
    groups = order[moe.shared_size:].reshape(moe.num_experts, -1)
    return np.stack([np.linalg.norm(said[:, group] @ down[group], axis=1) for group in groups], axis=1)


def fit_router(x: np.ndarray, score: np.ndarray, spread: float, ridge: float = 1e-2) -> np.ndarray:
    """[d, E]: the ridge regression of what sets the experts apart, score [N, E] less its mean, on x [N, d].

    Its logits are then scaled to vary by `spread` (standard deviation) over experts: a softmax knows no scale of score.
    """
    x, score = np.asarray(x, np.float64), np.asarray(score, np.float64)
    score = score / np.maximum(score.mean(1, keepdims=True), 1e-12)
    score = score - score.mean(1, keepdims=True)
    gram = x.T @ x
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram, x.T @ score)
    return (kernel * spread / max((x @ kernel).std(), 1e-12)).astype(np.float32)


def mlp_inputs(cfg: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """What each layer's MLP reads on whole sequences [B, S] -> [L, B * S, d]. params: the base of a pre-norm model."""

    @jax.jit
    def run(params: dict, row: Any) -> Any:
        ctx = sequence_context(cfg, row.shape)
        taps = tuple(f'{kind}:{l}' for l in range(cfg.num_layers) for kind in ('hidden', 'mixer'))
        _, _, seen = run_layers(cfg, params, embed(cfg, params, row, ctx.positions), None, ctx, taps=taps)
        before = [seen[f'hidden:{l}'] + seen[f'mixer:{l}'] for l in range(cfg.num_layers)]
        scale = jax.tree.map(lambda a: [a[l] for l in range(cfg.num_layers)], params['layers']['mlp_norm'])
        return [norm(cfg, {name: values[l] for name, values in scale.items()}, x)[0]
                for l, x in enumerate(before)]

    rows = [jax.tree.map(np.asarray, run(params, row[None])) for row in np.asarray(tokens)]
    return np.stack([np.concatenate([row[l] for row in rows]) for l in range(cfg.num_layers)])
