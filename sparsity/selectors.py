"""Who says what matters: one small protocol, and everything that is compared under it.

A selector gives scores from what is known at the token, and at no later one. Its parameters are params['sparsity'].
The methods that decide by a threshold on values, while a layer runs, are in sparsity/thresholds.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from backbone.config import ModelConfig
from sparsity.config import PARTS, SparsityConfig
from sparsity.select import Scores

Array = jax.Array


@struct.dataclass
class Seen:
    """What is known at the token that is run, B rows.

    context [B, H*hd]: of the first layer's attention, before its output projection, of this token. pos [B]: its slot.
    prompt: {'heads': [B, L, H'], 'neurons': [B, L, NB]}, see Griffin; {} where nobody asked for it.
    """

    context: Array
    pos: Array
    prompt: dict[str, Array] = struct.field(default_factory=dict)


class Selector(Protocol):
    """Frozen and hashable: it is part of a Target."""

    reads_prompt: bool  # whether the prompt's pass has to gather Seen.prompt

    def scores(self, params: Any, seen: Seen) -> Scores:
        """{'heads': [B, L, H'], 'neurons': [B, L, NB]}, higher = keep."""

    def size(self, params: Any) -> int:
        """Bytes of parameters that one call of `scores` reads."""


@dataclasses.dataclass(frozen=True)
class _Selector:
    cfg: ModelConfig
    s: SparsityConfig
    reads_prompt = False

    def size(self, params: Any) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Predictor(_Selector):
    """One small network for all layers, on the first layer's context (Akhauri et al., 2024). p: PredictorConfig."""

    p: Any = None

    def scores(self, params: Any, seen: Seen) -> Scores:
        from sparsity.predictor import predict

        return predict(self.cfg, self.p, params['sparsity'], seen.context)

    def size(self, params: Any) -> int:
        counts = {'heads': self.s.head_counts, 'neurons': self.s.counts}
        asked = [part for part in PARTS if getattr(self.s, part) < 1 or counts[part]]  # a whole part asks nothing
        mine = [params['sparsity'][part] for part in asked]
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(mine))


@dataclasses.dataclass(frozen=True)
class Static(_Selector):
    """The same for every input: params['sparsity']['mean'], {'heads': [L, H'], 'neurons': [L, NB]}, of a data set."""

    def scores(self, params: Any, seen: Seen) -> Scores:
        rows = seen.pos.shape[0]
        return {part: jnp.broadcast_to(a, (rows, *a.shape)) for part, a in params['sparsity']['mean'].items()}


@dataclasses.dataclass(frozen=True)
class Griffin(_Selector):
    """Neurons by their part of the prompt: the L2 norm over its tokens t of |h_t| / ||h_t|| (Dong et al., 2024, arXiv
    2404.01365). Heads in the same manner, by the norm of their context: ours. A block's or group's is the sum."""

    reads_prompt = True

    def scores(self, params: Any, seen: Seen) -> Scores:
        return seen.prompt


@dataclasses.dataclass(frozen=True)
class Oracle(_Selector):
    """Recorded scores by slot: params['recorded'], {'heads': [B, C, L, H'], 'neurons': [B, C, L, NB]}."""

    def scores(self, params: Any, seen: Seen) -> Scores:
        def at(a: Array) -> Array:
            slot = jnp.minimum(seen.pos, a.shape[1] - 1)
            return jax.vmap(lambda rows, i: rows[i])(a, slot)
        return jax.tree.map(at, params['recorded'])


@dataclasses.dataclass(frozen=True)
class Random(_Selector):
    """By chance, from (seed, slot): rows at the same slot get the same."""

    seed: int = 0

    def scores(self, params: Any, seen: Seen) -> Scores:
        def one(pos: Array) -> Scores:
            key = jax.random.fold_in(jax.random.key(self.seed), pos)
            sizes = self.s.sizes(self.cfg)
            return {part: jax.random.uniform(jax.random.fold_in(key, i), (self.cfg.num_layers, n))
                    for i, (part, n) in enumerate(sizes.items())}
        return jax.vmap(one)(seen.pos)
