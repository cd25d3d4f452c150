"""What a set of skipped sublayers is worth: the tokens a second that the target decodes with it as its draft.

    tau = E / (n_d c_d(x) + c_v(n_d + 1))

E tokens a round, n_d drafts, c_d the cost of one draft step without the set x, c_v that of verifying. The objective is
that of RAD (Hoshino et al., 2025, arXiv 2505.22135, through a second hand); the model of it is ours. It has two forms:
`measured_tau`, decoding by the clock, and `model_tau`, from counted acceptance and costs that are measured once.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.model import embed, finish, sequence_context, unembed
from rad.acceptance import Continuation, tokens_a_round
from rad.skip import SkipConfig, run_skipping

Array = jax.Array


def expected_tokens(a: float, block: int) -> float:
    """Tokens a round, the target's own included, where each draft is kept with probability a: (1-a^(K+1))/(1-a)."""
    return float(block + 1) if a == 1 else (1 - a ** (block + 1)) / (1 - a)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a layer's attention, its MLP, and the head in a draft step; verify[s-1]: of the target's pass over s tokens.

    In any one unit of time. source: where they come from, 'weights' for what is no measurement.
    """

    attention: float
    mlp: float
    head: float
    verify: tuple[float, ...]
    source: str

    @classmethod
    def of_weights(cls, cfg: ModelConfig, block: int) -> Costs:
        """Scalars of the matrices that are read, over those of the whole model: a plain step costs 1, and so does any
        verification. What memory alone would make of it; no launch, no cache, no arithmetic."""
        att, width = cfg.attention, cfg.embed_size or cfg.hidden_size
        attention = cfg.hidden_size * att.head_dim * (2 * att.num_heads + 2 * att.num_kv_heads)
        mlp, head = cfg.feed_scalars(), width * cfg.vocab_size
        whole = cfg.num_layers * (attention + mlp) + head
        return cls(attention / whole, mlp / whole, head / whole, (1.0,) * (block + 1), 'weights')

    @classmethod
    def of_times(cls, num_layers: int, whole: float, no_attention: float, bare: float,
                 verify: Sequence[float]) -> Costs:
        """From the times of three draft steps: with nothing left out, without attention, and with neither; and of
        passes over 1, 2, .. tokens. Errors: ConfigError where leaving out costs time: the clock was disturbed."""
        if not whole > no_attention > bare > 0:
            raise ConfigError(f'costs: {whole:.3g} s whole, {no_attention:.3g} s without attention, {bare:.3g} s bare '
                              'do not fall: measure again on a quiet machine')
        attention, mlp = (whole - no_attention) / num_layers, (no_attention - bare) / num_layers
        return cls(attention, mlp, bare, tuple(verify), 'timed')

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Costs:
        return cls(**{**fields, 'verify': tuple(fields['verify'])})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def draft(self, num_layers: int, skip: SkipConfig) -> float:
        """c_d: one draft step."""
        return (self.attention * (num_layers - len(skip.attention)) + self.mlp * (num_layers - len(skip.mlp))
                + self.head)


def model_tau(costs: Costs, num_layers: int, skip: SkipConfig, counts: Sequence[int], block: int) -> float:
    """Tokens a unit of time, with drafts of `block` tokens. counts: starts by drafts kept, of drafts at least as long.

    Errors: ConfigError where the costs say nothing of verifying so many.
    """
    if not 1 <= block < min(len(counts), len(costs.verify)):
        raise ConfigError(f'model tau: block {block} with acceptance of drafts up to {len(counts) - 1} tokens and '
                          f'costs of verifying up to {len(costs.verify) - 1}')
    return tokens_a_round(counts, block) / (block * costs.draft(num_layers, skip) + costs.verify[block])


def best_tau(costs: Costs, num_layers: int, skip: SkipConfig, counts: Sequence[int]) -> tuple[float, int]:
    """(tau, block) of the draft length that is fastest; the shorter one where two are."""
    found = [model_tau(costs, num_layers, skip, counts, block) for block in range(1, len(counts))]
    best = int(np.argmax(found))
    return found[best], best + 1


def measured_tau(decode: Callable[[str], tuple[int, float]], names: Sequence[str], repeats: int = 5
                 ) -> dict[str, dict[str, Any]]:
    """Tokens a second by the clock: {name: {'tau': median, 'all': [..], 'speedup': median, 'speedups': [..]}}.

    decode(name) -> (new tokens, seconds they took), of a fixed number of tokens, prefill not in it. names[0]: plain
    decoding, what a speed-up is relative to, within the same turn. Every name is decoded once for nothing (it
    compiles), then all take turns, in an order that moves on. Errors: ConfigError for less than three repeats, or where
    the number of tokens changes.
    """
    if repeats < 3:
        raise ConfigError(f'measured tau is a median of at least 3 repeats, got {repeats}')
    for name in names:
        decode(name)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    made: dict[str, int] = {}
    for turn in range(repeats):
        for name in np.roll(np.array(names, object), turn):
            tokens, seconds = decode(name)
            speeds[name].append(tokens / seconds)
            if made.setdefault(name, tokens) != tokens:
                raise ConfigError(f'measured tau: {name} made {tokens} tokens, and {made[name]} before: their number '
                                  'must be fixed')
    found = {}
    for name in names:
        ratios = [mine / plain for mine, plain in zip(speeds[name], speeds[names[0]], strict=True)]
        found[name] = {'tau': statistics.median(speeds[name]), 'all': speeds[name],
                       'speedup': statistics.median(ratios), 'speedups': ratios}
    return found


def output_kl(cfg: ModelConfig, base: dict, cont: Continuation, skip: SkipConfig | Mapping[str, Array]) -> Array:
    """Mean KL(target || target without `skip`) in nats over the continuation's tokens, both run on the text alone.

    What a layer changes at the output, without drafting: the measure of selections by KL.
    """
    ctx = sequence_context(cfg, cont.tokens.shape)
    x = embed(cfg, base, cont.tokens, ctx.positions)
    run = lambda skip: run_skipping(cfg, base, x, None, ctx, skip)[0]
    at = (cont.starts(1) - 1)[..., None]  # what the continuation's tokens were chosen from
    logits = lambda y: unembed(cfg, base, finish(cfg, base, jnp.take_along_axis(y, at, axis=1)))
    p, q = (jax.nn.log_softmax(logits(run(s)), axis=-1) for s in (SkipConfig(), skip))
    return (jnp.exp(p) * (p - q)).sum(-1).mean()
