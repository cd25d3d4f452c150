"""What other rooms call: the ops by name, each by its reference or by a kernel.

Every function takes `implementation`: None chooses (see choice.py), 'xla' is the reference, 'tpu' or 'gpu' that kernel
or a KernelError that says why not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import cp_logits as _cp_logits
from pallas_kernels import cp_row as _cp_row
from pallas_kernels import decode_attention as _decode_attention
from pallas_kernels import gather_rows as _gather_rows
from pallas_kernels import moe_gather as _moe_gather
from pallas_kernels import sparse_mlp as _sparse_mlp
from pallas_kernels import stacked_gemv as _stacked_gemv
from pallas_kernels.choice import choose
from pallas_kernels.op import Op

Array = jax.Array
OPS = {op.name: op for op in (_stacked_gemv.OP, _decode_attention.OP, _cp_logits.OP, _cp_row.OP, _sparse_mlp.OP,
                              _gather_rows.IN, _gather_rows.OUT, _moe_gather.OP)}


def _call(op: Op, args: tuple, implementation: str | None):
    kernel = choose(op, args, implementation)
    return op.ref(*args) if kernel is None else kernel.run(*args)


def stacked_gemv(x: Array, w: Array, layer: Array | int = 0, *, implementation: str | None = None) -> Array:
    """x [S, M, K] times w [L, S, K, N] of one layer -> [S, M, N]: a few rows by each of S matrices, in one launch."""
    return _call(_stacked_gemv.OP, (x, w, layer), implementation)


def decode_attention(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
                     ring: bool = False, *, implementation: str | None = None) -> Array:
    """q [B, S, H, hd], a few queries a row, over a cache k, v [B, KH, C, hd] -> [B, S, H, hd].

    pos: int32 [B], of each row's first query, or [B, S], of every one (two streams: each position twice). A query at t
    sees positions t - lag - window < j <= t - lag, and gets exactly 0 where there are none; ring: slot j mod C holds
    position j, of those before the first query. What no query sees has no effect. See decode_attention/ref.py.
    """
    return _call(_decode_attention.OP, (q, k, v, pos, lag, window, ring), implementation)


def cp_logits(h: Array, U: Array, frozen: bool = False, *, implementation: str | None = None) -> Array:
    """log sum_v exp(h_i . U_v): h [M, d], U [V, d] -> float32 [M], without the logits. frozen: U gets no gradient."""
    return _call(_cp_logits.OP, (h, U, frozen), implementation)


def sparse_mlp(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0, *,
               bias: Array | None = None, own: Array | None = None, block: int, activation: str = 'silu',
               implementation: str | None = None) -> Array:
    """x [M, d] -> [M, d], float32 at least: an MLP through the first `active` [] of the blocks `ids` [K] of neurons.

    up [L, n, d], or [L, 2 n, d] with the gate's first; down [L, n, d]; own [M, K]: which of them a row goes through.
    The others are not read. See sparse_mlp/ref.py.
    """
    return _call(_sparse_mlp.OP, (x, up, down, ids, active, layer, bias, own, block, activation), implementation)


def rows_in(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, *, block: int,
            implementation: str | None = None) -> Array:
    """x [M, k] against the first `active` [] of the blocks `ids` [K] of rows of w [L, n, k] -> [M, K block], float32 at
    least, 0 for those that do not count."""
    return _call(_gather_rows.IN, (x, w, ids, active, layer, block), implementation)


def rows_out(h: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, *, block: int,
             implementation: str | None = None) -> Array:
    """h [M, K block] against the same blocks of w [L, n, k] -> [M, k], float32 at least."""
    return _call(_gather_rows.OUT, (h, w, ids, active, layer, block), implementation)


def moe_gather(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array,
               active: Array | None = None, *, activation: str = 'silu', implementation: str | None = None) -> Array:
    """x [M, d] -> [M, d], float32 at least: sum over k of weights[:, k] times the MLP in slots[k].

    gate (or None), up [S, d, f], down [S, f, d]; weights [M, K]; slots [K], of which the first `active` [] count (all
    without), or each row's own, [M, K].
    """
    if slots.ndim == 2:
        slots, weights, active = _moe_gather.ref.distinct(slots, weights)
    active = jnp.int32(slots.shape[0]) if active is None else active
    return _call(_moe_gather.OP, (x, gate, up, down, slots, weights, active, activation), implementation)


def cp_row(log_w: Array, z: Array, *, implementation: str | None = None) -> Array:
    """log sum_a exp(log_w_a) softmax(z_a): log_w [B, r], z [B, r, W] -> float32 [B, W], a draft's conditional law."""
    return _call(_cp_row.OP, (log_w, z), implementation)
