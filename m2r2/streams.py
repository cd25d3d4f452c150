"""The two streams in one layer, an interval of layers, and what reads the fast stream at its end.

    o_l = Attn(Q of p_{l-1}, the slow stream's K and V of layer l)       v_l = p_{l-1} + Wo o_l
    p_l = v_l + Acc_l(n(v_l)) + m MLP_l(n(v_l))                          m = 0 where the MLP is a mixture of experts

Nothing flows from p to h: the slow stream, its cache and its logits are the base's. The fast stream has no cache of its
own, so there is nothing of it to roll back. Our reading of Bhendawade et al., 2025 (arXiv 2502.02040): docs/m2r2.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.config import ModelConfig
from backbone.layers import Context, attend, feed, norm, out, qkv, read_write, rotate
from backbone.matmul import dense
from backbone.model import finish, run_layers
from m2r2.config import M2R2Config

Array = jax.Array


@struct.dataclass
class Ending:
    """Both streams where interval j ends: slow, fast [B, S, d] before the final norm; state: the cache's `layers`.

    path [B, S, n_j + 1, d]: the fast stream from its start, where it was asked for.
    """

    slow: Array
    fast: Array
    state: Any
    path: Array | None = None


def init_params(m: M2R2Config, base: ModelConfig, rng: Array) -> dict:
    """Stacked by layer, N_J of them. The last matrix of each change is zero: at first p is the base without it."""
    keys = iter(jax.random.split(rng, 8))
    d, layers = m.hidden_size, m.exits[-1]
    heads = base.attention.num_heads * base.attention.head_dim

    def low_rank(count: int, rows: int, rank: int, columns: int) -> dict:
        a = jax.random.normal(next(keys), (count, rows, rank)) * rows ** -0.5
        return {'a': {'kernel': a}, 'b': {'kernel': jnp.zeros((count, rank, columns))}}

    params: dict[str, Any] = {}
    if m.stream == 'fast':
        params['layers'] = {'adapter': low_rank(layers, d, m.rank, d)}
        if m.qo_rank:
            params['layers'] |= {'q': low_rank(layers, d, m.qo_rank, heads), 'o': low_rank(layers, heads, m.qo_rank, d)}
    elif m.stream == 'exit':
        params['exits'] = low_rank(len(m.exits), d, m.exit_rank, d)
    if m.carry:
        kernel = jax.random.normal(next(keys), (2 * d, m.carry)) * (2 * d) ** -0.5
        nothing = {'kernel': jnp.zeros((m.carry, d))}
        params['carry'] = {'read': {'kernel': kernel, 'bias': jnp.zeros(m.carry)}, 'start': nothing, 'end': nothing,
                           'gain': jnp.full(d, 0.1)}  # early layers read by the last norm say little yet
    if m.draft_vocab:
        params['draft_ids'] = jnp.arange(m.draft_vocab, dtype=jnp.int32)
    return params


def adapter(m: M2R2Config, p: dict, x: Array) -> Array:
    """Acc(x) = act(x A) B; p: {'a', 'b'} of one layer."""
    inner = dense(p['a'], x)
    return dense(p['b'], jax.nn.silu(inner) if m.activation == 'silu' else inner)


def two_streams(cfg: ModelConfig, p: dict, streams: tuple[Array, Array], state: Any, ctx: Context, extra: dict, *,
                m: M2R2Config, together: bool) -> tuple[tuple[Array, Array], Any, dict[str, Array]]:
    """The layer function of an interval. streams: (slow, fast), each [B, S, d]. extra: this layer's accelerator.

    together: both streams go through each product at once, so that its weights are read once (decoding); else one after
    the other, and the slow one is computed exactly as without the fast one (training).
    """
    slow, fast = streams
    each = functools.partial(_both if together else _in_turn, ctx)
    normed = norm(cfg, p['attn_norm'], fast)
    (q, k, v), (q_fast, _, _) = each(lambda x, c: qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], x), c), slow, fast)
    if 'q' in extra:
        change = dense(extra['q']['b'], dense(extra['q']['a'], normed)).reshape(q.shape)
        q_fast = q_fast + (change if ctx.rope is None else rotate(change, *ctx.rope))
    keys, values, state = read_write(state, k, v, ctx)
    heads, heads_fast = each(lambda q, c: attend(q, keys, values, c), q, q_fast)
    mixed, mixed_fast = each(lambda h, c: out(cfg, p['attn'], h), heads, heads_fast)
    if 'o' in extra:
        flat = heads_fast.reshape(*fast.shape[:2], -1)
        mixed_fast = mixed_fast + dense(extra['o']['b'], dense(extra['o']['a'], flat))
    slow, fast = slow + mixed, fast + mixed_fast
    change = adapter(m, extra['adapter'], norm(cfg, p['mlp_norm'], fast))
    through = lambda x, c: feed(cfg, p, norm(cfg, p['mlp_norm'], x))
    (y, seen), (y_fast, _) = each(through, slow, fast) if m.ffn else (through(slow, ctx), (0, {}))
    return (slow + y, fast + y_fast + change), state, {'attention': heads, 'mixer': mixed, **seen}


def _in_turn(ctx: Context, piece: Callable, slow: Array, fast: Array) -> tuple[Any, Any]:
    return piece(slow, ctx), piece(fast, ctx)


def _both(ctx: Context, piece: Callable, slow: Array, fast: Array) -> tuple[Any, Any]:
    """One call on [slow; fast] as a block of twice the tokens at the same positions."""
    size = slow.shape[1]
    twice = lambda a: jnp.concatenate([a, a], axis=1)
    wide = ctx.replace(positions=twice(ctx.positions), mask=twice(ctx.mask), rope=jax.tree.map(twice, ctx.rope))
    y = piece(jnp.concatenate([slow, fast], axis=1), wide)
    return jax.tree.map(lambda a: a[:, :size], y), jax.tree.map(lambda a: a[:, size:], y)


def run_interval(cfg: ModelConfig, m: M2R2Config, base: dict, mine: dict, j: int, slow: Array, state: Any, ctx: Context,
                 *, start: Array | None = None, together: bool = True, path: bool = False) -> Ending:
    """Layers N_{j-1}+1..N_j of the base on slow [B, S, d], with the fast stream beside them.

    base, mine: params['base'] and params['m2r2']. start [B, S, d]: where p begins; None: at the slow stream.
    """
    lo, hi = m.starts[j], m.exits[j]
    if m.stream != 'fast':
        slow, state, _ = run_layers(cfg, base, slow, state, ctx, lo=lo, hi=hi)
        fast = slow
        if m.stream == 'exit':
            fast = slow + adapter(m, _exit_of(mine['exits'], j), finish(cfg, base, slow))
        return Ending(slow, fast, state, jnp.stack([slow, fast], axis=2) if path else None)
    taps = tuple(f'hidden:{l}' for l in range(lo, hi + 1)) if path else ()
    layer = functools.partial(two_streams, m=m, together=together)
    begin = (slow, slow if start is None else start)
    (slow, fast), state, seen = run_layers(cfg, base, begin, state, ctx, lo=lo, hi=hi, layer_fn=layer,
                                           extra=mine['layers'], taps=taps)
    return Ending(slow, fast, state, jnp.stack([seen[tap][1] for tap in taps], axis=2) if path else None)


def _exit_of(exits: Any, j: int) -> dict:
    return exits[j] if isinstance(exits, tuple) else jax.tree.map(lambda a: a[j], exits)


def read_carry(m: M2R2Config, mine: dict, embedded: Array, previous: Array) -> Array | None:
    """embedded [B, S, d] of each token; previous [B, S, d]: after the final norm, of the token before it -> what both
    ends of the interval take of it, [B, S, carry]; None without a carry."""
    if not m.carry:
        return None
    wide = embedded.astype(jnp.promote_types(embedded.dtype, jnp.float32))
    unit = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(embedded.dtype)
    return jax.nn.silu(dense(mine['carry']['read'], jnp.concatenate([unit, previous.astype(embedded.dtype)], -1)))


def start(mine: dict, slow: Array, carry: Array | None) -> Array:
    """Where p begins, [B, S, d]."""
    return slow if carry is None else slow + dense(mine['carry']['start'], carry)


def end(cfg: ModelConfig, base: dict, mine: dict, fast: Array, carry: Array | None) -> Array:
    """The hidden state that the exit's words are read from, [B, S, d]: the base's final norm of p, and the carry."""
    hidden = finish(cfg, base, fast)
    if carry is None:
        return hidden
    return hidden * mine['carry']['gain'].astype(hidden.dtype) + dense(mine['carry']['end'], carry)
