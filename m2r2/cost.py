"""What self-speculation should bring, from how often a draft is kept and what a round reads. To hold against clocks.

    tokens a round  T = 1 + alpha + ... + alpha^g
    cost of a round = (1 - w) ((g + 1) b (1 + c) + 1 - b) + g w_d + w      in plain steps, where only bytes count

alpha: chance that a draft is kept given those before it. b = k/L. c: what the fast stream adds to an early layer. w: of
the unembedding in the model, w_d: of the words that are drafted from. Verifying g + 1 tokens at once is taken to cost
one step; `wide` says by how much more it really does.
"""

from __future__ import annotations

import dataclasses

from backbone.config import ModelConfig
from m2r2.config import M2R2Config


@dataclasses.dataclass(frozen=True)
class Shares:
    """b, c, w, w_d of the formula above, by parameters read."""

    early: float
    fast: float
    head: float
    draft_head: float


def shares(cfg: ModelConfig, m: M2R2Config) -> Shares:
    """Of the first exit. Both streams share each product of a layer, so none of its own weights is read twice."""
    att, d = cfg.attention, cfg.hidden_size
    heads, kv = att.num_heads * att.head_dim, att.num_kv_heads * att.head_dim
    layer = d * (2 * heads + 2 * kv) + cfg.feed_scalars()
    head = d * cfg.vocab_size
    whole = cfg.num_layers * layer + head
    k = m.exits[0]
    extra = 2 * d * m.rank + 2 * m.qo_rank * (d + heads) + (4 * d * m.carry / k if m.carry else 0)
    return Shares(k / cfg.num_layers, extra / layer if m.stream == 'fast' else 0.0, head / whole, d * m.words / whole)


def tokens_per_round(alpha: float, block: int) -> float:
    """T: kept drafts and the bonus."""
    return sum(alpha ** i for i in range(block + 1))


def round_cost(s: Shares, block: int, wide: float = 1.0) -> float:
    """In plain steps of one token. wide: time of verifying block + 1 tokens over that of one."""
    body = (1 - s.head) * ((block + 1) * s.early * (1 + s.fast) + (1 - s.early) * wide)
    return body + block * s.draft_head + s.head * wide


def speed_up(alpha: float, s: Shares, block: int, wide: float = 1.0) -> float:
    return tokens_per_round(alpha, block) / round_cost(s, block, wide)


def alpha_of(kept: float, block: int) -> float:
    """The constant alpha at which a round of `block` drafts keeps `kept` of them on average. By bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_round(middle, block) - 1 < kept else (low, middle)
    return low
