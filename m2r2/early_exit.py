"""Dynamic compute: a token leaves the model at the first exit whose gate trusts the fast stream there.

    for each stretch of layers:  run it on h, and the fast stream p beside it;  if gate(p) >= threshold: head(norm(p))

An approximation of the base, with the exact one as its `reference`. Our reading of Bhendawade et al., 2025 (arXiv
2502.02040), whose text is not public in full. The same code is its baselines:

  CALM-like        stream 'none', gate 'margin', kv_fill 'copy_h'       (Schuster et al., 2022, arXiv 2207.07061)
  DEED-like        stream 'exit': an adapter of equal size at each exit                         (Tang et al., 2024)
  SkipDecode-like  `schedule`, see EarlyExitTarget                    (Del Corro et al., 2023, arXiv 2307.02628)

Mixture-of-Depths (Raposo et al., 2024) is not among them: its router decides which tokens a block leaves out while the
base is trained so; on a frozen base there is nothing that it could be compared as.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from backbone import cache as caches
from backbone import layout
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.model import PlainTarget, embed, finish, run_layers, unembed
from m2r2 import exit_state, exit_step, exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.exit_state import ExitState, put
from m2r2.gates import GateConfig
from m2r2.kv_fill import FILLS, visible

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EarlyExitTarget:
    """A Target with params {'base', 'm2r2', 'm2r2_gates'}. Single tokens may leave early; prompts and blocks of more
    tokens run at full depth, which is exact as far as the keys and values before them are.

    thresholds: one an exit, compared with the gate's confidence in 0..1: 0 always leaves, above 1 never.
    kv_fill: what becomes of the keys and values behind an exit, see m2r2/kv_fill.py. 'defer' computes them, exactly,
    with the next token that goes deeper, and for at most `pending` positions: then a token has to go through.
    schedule: exit layers (or num_layers) by number of generated tokens run before, the last one for all further tokens;
    they never grow, so what a token reads is always there, and 'drop' is exact. It replaces the gates. SkipDecode as
    published has one depth a position for the whole batch too, but bypasses the lower and middle layers and keeps the
    top ones; here the lower ones run, and the exit's words are the fast stream's.
    With more than one row a stretch of layers runs while any row needs it (finished rows count): `statistics` tells
    that from the mean depth. What a row says does not depend on the others.
    stacked, cache_dtype: as of PlainTarget; unstacked parameters come from layout.pack and exits.pack.
    gate: None only beside a schedule.

    params['thresholds'] [J], where it is given, stands for `thresholds` without compiling anew.
    params['replay'] = {'exit': [B, C]} makes the token at each slot leave after that many layers; 0 leaves it to the
    gates. The exits of an earlier call (`audit`) give that call again.
    """

    cfg: ModelConfig
    m: M2R2Config
    gate: GateConfig | None
    thresholds: tuple[float, ...] = ()
    kv_fill: str = 'defer'
    pending: int = 3
    cache_dtype: str = 'float32'
    stacked: bool = True
    schedule: tuple[int, ...] = ()
    exact: ClassVar[bool] = False

    def __post_init__(self):
        m, schedule = self.m, self.schedule
        if (m.num_layers, m.hidden_size, m.vocab_size) != (self.cfg.num_layers, self.cfg.hidden_size,
                                                           self.cfg.vocab_size):
            raise ConfigError('early exit: m2r2 was made for a base of another shape')
        if m.draft_vocab or m.carry:
            raise ConfigError(f'early exit answers with all words and has no token before to carry: m2r2.draft_vocab '
                              f'and m2r2.carry must be 0, got {m.draft_vocab} and {m.carry}')
        if self.kv_fill not in FILLS:
            raise ConfigError(f'kv_fill: unknown {self.kv_fill!r}, one of {", ".join(FILLS)}')
        if self.pending < 1:
            raise ConfigError(f'pending must be at least 1, got {self.pending}')
        if self.cfg.num_layers > np.iinfo(np.int8).max:
            raise ConfigError(f'early exit logs layers in a byte, the base has {self.cfg.num_layers}')
        if schedule:
            if unknown := [n for n in schedule if n not in self.ends]:
                raise ConfigError(f'schedule: {unknown[0]} is neither an exit nor the last layer, {self.ends}')
            if list(schedule) != sorted(schedule, reverse=True) or self.kv_fill != 'drop':
                raise ConfigError(f'schedule must never grow, got {schedule}, and needs kv_fill drop, got '
                                  f'{self.kv_fill}')
            if self.thresholds:
                raise ConfigError('schedule replaces the gates: thresholds must be empty')
        elif self.gate is None or len(self.thresholds) != len(m.exits):
            raise ConfigError(f'early exit needs a gate and {len(m.exits)} thresholds, one an exit, got '
                              f'{len(self.thresholds)}')
        elif not all(t >= 0 for t in self.thresholds):
            raise ConfigError(f'thresholds must be at least 0 (above 1 never leaves), got {self.thresholds}')

    # --- what the parts of the step ask -------------------------------------------------------------------------

    @property
    def ends(self) -> tuple[int, ...]:
        """The layer each stretch ends with: the exits, then the last one."""
        return (*self.m.exits, self.cfg.num_layers)

    @property
    def begins(self) -> tuple[int, ...]:
        return (0, *self.m.exits)

    @property
    def stretches(self) -> int:
        return len(self.m.exits) + 1

    @property
    def defers(self) -> bool:
        return self.kv_fill == 'defer'

    def thresholds_of(self, params: dict) -> Any:
        return params.get('thresholds', self.thresholds)

    def asks(self, params: dict, i: int) -> bool:
        """Whether exit i = 0..J-1 has a gate that may say yes."""
        return not self.schedule and ('thresholds' in params or self.thresholds[i] <= 1)

    @property
    def needs_head(self) -> bool:
        return not self.schedule and self.gate.needs_head

    @property
    def needs_path(self) -> bool:
        return not self.schedule and self.gate.needs_path

    @property
    def remembers(self) -> bool:
        """Whether the gates keep something of earlier tokens, so that every token has to pass them."""
        return not self.schedule and self.gate.kind == 'arla_tokens'

    def mine(self, params: dict) -> dict:
        return params.get('m2r2', {})

    def gate_params(self, params: dict, i: int) -> dict:
        return params.get('m2r2_gates', {}).get(f'exit_{i + 1}', {})

    # --- the contract -------------------------------------------------------------------------------------------

    @property
    def reference(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype, self.stacked)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """As PlainTarget's; `layers` is an ExitState."""
        del block
        memory = gates.init_memory(self.gate, self.m, batch, max_len) if self.remembers else ()
        state = exit_state.init(self.cfg, self.m, batch, max_len, self.cache_dtype, self.stacked,
                                self.pending if self.defers else 0, self.kv_fill == 'drop', memory)
        return caches.init_cache(state, batch, max_len)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: Mapping[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the contract says. logits_at marks a prompt. Errors: ConfigError for resume or masks, and for taps of a
        single token, whose deeper layers may not have run."""
        if resume is not None or masks is not None:
            raise ConfigError('an early-exit target takes no resume and no masks')
        if logits_at is not None:
            cache = cache.replace(layers=cache.layers.replace(prompt=cache.pos + logits_at + 1))
        elif tokens.shape[1] == 1:
            if taps:
                raise ConfigError(f'an early-exit target has no taps of a single token, asked for {taps[0]!r}')
            return exit_step.run(self, params, tokens, cache)
        return self.full(params, tokens, cache, taps=taps, logits_at=logits_at)

    def full(self, params: dict, tokens: Array, cache: caches.Cache, rows: Array | None = None, *,
             taps: tuple[str, ...] = (), logits_at: Array | None = None) -> Output:
        """Every layer on the block [B, S], as the reference would on this cache; `rows` [B]: the others write nothing.
        What was deferred is run first. With logits_at it is a prompt, or what was generated read again: no exits are
        logged."""
        cfg, base, pos = self.cfg, params['base'], cache.pos
        rows = jnp.ones(pos.shape, bool) if rows is None else rows
        cache = self.flush(params, cache, rows)
        s: ExitState = cache.layers
        size = tokens.shape[1]
        ctx = exit_step.context(self, cache, pos, size, rows)
        x = embed(cfg, base, tokens, ctx.positions)
        if self.remembers or self.kv_fill == 'drop':
            x, kv, memory, found = self._by_stretches(params, x, s, ctx, taps)
        else:
            x, kv, found = run_layers(cfg, base, x, s.kv, ctx, taps=taps)
            memory = s.memory
        hidden = finish(cfg, base, x)
        if 'hidden:last' in taps:
            found['hidden:last'] = hidden
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        depth = jnp.full(tokens.shape, cfg.num_layers)
        s = s.replace(kv=kv, memory=memory, done=jnp.where(rows, pos + size, s.done))
        if self.kv_fill == 'drop':
            s = s.replace(filled=put(s.filled, ctx.pos, depth))
        if logits_at is None:
            s = s.replace(exit=put(s.exit, ctx.pos, depth), score=put(s.score, ctx.pos, 0 * depth))
        cache = cache.replace(layers=s)
        return Output(tokens, unembed(cfg, base, hidden), caches.write_tokens(cache, tokens), found)

    def _by_stretches(self, params, x, s, ctx, taps):
        """The layers in parts: 'drop' shows each part other slots, and gates with a memory have to see every token."""
        kv, memory, found = s.kv, s.memory, {}
        for i, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            seen = visible(ctx, s.filled, begin) if self.kv_fill == 'drop' else ctx
            if self.remembers and i < len(self.m.exits):
                fast = streams.run_interval(self.cfg, self.m, params['base'], self.mine(params), i, x, kv, seen,
                                            together=False)
                _, memory = gates.score(self.gate, self.m, self.gate_params(params, i), i, fast, None, memory, ctx.pos)
            x, kv, part = run_layers(self.cfg, params['base'], x, kv, seen, lo=begin, hi=end, taps=taps)
            found |= part
        return x, kv, memory, found

    def flush(self, params: dict, cache: caches.Cache, rows: Array | None = None) -> caches.Cache:
        """The cache with nothing deferred: as the reference would have left it."""
        if not self.defers:
            return cache
        rows = jnp.ones(cache.pos.shape, bool) if rows is None else rows
        return exit_step.catch_up(self, params, cache, rows)

    # --- read out -----------------------------------------------------------------------------------------------

    def audit(self, cache: caches.Cache) -> dict[str, Array]:
        """By slot [B, C]: 'exit', the layer where its token left, and 'score', the gate's confidence."""
        return {'exit': cache.layers.exit, 'score': cache.layers.score}

    def statistics(self, cache: caches.Cache) -> dict[str, Any]:
        """Of a finished call, see exit_state.statistics."""
        shapes = {} if self.schedule else jax.eval_shape(lambda key: gates.init_params(self.gate, self.m, key),
                                                         jax.random.key(0))
        weights = tuple(sum(a.size for a in jax.tree.leaves(shapes.get(f'exit_{i + 1}', {})))
                        for i in range(len(self.m.exits)))
        return exit_state.statistics(self.cfg, self.m, cache, self.needs_head, weights)


def build(model: Mapping[str, Any], m2r2: Mapping[str, Any], gate: Mapping[str, Any] | None = None,
          thresholds: Sequence[float] = (), kv_fill: str = 'defer', pending: int = 3, schedule: Sequence[int] = (),
          cache_dtype: str = 'float32', packed: bool = True) -> EarlyExitTarget:
    """By name: fields of ModelConfig, M2R2Config and GateConfig. packed: for parameters from `pack`.

    Errors: ConfigError."""
    cfg = ModelConfig.from_dict(model)
    return EarlyExitTarget(cfg, M2R2Config.of(cfg, m2r2), None if gate is None else GateConfig.of(gate),
                           tuple(thresholds), kv_fill, pending, cache_dtype, not packed, tuple(schedule))


def pack(params: dict, model: Mapping[str, Any], m2r2: Mapping[str, Any], dtype: Any = jnp.float32,
         **settings: Any) -> dict:
    """{'base', 'm2r2', 'm2r2_gates'} as trained, for decoding; a base that is packed stays. settings: those of `build`
    that do not matter here."""
    del settings
    cfg, base = ModelConfig.from_dict(model), params['base']
    base = base if isinstance(base['layers'], tuple) else layout.pack(base, dtype)
    mine = exits.pack(M2R2Config.of(cfg, m2r2), params.get('m2r2', {}), base, jnp.dtype(dtype))
    return {'base': base, 'm2r2': mine, 'm2r2_gates': jax.tree.map(jnp.asarray, params.get('m2r2_gates', {}))}


def mean_layers(target: EarlyExitTarget, cache: caches.Cache) -> float:
    """Mean exit layer of the tokens run after the prompts."""
    return target.statistics(cache)['mean_exit_layer']


def falling_schedule(m: M2R2Config, tokens: int, first: int, last: int) -> tuple[int, ...]:
    """Exit layers of `tokens` generated tokens falling evenly from layer `first` to `last`, rounded up to an exit."""
    ends = (*m.exits, m.num_layers)
    if not m.exits[0] <= last <= first <= m.num_layers or tokens < 1:
        raise ConfigError(f'schedule: needs {m.exits[0]} <= last <= first <= {m.num_layers} and tokens >= 1, got last '
                          f'{last}, first {first}, tokens {tokens}')
    wanted = np.linspace(first, last, tokens)
    return tuple(min(end for end in ends if end >= depth - 1e-9) for depth in wanted)
