"""How many of the experts a layer wanted had been predicted, by how far ahead.

Not a hit rate: foretelling what is resident anyway buys nothing (m2r2/expert_sim.py counts what it buys).
"""

from __future__ import annotations

import numpy as np


def recall(ids: np.ndarray, made: np.ndarray, budget: int) -> np.ndarray:
    """[leads]: share of the wanted experts among the first `budget` predictions, where any was made; nan where none.

    ids [T, L, W], made [T, L + 1, leads, N] as in m2r2/expert_traces.py. What was known as the token began does not
    count: entry i is over predictions made after some layer routed, for the layer i + 1 further on.
    """
    layers, found = ids.shape[1], []
    for i in range(made.shape[2]):
        guesses = made[:, 1:layers - i, i, :budget]
        wanted = ids[:, 1 + i:]
        hit = (wanted[..., None] == guesses[..., None, :]).any(-1)
        there = (guesses >= 0).any(-1)
        found.append(hit[there].mean() if there.any() else np.nan)
    return np.array(found)


def table(ids: np.ndarray, made: dict[str, np.ndarray], budgets: tuple[int, ...]) -> dict[str, np.ndarray]:
    """By predictor, [budgets, leads]."""
    return {name: np.stack([recall(ids, array, budget) for budget in budgets]) for name, array in made.items()}
