"""How well scores are foretold: all of it beside the mean vector of a data set, which foretells without looking.

A high rank correlation can be structure that every input shares; what a predictor is worth is what it adds to that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsity.predictor import unit_range
from sparsity.select import best

Array = jax.Array


def ranks(x: Array) -> Array:
    """[..., n] -> places 0..n-1 along the last axis; equal values share the mean of theirs."""
    def row(x: Array) -> Array:
        ordered = jnp.sort(x)
        return (jnp.searchsorted(ordered, x) + jnp.searchsorted(ordered, x, side='right') - 1) / 2
    return jax.vmap(row)(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def spearman(a: Array, b: Array) -> Array:
    """[..., n], [..., n] -> [...] in -1..1; 0 where one of them is all the same."""
    a, b = (ranks(x) - (x.shape[-1] - 1) / 2 for x in (a, b))
    length = jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return jnp.where(length > 0, (a * b).sum(-1) / jnp.where(length > 0, length, 1), 0)


def recall(truth: Array, guess: Array, k: int) -> Array:
    """[..., n] -> [...]: the share of the k best of `truth` that are among the k best of `guess`."""
    return (best(truth, k) & best(guess, k)).sum(-1) / k


def mass(truth: Array, guess: Array, k: int) -> Array:
    """[..., n] -> [...]: what the k best of `guess` hold of all of `truth` (at least 0), 1 where there is none. Nothing
    holds more than the k best of `truth` itself."""
    total = truth.sum(-1)
    held = jnp.where(best(guess, k), truth, 0).sum(-1)
    return jnp.where(total > 0, held / jnp.where(total > 0, total, 1), 1)


def of_part(truth: Array, guess: Array, k: int) -> dict[str, Array]:
    """truth, guess [N, L, n] -> by name [N]: means over layers of rho (Spearman) and of recall and mass of the k best;
    rho_flat: over the units of all layers at once, as the paper has it, each layer brought to 0..1 first."""
    flat = lambda a: unit_range(a).reshape(*a.shape[:-2], -1)
    by_layer = {'rho': spearman(truth, guess), 'recall': recall(truth, guess, k), 'mass': mass(truth, guess, k)}
    return {name: a.mean(-1) for name, a in by_layer.items()} | {'rho_flat': spearman(flat(truth), flat(guess))}
