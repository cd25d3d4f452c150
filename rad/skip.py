"""The target drafts for itself with some attention sublayers left out, and verifies whole.

    h <- h + MLP(norm(h))        a layer without its attention

Which sublayers can be left out is what RAD asks first (Hoshino et al., 2025, arXiv 2505.22135, whose body could not be
read; that the MLP always runs is our reading). Leaving out MLPs too, and the threshold that ends a draft, are those of
Draft & Verify (Zhang et al., 2024, arXiv 2309.08168).

A draft reads the target's own cache. Its keys and values lie at or past `pos`, and verification overwrites them: no
draft ever reads what another draft has left. Positions come from `pos`, not from what a layer's cache holds, so all
attention may be left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import cache as caches
from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.contract import DenseLaw, Draft, Output
from backbone.errors import ConfigError
from backbone.layers import Context, attend, feed, norm, out, qkv, read_write
from backbone.model import cache_context, embed, finish, run_layers, unembed
from backbone.sampling import Sampling, draw, fold_in, law

Array = jax.Array
PARTS = ('attention', 'mlp')


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Layers whose attention, and layers whose MLP, is left out; each sorted and named once."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __post_init__(self):
        for name in PARTS:
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or (layers and layers[0] < 0):
                raise ConfigError(f'skip.{name}: layers from 0 on, sorted, each once, got {layers}')

    @classmethod
    def of(cls, cfg: ModelConfig, attention: Sequence[int] = (), mlp: Sequence[int] = ()) -> SkipConfig:
        """In any order. Errors: ConfigError names a layer the model does not have."""
        made = cls(tuple(sorted(map(int, attention))), tuple(sorted(map(int, mlp))))
        made.check(cfg)
        return made

    def check(self, cfg: ModelConfig) -> None:
        for name in PARTS:
            if beyond := [l for l in getattr(self, name) if l >= cfg.num_layers]:
                raise ConfigError(f'skip.{name}: there is no layer {beyond[0]}, the model has {cfg.num_layers}')

    def flags(self, num_layers: int) -> dict[str, np.ndarray]:
        """{'attention': bool [L], 'mlp': bool [L]}, True where it is left out: what is traced in a search."""
        return {name: np.isin(np.arange(num_layers), getattr(self, name)) for name in PARTS}

    def to_dict(self) -> dict[str, list[int]]:
        return {name: list(getattr(self, name)) for name in PARTS}


def over_cache(q: Array, k: Array, v: Array, state: Any, ctx: Context) -> tuple[Array, Any]:
    """Attention as the plain layer has it: writes the block and reads the cache, without one reads the block."""
    keys, values, state = read_write(state, k, v, ctx)
    return attend(q, keys, values, ctx), state


def skip_layer(cfg: ModelConfig, p: dict, x: Array, state: Any, ctx: Context, skip: Mapping[str, Any],
               attention: Callable = over_cache) -> tuple[Array, Any, dict]:
    """A layer function for `run_layers`. skip: {'attention': s, 'mlp': s}, what is left out.

    s may be a Python bool: then the sublayer is really not there, and neither is what it would write. Or traced: the
    work is done and its result not taken, so that one program serves every choice.
    """
    if skip['attention'] is not True:
        q, k, v = qkv(cfg, p['attn'], _before(cfg, p['attn_norm'], x), ctx)
        heads, state = attention(q, k, v, state, ctx)
        x = _unless(skip['attention'], x, _after(cfg, p['attn_norm'], x, out(cfg, p['attn'], heads)))
    if skip['mlp'] is not True:
        y, _ = feed(cfg, p, _before(cfg, p['mlp_norm'], x))
        x = _unless(skip['mlp'], x, _after(cfg, p['mlp_norm'], x, y))
    return x, state, {}


def _before(cfg: ModelConfig, p: dict, x: Array) -> Array:
    return norm(cfg, p, x) if cfg.norm_placement == 'pre' else x


def _after(cfg: ModelConfig, p: dict, x: Array, y: Array) -> Array:
    return x + y if cfg.norm_placement == 'pre' else norm(cfg, p, x + y)


def _unless(skip: Any, x: Array, changed: Array) -> Array:
    return changed if skip is False else jnp.where(skip, x, changed)


def run_skipping(cfg: ModelConfig, base: dict, x: Array, state: Any, ctx: Context,
                 skip: SkipConfig | Mapping[str, Array], attention: Callable = over_cache) -> tuple[Array, Any]:
    """All layers on the residual x, without what is skipped: a SkipConfig (static) or its `flags` (traced)."""
    layer = functools.partial(skip_layer, attention=attention)
    if not isinstance(skip, SkipConfig):
        flags = {name: jnp.asarray(skip[name]) for name in PARTS}
        x, state, _ = run_layers(cfg, base, x, state, ctx, layer_fn=layer, extra=flags)
        return x, state
    kind = lambda l: (l in skip.attention, l in skip.mlp)
    for (no_attention, no_mlp), group in itertools.groupby(range(cfg.num_layers), kind):
        numbers = list(group)
        fixed = {'attention': no_attention, 'mlp': no_mlp}
        same = lambda cfg, p, x, s, ctx, _: layer(cfg, p, x, s, ctx, fixed)
        x, state, _ = run_layers(cfg, base, x, state, ctx, numbers[0], numbers[-1] + 1, layer_fn=same)
    return x, state


@dataclasses.dataclass(frozen=True)
class ExitRule:
    """Ends a row's draft after a token that the draft gave less than gamma, and moves gamma after every verification:

        rate  <- memory * rate + (1 - memory) * kept / drafted
        goal  =  gamma + step where rate < aim, gamma where all K were drafted, else gamma - step
        gamma <- inertia * gamma + (1 - inertia) * goal

    Defaults: those of the published code of Draft & Verify for greedy decoding (it starts at 0.5 where it samples).
    """

    start: float = 0.8
    aim: float = 0.9
    step: float = 0.01
    memory: float = 0.5
    inertia: float = 0.9

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f'exit.{name} must be in 0..1, got {value}')

    def init(self, batch: int) -> dict[str, Array]:
        return {'gamma': jnp.full(batch, self.start), 'rate': jnp.zeros(batch), 'drafted': jnp.zeros(batch, jnp.int32)}

    def update(self, state: dict[str, Array], kept: Array, block: int) -> dict[str, Array]:
        """kept [B], of the last draft; -1: the row is finished, and its state stays."""
        drafted = jnp.maximum(state['drafted'], 1)
        rate = self.memory * state['rate'] + (1 - self.memory) * kept / drafted
        gamma = state['gamma']
        easier = jnp.where(state['drafted'] == block, gamma, gamma - self.step)
        goal = jnp.where(rate < self.aim, gamma + self.step, easier)
        new = {'gamma': self.inertia * gamma + (1 - self.inertia) * goal, 'rate': rate, 'drafted': state['drafted']}
        return jax.tree.map(lambda a, b: jnp.where(kept >= 0, a.astype(b.dtype), b), new, state)


@dataclasses.dataclass(frozen=True)
class SkipDrafter:
    """Drafts up to K = block tokens with the target less some sublayers, on the target's own cache.

    skip None: params['skip'] says it, as SkipConfig.flags does; one compiled loop then serves every choice.
    rule: ends drafts early; once every row has ended, no more draft steps are run. State: that of the rule, or ().
    """

    cfg: ModelConfig
    skip: SkipConfig | None
    block: int = 4
    rule: ExitRule | None = None
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        if self.block < 1:
            raise ConfigError(f'SkipDrafter needs block >= 1, got {self.block}')
        if self.skip is not None:
            self.skip.check(self.cfg)

    def init_params(self, rng: Array) -> dict:
        """params['skip']: nothing is left out."""
        del rng
        return SkipConfig().flags(self.cfg.num_layers) if self.skip is None else {}

    def init_state(self, batch: int, max_len: int) -> Any:
        del max_len
        return () if self.rule is None else self.rule.init(batch)

    def prefill(self, params: Any, state: Any, output: Output, n: Array) -> Any:
        return state

    def commit(self, params: Any, state: Any, output: Output, n: Array) -> Any:
        """What a stop token or the limit cuts off a row's last draft counts as not kept."""
        return state if self.rule is None else self.rule.update(state, n, self.block)

    def draft(self, params: Any, cache: Cache, state: Any, rng: Array,
              sampling: Sampling) -> tuple[Draft, Cache, Any]:
        cfg, base, size = self.cfg, params['base'], self.block
        batch = cache.pos.shape[0]
        skip = params['skip'] if self.skip is None else self.skip
        start = {'i': jnp.int32(0), 'layers': cache.layers, 'token': cache.pending, 'sure': jnp.ones(batch, bool),
                 'tokens': jnp.zeros((batch, size), jnp.int32), 'length': jnp.zeros(batch, jnp.int32)}
        if not sampling.greedy:
            wide = jnp.promote_types(base['embed']['tokens'].dtype, jnp.float32)
            start['probs'] = jnp.zeros((batch, size, cfg.vocab_size), wide)

        def step(s: dict) -> dict:
            i = s['i']
            ctx = cache_context(cfg, caches.ahead(cache, i), 1)
            x = embed(cfg, base, s['token'][:, None], ctx.positions)
            x, layers = run_skipping(cfg, base, x, s['layers'], ctx, skip)
            logits = unembed(cfg, base, finish(cfg, base, x))[:, 0]
            if sampling.greedy:
                token = logits.argmax(-1).astype(jnp.int32)
            else:
                probs = law(logits, sampling)
                token = draw(probs, fold_in(rng, i))
            sure = s['sure']
            if self.rule is not None:  # the token that is doubted still belongs to the draft, it is the last one
                likely = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
                sure = sure & (likely >= state['gamma'])
            new = {'i': i + 1, 'layers': layers, 'token': token, 'sure': sure,
                   'tokens': s['tokens'].at[:, i].set(token), 'length': s['length'] + s['sure']}
            return new if sampling.greedy else new | {'probs': s['probs'].at[:, i].set(probs)}

        s = jax.lax.while_loop(lambda s: (s['i'] < size) & s['sure'].any(), step, step(start))
        drafted = None
        if not sampling.greedy:
            drafted = DenseLaw(s['probs'], jnp.take_along_axis(s['probs'], s['tokens'][..., None], axis=-1)[..., 0])
        if self.rule is not None:
            state = state | {'drafted': s['length']}
        return Draft(s['tokens'], s['length'], drafted), cache.replace(layers=s['layers']), state


def build(cfg: ModelConfig, attention: Sequence[int] = (), mlp: Sequence[int] = (), block: int = 4,
          gamma: float | None = None) -> SkipDrafter:
    """From a config: layers whose sublayers are left out; gamma: where the exit threshold starts, None: no threshold.

    Errors: ConfigError.
    """
    rule = None if gamma is None else ExitRule(start=gamma)
    return SkipDrafter(cfg, SkipConfig.of(cfg, attention, mlp), block, rule)
