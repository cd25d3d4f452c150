"""Recorded routing, and what predictors said of it: what the simulator and the recall table are fed with.

ids [T, L, W]: the experts each MoE layer wanted at each token; W = experts_per_token, or rows x experts_per_token.
made [T, L + 1, leads, N]: predictions, best first, -1 for none. made[t, a, i] is about layer a + i; it was made once
layer a - 1 had routed (after its attention), with a = 0 as the token began. So i + 1 is the lead.

On disk, one .npz: `ids`, `num_experts`, and by predictor `predictions/<name>` [T, L, leads, N], the same without a = 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backbone.errors import DataError

NONE = -1


def check(ids: np.ndarray, num_experts: int) -> None:
    """Errors: DataError for ids that are no trace of that many experts."""
    if ids.ndim != 3 or not ids.size or ids.dtype.kind not in 'iu':
        raise DataError(f'routing trace: ids must be integers [tokens, layers, experts], got {ids.dtype} {ids.shape}')
    if ids.min() < 0 or ids.max() >= num_experts:
        raise DataError(f'routing trace: ids must be in 0..{num_experts - 1}, got {ids.min()}..{ids.max()}')


def save(path: str | Path, ids: np.ndarray, num_experts: int, predictions: dict[str, np.ndarray]) -> None:
    """predictions: by name, [T, L, leads, N]."""
    check(np.asarray(ids), num_experts)
    np.savez_compressed(path, ids=ids, num_experts=num_experts,
                        **{f'predictions/{name}': array for name, array in predictions.items()})


def load(path: str | Path) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
    """(ids, num_experts, made by name). Errors: DataError."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        ids, num_experts = arrays['ids'], int(arrays['num_experts'])
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f'routing trace {path}: {e}') from e
    check(ids, num_experts)
    return ids, num_experts, {name.partition('/')[2]: recorded(ids, array)
                              for name, array in arrays.items() if name.startswith('predictions/')}


# --- predictors -------------------------------------------------------------------------------------------------


def recorded(ids: np.ndarray, predictions: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """`made` of an array [T, L, leads, N]. start [T, leads, N]: what was known as the token began (default: nothing).
    Errors: DataError if it does not fit the trace."""
    if predictions.ndim != 4 or predictions.shape[:2] != ids.shape[:2]:
        raise DataError(f'predictions must be [{ids.shape[0]}, {ids.shape[1]}, leads, count], got {predictions.shape}')
    if start is None:
        start = np.full_like(predictions[:, 0], NONE)
    made = np.concatenate([start[:, None], predictions], 1)
    return _within(made)


def oracle(ids: np.ndarray, leads: int = 1, start: bool = False) -> np.ndarray:
    """The truth. start: known as the token begins too, for the first layers; else these are unpredicted."""
    return _known(ids, leads) if start else _without_start(_known(ids, leads))


def random(ids: np.ndarray, num_experts: int, count: int, leads: int = 1, seed: int = 0) -> np.ndarray:
    """`count` different experts, any."""
    tokens, layers = ids.shape[:2]
    noise = np.random.default_rng(seed).random((tokens, layers + 1, leads, num_experts))
    return _within(noise.argsort(-1)[..., :count])


def previous(ids: np.ndarray, num_experts: int, count: int, leads: int = 1) -> np.ndarray:
    """What the layer wanted last: the previous token's experts in their order, then those of the tokens before."""
    last = np.full((ids.shape[1], num_experts), -1.0)
    rank = np.linspace(1, 0, ids.shape[2], endpoint=False)

    def see(chosen):
        np.put_along_axis(last, chosen[:, ::-1], last.max() + 2 + rank[None, ::-1], 1)
    return _known(_running(ids, lambda: last, see, count), leads)


def frequency(ids: np.ndarray, num_experts: int, count: int, leads: int = 1) -> np.ndarray:
    """What the layer has wanted most often so far."""
    seen = np.zeros((ids.shape[1], num_experts))

    def see(chosen):
        np.add.at(seen, (np.arange(len(chosen))[:, None], chosen), 1)
    return _known(_running(ids, lambda: np.where(seen, seen, -1), see, count), leads)


def noisy(ids: np.ndarray, num_experts: int, count: int, recall: float, leads: int = 1, seed: int = 0) -> np.ndarray:
    """A made-up predictor of about this recall within `count`, whatever the lead; nothing as the token begins. Each
    true expert is among its guesses with probability `recall`, the rest are others."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros((*ids.shape[:2], num_experts))
    np.put_along_axis(chosen, ids, 1, 2)
    truth = _known(chosen, leads)
    found = (truth == 1) & (rng.random(truth.shape) < recall)
    order = np.where(found, 2.0, np.where(truth == 1, -2.0, 0.0)) + rng.random(truth.shape)
    return _without_start(_within(np.argsort(-order, -1)[..., :count]))


def synthetic(tokens: int, layers: int, num_experts: int, experts_per_token: int, stay: float = 0.3, skew: float = 0.5,
              seed: int = 0) -> np.ndarray:
    """A made-up trace, no model's: each expert of a token stays for the next with probability `stay`; the others are
    drawn without repeats with weights 1 / rank^skew, another order in each layer."""
    rng = np.random.default_rng(seed)
    weights = np.argsort(rng.random((layers, num_experts)), 1)
    log_weights = -skew * np.log1p(weights)
    ids = np.zeros((tokens, layers, experts_per_token), int)
    for t in range(tokens):
        score = log_weights + rng.gumbel(size=log_weights.shape)
        if t:
            kept = rng.random(ids[t].shape) < stay
            np.put_along_axis(score, ids[t - 1], np.where(kept, np.inf, np.take_along_axis(score, ids[t - 1], 1)), 1)
        ids[t] = np.argsort(-score, 1, kind='stable')[:, :experts_per_token]
    return ids


def _running(ids, state, see, count):
    """[T, L, count]: the best by state() [L, E] (negative: never seen) before each token, ties to the lower id."""
    guesses = np.full((*ids.shape[:2], count), NONE)
    for t, chosen in enumerate(ids):
        order = np.argsort(-state(), 1, kind='stable')[:, :count]
        guesses[t] = np.where(np.take_along_axis(state(), order, 1) < 0, NONE, order)
        see(chosen)
    return guesses


def _known(by_layer, leads):
    """[T, L, N] known for every layer as the token begins -> made."""
    layers = by_layer.shape[1]
    at = np.arange(layers + 1)[:, None] + np.arange(leads)
    return _within(by_layer[:, np.minimum(at, layers - 1)])


def _within(made):
    """Nothing about layers past the last one."""
    beyond = np.arange(made.shape[1])[:, None] + np.arange(made.shape[2]) >= made.shape[1] - 1
    return np.where(beyond[None, :, :, None], NONE, made)


def _without_start(made):
    made = made.copy()
    made[:, 0] = NONE
    return made
