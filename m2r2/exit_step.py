"""One token a row, stretch after stretch, until its gate lets it go; and the stretches a row still owes.

A stretch is skipped, by a real branch, once no row needs it. A row that has left takes no part any more: whatever the
rest of the batch makes of it deeper down is written nowhere, so what a row gets does not depend on its neighbours.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import cache as caches
from backbone.branch import when
from backbone.contract import Output
from backbone.layers import Context, make_context
from backbone.model import embed, run_layers
from m2r2 import exits, gates, streams
from m2r2.exit_state import put, ring_read, ring_write
from m2r2.kv_fill import COPIES, fill, visible
from m2r2.streams import Ending

if TYPE_CHECKING:
    from m2r2.early_exit import EarlyExitTarget

Array = jax.Array


@struct.dataclass
class Walk:
    """A token on its way up. live [B]: has not left. slow [B, 1, d]: where it stands. answer [B, 1, d or V]: the fast
    stream where it left, or its logits if the gates need them anyway. left: slow and fast where it left, if keys and
    values are made of them, else (). exit, score [B], the rest: of the ExitState; kv: of the stretch that is run."""

    live: Array
    slow: Array
    answer: Array
    left: Any
    exit: Array
    score: Array
    kv: Any
    done: Array
    ring: tuple[Array, ...]
    memory: Any
    ran: Array
    wide: Array


def run(t: EarlyExitTarget, params: dict, tokens: Array, cache: caches.Cache) -> Output:
    """tokens [B, 1] at slot pos."""
    s, pos = cache.layers, cache.pos
    batch = len(pos)
    goal = goals(t, params, s, pos)
    slow = embed(t.cfg, params['base'], tokens, pos[:, None])
    width = t.vocab_size if t.needs_head else t.cfg.hidden_size
    dtype = jnp.promote_types(slow.dtype, jnp.float32) if t.needs_head else slow.dtype
    left = (slow, slow) if t.kv_fill in COPIES else ()
    w = Walk(jnp.ones((batch,), bool), slow, jnp.zeros((batch, 1, width), dtype), left, jnp.zeros((batch,), jnp.int32),
             jnp.zeros((batch,), jnp.float32), (), jnp.minimum(s.done, pos), s.ring, s.memory, s.ran, s.wide)
    kv = s.kv
    for i in range(t.stretches):
        stretch = functools.partial(_stretch, t, params, cache, goal, i)
        w, left = w.replace(kv=own_layers(t, kv, i)), ~w.live
        if i == 0:
            w = stretch(1, w)
        else:
            behind = (w.live & (w.done[i - 1] < pos)).any() if t.defers else False
            alone = w.live.any() & ~jnp.asarray(behind)
            w = when(alone, functools.partial(stretch, 1), w)
            if t.defers:
                w = when(behind, functools.partial(stretch, t.pending + 1), w)
            if t.kv_fill in COPIES:
                w = w.replace(kv=when(left.any(), functools.partial(_fill, t, params, cache, i, left, w), w.kv))
        kv = with_layers(t, kv, i, w.kv)
    logits = w.answer if t.needs_head else exits.logits(t.cfg, params['base'], t.mine(params), w.answer)
    filled = put(s.filled, pos, w.exit[:, None]) if t.kv_fill == 'drop' else ()
    layers = s.replace(kv=kv, filled=filled, done=w.done, ring=w.ring, memory=w.memory, ran=w.ran, wide=w.wide,
                       exit=put(s.exit, pos, w.exit[:, None]), score=put(s.score, pos, w.score[:, None]))
    return Output(tokens, logits, caches.write_tokens(cache.replace(layers=layers), tokens))


def own_layers(t: EarlyExitTarget, kv: Any, i: int) -> Any:
    """The layers of stretch i alone, of a tuple; a stack stays whole."""
    return kv[t.begins[i]:t.ends[i]] if isinstance(kv, tuple) else kv


def with_layers(t: EarlyExitTarget, kv: Any, i: int, part: Any) -> Any:
    return (*kv[:t.begins[i]], *part, *kv[t.ends[i]:]) if isinstance(kv, tuple) else part


def _placed(t: EarlyExitTarget, part: Any, i: int) -> Any:
    """The layers of stretch i where run_layers looks for them; it looks at no others."""
    nothing = (None,) * t.cfg.num_layers
    return with_layers(t, nothing, i, part) if isinstance(part, tuple) else part


def goals(t: EarlyExitTarget, params: dict, s: Any, pos: Array) -> Array:
    """[B]: the layer a row has to leave at; 0: its gates decide. Full depth where no more positions can be deferred."""
    goal = jnp.zeros_like(pos)
    if t.schedule:
        goal = jnp.array(t.schedule, jnp.int32)[jnp.clip(pos - s.prompt, 0, len(t.schedule) - 1)]
    if 'replay' in params:
        given = params['replay']['exit']
        row = jnp.take_along_axis(given, jnp.minimum(pos, given.shape[1] - 1)[:, None], axis=1)[:, 0]
        given = jnp.where(pos < given.shape[1], row, 0).astype(jnp.int32)
        goal = jnp.where(given > 0, given, goal)
    if t.defers:
        goal = jnp.where(pos - jnp.minimum(s.done[-1], pos) >= t.pending, t.cfg.num_layers, goal)
    return goal


def _stretch(t: EarlyExitTarget, params: dict, cache: caches.Cache, goal: Array, i: int, size: int, w: Walk) -> Walk:
    """Stretch i for the live rows, and the exit at its end."""
    w = w.replace(ran=w.ran.at[i].add(1), wide=w.wide.at[i].add(int(size > 1)))
    w, end, score = _run(t, params, cache, i, w, size)
    say = functools.partial(exits.logits, t.cfg, params['base'], t.mine(params)) if t.needs_head else lambda p: p
    if i == t.stretches - 1:
        return w.replace(answer=jnp.where(w.live[:, None, None], say(end.slow), w.answer), live=jnp.zeros_like(w.live),
                         exit=jnp.where(w.live, t.cfg.num_layers, w.exit))
    leaves, answer = goal == t.m.exits[i], end.fast
    if t.asks(params, i):
        if t.needs_head:
            answer = say(end.fast)
        if not t.remembers:
            score, _ = gates.score(t.gate, t.m, t.gate_params(params, i), i, end, answer if t.needs_head else None)
        leaves = jnp.where(goal > 0, leaves, score[:, 0] >= t.thresholds_of(params)[i])
        w = w.replace(score=jnp.where(w.live, score[:, 0].astype(jnp.float32), w.score))
    elif t.needs_head:  # a closed exit: only a replay opens it
        answer = jax.lax.cond((w.live & leaves).any(), say, lambda p: jnp.zeros_like(w.answer), end.fast)
    leaves &= w.live
    here = lambda new, old: jnp.where(leaves[:, None, None], new, old)
    if w.left:
        w = w.replace(left=(here(end.slow, w.left[0]), here(end.fast, w.left[1])))
    if t.remembers and not t.defers:
        w = w.replace(memory=_remember(t, params, i, end, w.memory, jnp.where(leaves, cache.pos, capacity(cache))))
    return w.replace(live=w.live & ~leaves, slow=end.slow, answer=here(answer, w.answer),
                     exit=jnp.where(leaves, t.m.exits[i], w.exit))


def _fill(t: EarlyExitTarget, params: dict, cache: caches.Cache, i: int, rows: Array, w: Walk, kv: Any) -> Any:
    """Keys and values of stretch i for `rows`, which had left before it."""
    ctx = context(t, cache, cache.pos, 1, rows)
    kv = fill(t.cfg, params['base'], t.kv_fill, w.exit, *w.left, _placed(t, kv, i), ctx, t.begins[i], t.ends[i])
    return own_layers(t, kv, i)


def _run(t: EarlyExitTarget, params: dict, cache: caches.Cache, i: int, w: Walk, size: int,
         owed: bool = False) -> tuple[Walk, Ending, Array]:
    """Stretch i on `size` positions: the token's own, or from the first one that lacks it. owed: up to the one before.

    Returns the token's Ending [B, 1, d] and the gate's confidence [B, 1], if that is a gate with a memory.
    """
    deferred = t.defers and i > 0
    last = cache.pos - owed
    start, slow = last, w.slow
    if size > 1 or owed:
        start = w.done[i - 1]
        slow = ring_read(w.ring[i - 1], start, size).astype(w.slow.dtype)
    ctx = context(t, cache, start, size, w.live)
    if t.kv_fill == 'drop':
        ctx = visible(ctx, cache.layers.filled, t.begins[i])
    score = jnp.zeros(slow.shape[:2], jnp.float32)
    if i == t.stretches - 1:
        slow, kv, _ = run_layers(t.cfg, params['base'], slow, _placed(t, w.kv, i), ctx, lo=t.m.exits[-1])
        end = Ending(slow, slow, kv)
    else:
        end = streams.run_interval(t.cfg, t.m, params['base'], t.mine(params), i, slow, _placed(t, w.kv, i), ctx,
                                   path=t.needs_path)
        if t.remembers:
            score, memory = gates.score(t.gate, t.m, t.gate_params(params, i), i, end, None, w.memory, ctx.pos)
            w = w.replace(memory=memory)
        if t.defers:
            w = w.replace(ring=_replaced(w.ring, i, ring_write(w.ring[i], end.slow, start, last, w.live)))
    if deferred:
        w = w.replace(done=w.done.at[i - 1].set(jnp.where(w.live, last + 1, w.done[i - 1])))
    own = jnp.clip(last - start, 0, size - 1)
    w, end = w.replace(kv=own_layers(t, end.state, i)), end.replace(state=None)
    return w, jax.tree.map(lambda a: _at(a, own), end), _at(score, own)


def _remember(t: EarlyExitTarget, params: dict, i: int, end: Ending, memory: Any, at: Array) -> Any:
    """A token that left at exit i has no streams at later exits: their memories get those it left with."""
    for later in range(i + 1, len(t.m.exits)):
        _, memory = gates.score(t.gate, t.m, t.gate_params(params, later), later, end, None, memory, at)
    return memory


def catch_up(t: EarlyExitTarget, params: dict, cache: caches.Cache, rows: Array) -> caches.Cache:
    """Runs every deferred position of `rows` [B]."""
    s, pos = cache.layers, cache.pos
    slow = embed(t.cfg, params['base'], cache.pending[:, None], pos[:, None])  # for its type
    nothing = jnp.zeros(())
    w = Walk(rows, slow, nothing, (), nothing, nothing, (), jnp.minimum(s.done, pos), s.ring, s.memory, s.ran, s.wide)
    kv = s.kv
    for i in range(1, t.stretches):
        w = w.replace(kv=own_layers(t, kv, i))
        owes = (rows & (w.done[i - 1] < pos)).any()
        w = when(owes, lambda w, i=i: _run(t, params, cache, i, w, t.pending, owed=True)[0], w)
        kv = with_layers(t, kv, i, w.kv)
    return cache.replace(layers=s.replace(kv=kv, done=jnp.where(rows, w.done, s.done), ring=w.ring, memory=w.memory))


def context(t: EarlyExitTarget, cache: caches.Cache, start: Array, size: int, live: Array) -> Context:
    """Context of `size` positions from start [B] on; what rows that are not live would write is dropped."""
    unstacked = isinstance(cache.layers.kv, tuple)
    ctx = make_context(t.cfg, start, size, capacity(cache), native=unstacked)
    return ctx.replace(pos=jnp.where(live, start, capacity(cache)))


def capacity(cache: caches.Cache) -> int:
    return cache.tokens.shape[1] - 1


def _at(a: Array, own: Array) -> Array:
    """a [B, S, ...] at own [B] -> [B, 1, ...]."""
    return jnp.take_along_axis(a, own.reshape(-1, *(1,) * (a.ndim - 1)), axis=1)


def _replaced(items: tuple, i: int, item: Any) -> tuple:
    return (*items[:i], item, *items[i + 1:])
