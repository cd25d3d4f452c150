"""How long the parts of a decode step take if nothing but bytes over a wire counts: input of m2r2/expert_sim.py."""

from __future__ import annotations

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from m2r2.expert_sim import Times


def expert_scalars(cfg: ModelConfig) -> int:
    """Weights of one expert."""
    return int(cfg.feed_scalars(1) - cfg.feed_scalars(0))


def times(cfg: ModelConfig, item_bytes: float, memory_bytes_per_s: float, link_bytes_per_s: float, *,
          experts: int | None = None, context: int = 0) -> Times:
    """Seconds of one decode step: each weight is read once from the device's memory, keys and values of `context`
    positions too, and an expert crosses the link at its full rate. No arithmetic, latency or launch is counted, so
    these are lower bounds; measured times may stand in their place.

    item_bytes: of one weight and of one key or value. experts: distinct ones a layer runs (default experts_per_token:
    one row). Errors: ConfigError for a model without experts.
    """
    if cfg.moe is None:
        raise ConfigError('expert times: model.moe is None, a model without experts')
    d, a = cfg.hidden_size, cfg.attention
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    ahead = d * (2 * q + 2 * kv) + cfg.feed_scalars(0) + 2 * kv * context
    one, second = expert_scalars(cfg), item_bytes / memory_bytes_per_s
    count = cfg.moe.experts_per_token if experts is None else experts
    return Times(ahead * second, count * one * second, one * item_bytes / link_bytes_per_s,
                 token=d * cfg.vocab_size * second)
