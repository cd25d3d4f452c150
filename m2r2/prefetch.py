"""Predictors of the experts that later layers will choose: the fast stream read by their own routers, and its controls.

After the attention of layer l two states stand for what a later layer m will read: the slow residual u_l, and the fast
stream p, which was restarted from h every `interval` layers and has run layer l without experts (m2r2/streams.py).

    next_router  router_m(n_m(u_l))                      untrained: residuals change slowly
    fast         router_m(n_m(p))                        p's accelerators trained, routers frozen
    adapter      router_m(n_m(u_l + Acc_l(n_m(u_l))))    trained, as many parameters, no attention of its own

`lead` = m - l is how many layers are left to load in. What layer m reads includes its own attention, which none of
these has seen; so what is learnt is what the routers say (prefetch_task.py), not the residual. Predictions only move
bytes.

FastStream and StateAdapter serve the runtimes (expert_guess.py), `observe` and `scores` whole sequences. Our reading of
Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not public in full.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import moe
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, attend, norm, out, qkv
from backbone.model import embed, run_layers
from m2r2 import expert_guess, streams
from m2r2.config import M2R2Config

Array = jax.Array
TRAINED = ('fast', 'adapter')
PREDICTORS = (*TRAINED, 'next_router', 'previous', 'frequency', 'oracle', 'random')


@dataclasses.dataclass(frozen=True)
class PrefetchConfig:
    """interval: layers from one restart of the fast stream to the next. rank, activation: of its accelerators.

    Which layers are foretold: after step i of an interval that starts at s, p should be where the slow stream is `rate`
    times as far on, so layers s + rate (i - 1) + 1 .. s + rate i (from 1) and `further` more, of those still to come.
    reach: in the place of that rule, the next so many layers at every step; 0: the rule.
    """

    interval: int = 4
    rate: int = 2
    further: int = 1
    reach: int = 0
    rank: int = 16
    activation: str = 'silu'

    def __post_init__(self):
        if min(self.interval, self.rate, self.rank) < 1 or min(self.further, self.reach) < 0:
            raise ConfigError('prefetch needs interval, rate and rank of at least 1, further and reach of at least 0')

    def targets(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Layers (from 0) foretold after the attention of `layer`."""
        if self.reach:
            first, last = layer + 1, layer + self.reach
        else:
            start = layer - layer % self.interval
            step = layer - start + 1
            first, last = start + self.rate * (step - 1), start + self.rate * step - 1 + self.further
        return tuple(range(max(first, layer + 1), min(last, num_layers - 1) + 1))

    def leads(self, num_layers: int) -> dict[int, tuple[int, ...]]:
        """By lead: the layers after whose attention the layer so far ahead is foretold."""
        found: dict[int, list[int]] = {}
        for layer in range(num_layers - 1):
            for target in self.targets(layer, num_layers):
                found.setdefault(target - layer, []).append(layer)
        return {lead: tuple(found[lead]) for lead in sorted(found)}

    def m2r2(self, cfg: ModelConfig) -> M2R2Config:
        """The fast stream's own config: an interval ends where the next begins, the last one before the last layer.
        Errors: ConfigError for a model without experts, or of one layer."""
        if cfg.moe is None or cfg.num_layers < 2:
            raise ConfigError('prefetch needs a model with experts and at least two layers')
        last = cfg.num_layers - 1
        ends = (*range(self.interval, last, self.interval), last)
        return M2R2Config.of(cfg, {'exits': ends, 'rank': self.rank, 'activation': self.activation, 'ffn': False})


def init_params(shape: PrefetchConfig, cfg: ModelConfig, rng: Array) -> dict:
    """{'fast', 'state'}: accelerators of layers 0..L-2, {'adapter': {'a', 'b'}} each; they add nothing yet."""
    keys = jax.random.split(rng)
    make = functools.partial(streams.init_params, shape.m2r2(cfg), cfg)
    return {'fast': make(keys[0])['layers'], 'state': make(keys[1])['layers']}


# --- for the runtimes -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FastStream(expert_guess.Predictor):
    """params['prefetch']: of init_params. `lead` is not used: `shape` says what is foretold."""

    shape: PrefetchConfig = PrefetchConfig()

    def targets(self, layer: int, num_layers: int) -> tuple[int, ...]:
        return self.shape.targets(layer, num_layers)

    def restarts(self, layer: int) -> bool:
        return layer % self.shape.interval == 0

    def layer_params(self, mine: Any, layer: int) -> Any:
        return at_layer(mine['fast'], layer)

    def begin(self, mine: Any, slow: Array) -> Array:
        return slow

    def beside(self, cfg: ModelConfig, p: dict, mine: Any, stream: Array, keys: Array, values: Array,
               ctx: Context) -> Array:
        """streams.two_streams without its slow half."""
        q, _, _ = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], stream), ctx)
        stream = stream + out(cfg, p['attn'], attend(q, keys, values, ctx))
        return stream + streams.adapter(self.shape, mine['adapter'], norm(cfg, p['mlp_norm'], stream))

    def scores(self, cfg: ModelConfig, target: dict, mine: Any, view: expert_guess.View) -> Array:
        return router_of(cfg, target['mlp_norm'], target['router'], view.stream)


@dataclasses.dataclass(frozen=True)
class StateAdapter(expert_guess.Predictor):
    """The control of equal size: no stream, one accelerator a layer on the slow residual."""

    shape: PrefetchConfig = PrefetchConfig()

    def targets(self, layer: int, num_layers: int) -> tuple[int, ...]:
        return self.shape.targets(layer, num_layers)

    def layer_params(self, mine: Any, layer: int) -> Any:
        return at_layer(mine['state'], layer)

    def scores(self, cfg: ModelConfig, target: dict, mine: Any, view: expert_guess.View) -> Array:
        return adapted(cfg, self.shape, target['mlp_norm'], target['router'], mine['adapter'], view.slow)


def at_layer(tree: Any, layer: int) -> Any:
    """The last layer has nothing to foretell, and no parameters: it takes its neighbour's, unread."""
    return jax.tree.map(lambda a: a[min(layer, a.shape[0] - 1)], tree)


def router_of(cfg: ModelConfig, mlp_norm: dict, router: dict, x: Array) -> Array:
    """What a layer would say to x [..., d] as the residual before its experts: logits [..., E]."""
    return moe.route(cfg.moe, router, norm(cfg, mlp_norm, x)).logits


def adapted(cfg: ModelConfig, shape: PrefetchConfig, mlp_norm: dict, router: dict, adapter: dict, x: Array) -> Array:
    return router_of(cfg, mlp_norm, router, x + streams.adapter(shape, adapter, norm(cfg, mlp_norm, x)))


# --- whole sequences --------------------------------------------------------------------------------------------------


@struct.dataclass
class Seen:
    """Of whole sequences. slow [L, B, S, d]: the residual after the attention of each layer. fast [L-1, B, S, d]: the
    fast stream after each. logits [L, B, S, E], ids [L, B, S, K]: what the routers said, the truth."""

    slow: Array
    fast: Array
    logits: Array
    ids: Array


def observe(cfg: ModelConfig, shape: PrefetchConfig, base: dict, mine: dict, tokens: Array, ctx: Context) -> Seen:
    """base: stacked by layer. mine: of init_params. The slow stream is the model's own, without gradients."""
    m, x = shape.m2r2(cfg), embed(cfg, base, tokens, ctx.positions)
    layer = functools.partial(streams.two_streams, m=m, together=False)
    slow, fast, logits = [], [], []
    for lo, hi in zip((*m.starts, m.exits[-1]), (*m.exits, cfg.num_layers), strict=True):
        names = [f'{kind}:{l}' for l in range(lo, hi) for kind in ('hidden', 'mixer', 'router')]
        last = lo == m.exits[-1]
        names += [] if last else [f'hidden:{hi}']
        options = {} if last else {'layer_fn': layer, 'extra': mine['fast']}
        y, _, seen = run_layers(cfg, base, x if last else (x, x), None, ctx, lo=lo, hi=hi, taps=tuple(names), **options)
        hidden = [seen[f'hidden:{l}'] for l in range(lo, hi if last else hi + 1)]
        before = hidden if last else [both[0] for both in hidden]
        slow += [before[i] + seen[f'mixer:{l}'] for i, l in enumerate(range(lo, hi))]
        logits += [seen[f'router:{l}'] for l in range(lo, hi)]
        fast += [] if last else [both[1] for both in hidden[1:]]
        x = None if last else y[0]
    logits = jax.lax.stop_gradient(jnp.stack(logits))
    return Seen(jax.lax.stop_gradient(jnp.stack(slow)), jnp.stack(fast), logits, moe.choose(cfg.moe, logits).ids)


def scores(cfg: ModelConfig, shape: PrefetchConfig, name: str, base: dict, mine: dict, seen: Seen, lead: int,
           layers: tuple[int, ...], rng: Array | None = None) -> Array:
    """[len(layers), B, S, E], higher is likelier: after the attention of each of `layers`, of the layer `lead` on.

    name: one of PREDICTORS. Of a token's own truth only the oracle reads anything. previous, frequency: what that layer
    chose at earlier tokens of the row, the latest first, or the most frequent. Errors: ConfigError for another name.
    """
    at, target = jnp.asarray(layers), jnp.asarray(layers) + lead
    take = lambda tree, where: jax.tree.map(lambda a: a[where], tree)
    mlp_norm, router = (take(part, target) for part in (base['layers']['mlp_norm'], base['layers']['moe']['router']))
    chosen = jax.nn.one_hot(seen.ids[target], cfg.moe.num_experts).sum(-2)
    if name in ('fast', 'next_router'):
        return jax.vmap(functools.partial(router_of, cfg))(mlp_norm, router, (
            seen.fast if name == 'fast' else seen.slow)[at])
    if name == 'adapter':
        return jax.vmap(functools.partial(adapted, cfg, shape))(mlp_norm, router, take(mine['state']['adapter'], at),
                                                                seen.slow[at])
    if name == 'previous':
        return latest(chosen)
    if name == 'frequency':
        return earlier(jnp.cumsum(chosen, axis=2))
    if name == 'oracle':
        return seen.logits[target]
    if name == 'random':
        return jax.random.uniform(jax.random.key(0) if rng is None else rng, chosen.shape)
    raise ConfigError(f'predictor: unknown {name!r}, one of {", ".join(PREDICTORS)}')


def earlier(a: Array) -> Array:
    """a [..., S, E] of the token before; zero at the first."""
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 0), (0, 0)])[..., :-1, :]


def latest(chosen: Array) -> Array:
    """chosen [n, B, S, E] of 0 and 1 -> the position at which each expert was last chosen before, from 1; 0: never."""
    position = 1.0 + jnp.arange(chosen.shape[2])[:, None]
    return earlier(jax.lax.cummax(chosen * position, axis=2))


def recall(scores: Array, ids: Array, count: int) -> Array:
    """Of the experts chosen, ids [..., K], the share among the `count` best by scores [..., E]: [...] float32."""
    guessed = jax.lax.top_k(scores, count)[1]
    return (ids[..., None] == guessed[..., None, :]).any(-1).mean(-1, dtype=jnp.float32)
