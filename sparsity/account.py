"""What was read: one account for everything that decides what not to read, in bytes a step.

A step is one token for every row of the batch. Each matrix counts by the share of it that the step needed for any row,
the cache by the slots that were looked at, the head and the selector's parameters in full. It is the account of what a
method asks for: the masked path reads everything all the same, and vectors (norms, biases) are left out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone.config import ModelConfig

Array = jax.Array
MATRICES = ('q', 'kv', 'o', 'gate', 'up', 'down')


@struct.dataclass
class Reads:
    """Sums over steps. share: by matrix [L], of 0..1. slots [L]: cached positions looked at, times the share of the
    heads; whole []: the same of all heads. steps, choices []: single-token steps, and calls of the selector, which
    reads `selector` bytes each time."""

    share: dict[str, Array]
    slots: Array
    whole: Array
    steps: Array
    choices: Array
    selector: Array


def nothing(cfg: ModelConfig) -> Reads:
    layers = lambda: jnp.zeros((cfg.num_layers,))
    return Reads({name: layers() for name in MATRICES}, layers(), jnp.zeros(()), jnp.zeros((), jnp.int32),
                 jnp.zeros((), jnp.int32), jnp.zeros(()))


def add(reads: Reads, share: dict[str, Array], groups: Array, pos: Array, chosen: Array, selector: int) -> Reads:
    """One more step. share: by matrix [L], missing ones are whole. groups [L]: share of the cache's heads that is read.
    pos [B]: slots of the tokens. chosen: whether the selector was called."""
    seen = (pos + 1).sum().astype(jnp.float32)
    return Reads({name: a + share.get(name, 1.0) for name, a in reads.share.items()}, reads.slots + groups * seen,
                 reads.whole + seen, reads.steps + 1, reads.choices + chosen, jnp.float32(selector))


def scalars(cfg: ModelConfig) -> dict[str, int]:
    """Numbers in each matrix of one layer."""
    att, d, f = cfg.attention, cfg.hidden_size, cfg.mlp.intermediate_size
    q = att.num_heads * att.head_dim * d
    return {'q': q, 'kv': 2 * att.num_kv_heads * att.head_dim * d, 'o': q, 'gate': f * d if cfg.mlp.gated else 0,
            'up': f * d, 'down': f * d}


def statistics(cfg: ModelConfig, reads: Reads, weights: int = 4, cache: int = 4) -> dict[str, Any]:
    """Bytes a step, of a finished call. weights, cache: bytes of a stored number.

    weights, kv, selector, head: what was needed. bytes: their sum; dense: the same of the whole model; share: their
    ratio. by_matrix: the share of each matrix needed, over all layers, dense ones included.
    """
    steps, sizes = max(int(reads.steps), 1), scalars(cfg)
    layers, att = cfg.num_layers, cfg.attention
    share = {name: float(np.asarray(reads.share[name]).sum()) / steps / layers for name in MATRICES}
    a_slot = 2 * att.num_kv_heads * att.head_dim * cache
    head = cfg.vocab_size * (cfg.embed_size or cfg.hidden_size) * weights
    read = {'weights': sum(share[name] * sizes[name] for name in MATRICES) * layers * weights,
            'kv': float(np.asarray(reads.slots).sum()) / steps * a_slot,
            'selector': float(reads.selector) * int(reads.choices) / steps, 'head': float(head)}
    dense = sum(sizes.values()) * layers * weights + float(reads.whole) / steps * layers * a_slot + head
    total = sum(read.values())
    return {'steps': int(reads.steps), 'choices': int(reads.choices), **read, 'bytes': total, 'dense': dense,
            'share': total / dense, 'by_matrix': share}
