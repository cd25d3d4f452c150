"""A predictor that goes on learning from what it is used on: under a budget, from a seed, and so that it can be undone.

Between calls (nothing of it runs unless it is called): the tokens of a finished call are read again by the whole model,
which shows what every head and neuron really did; at tokens drawn from (seed, number of the token) the predictor takes
one step of plain gradient descent towards that. There is no gradient of a loss at decoding time, so the truth here is a
magnitude (|value| over the norm of its layer's values, as for selectors.Griffin, of one token). Ours.

`state.recall` tells drift: how much of what mattered the predictor named, before it learned from it. Whether the tokens
themselves still agree with the whole model's is the guard's to say (its checks are the same kind of shadow step).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.model import embed, run_layers, sequence_context
from backbone.sampling import uniform
from sparsity import predictor, prompt
from sparsity.config import PARTS, SparsityConfig
from sparsity.predictor import PredictorConfig
from sparsity.select import Scores, best

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """share: of the tokens that are learned from, in 0..1. budget: of them, in all. rate: of the descent. clip: largest
    norm of a gradient. reach: how far the parameters may move in all, as a share of their norm; 0: no limit."""

    share: float = 0.05
    budget: int = 1000
    rate: float = 0.01
    clip: float = 1.0
    reach: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ConfigError(f'adapt.share must be in 0..1, got {self.share}')
        for name in ('budget', 'rate', 'clip', 'reach'):
            if getattr(self, name) < 0:
                raise ConfigError(f'adapt.{name} must be at least 0, got {getattr(self, name)}')


@struct.dataclass
class Adapted:
    """params: params['sparsity'] now; start: as it was given. seen, used: tokens looked at and learned from. recall:
    {'heads', 'neurons'} -> sum over the used tokens of the share of the truly best units that were named."""

    params: Any
    start: Any
    seen: Array
    used: Array
    recall: dict[str, Array]


def begin(params: dict) -> Adapted:
    """params: params['sparsity'] of an unquantised predictor."""
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    return Adapted(copy(params), copy(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
                   {part: jnp.zeros(()) for part in PARTS})


def revert(state: Adapted) -> Adapted:
    """What was given, bit for bit; the counts go on."""
    return state.replace(params=jax.tree.map(jnp.array, state.start))


def observe(cfg: ModelConfig, s: SparsityConfig, base: dict, tokens: Array) -> tuple[Array, Scores]:
    """tokens [B, T] through the whole model: context of layer 0 [B, T, H*hd] and how strongly each unit was active,
    {'heads': [B, T, L, H'], 'neurons': [B, T, L, NB]}."""
    ctx = sequence_context(cfg, tokens.shape)
    x = embed(cfg, base, tokens, ctx.positions)
    layer = functools.partial(prompt.layer, s=s, counts=None)
    stacked = not isinstance(base['layers'], tuple)
    rows = {part: jnp.zeros((cfg.num_layers, *tokens.shape, n)) for part, n in s.sizes(cfg).items()}
    state = (None, rows) if stacked else tuple((None, {}) for _ in range(cfg.num_layers))
    _, state, found = run_layers(cfg, base, x, state, ctx, layer_fn=layer, taps=('attention:0',))
    scores = jax.tree.map(lambda a: a.transpose(1, 2, 0, 3), prompt.apart(state)[1])
    return found['attention:0'].reshape(*tokens.shape, -1), scores


def learn(cfg: ModelConfig, p: PredictorConfig, a: AdaptConfig, state: Adapted, context: Array, scores: Scores,
          valid: Array) -> Adapted:
    """One pass over N observed tokens, in order. context [N, H*hd], scores [N, L, ...]; valid [N]: those that were
    decoded (no padding). Pure: the same state and tokens give the same bits."""
    limit = a.reach * _norm(state.start)

    def loss(params: Any, x: Array, truth: Scores) -> Array:
        guess = predictor.predict(cfg, p, params, x[None])
        rng = jax.random.key(a.seed)
        return sum(predictor.loss(cfg, p, part, guess[part], truth[part][None], rng).mean() for part in PARTS)

    def step(state: Adapted, token: tuple) -> tuple[Adapted, None]:
        x, truth, counts = token
        key = jax.random.fold_in(jax.random.key(a.seed), state.seen)
        use = counts & (uniform(key, ()) < a.share) & (state.used < a.budget)
        gradient = jax.grad(loss)(state.params, x, truth)
        scale = a.rate * jnp.minimum(1, a.clip / jnp.maximum(_norm(gradient), 1e-20))
        moved = jax.tree.map(lambda w, g: w - scale * g, state.params, gradient)
        if a.reach:
            away = _norm(jax.tree.map(jnp.subtract, moved, state.start))
            back = jnp.minimum(1, limit / jnp.maximum(away, 1e-20))
            moved = jax.tree.map(lambda w, was: was + back * (w - was), moved, state.start)
        guess = predictor.predict(cfg, p, state.params, x[None])
        named = {part: _recall(guess[part][0], truth[part], p.kept(cfg, part)) for part in PARTS}
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(use, n, o), new, old)
        return state.replace(params=keep(moved, state.params), seen=state.seen + counts, used=state.used + use,
                             recall={part: state.recall[part] + use * named[part] for part in PARTS}), None

    return jax.lax.scan(step, state, (context, scores, valid))[0]


def _recall(guess: Array, truth: Array, k: int) -> Array:
    """[L, n] -> the share of the k truly best units of each layer that are among the k guessed, mean over layers."""
    return (best(guess, k) & best(truth, k)).sum(-1).mean() / k


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.square(a).sum() for a in jax.tree.leaves(tree)))
