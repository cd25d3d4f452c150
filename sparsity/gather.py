"""Products with some rows of a matrix: what a sparse layer is made of.

A matrix is stored so that what is kept or dropped is a row (sparsity/layout.py), and rows come in blocks: w [n, k] is
seen as [n / block, block, k], and one id names block * k numbers that lie together.

    rows_in   x [m, k]             -> [m, K block]    queries of some heads, activations of some neurons
    rows_out  h [m, K block]       -> [m, k]          what they add to the residual

`implementation`: 'native', C that reads the named rows once (CPUs, backbone/native); 'xla', everywhere, the reference:
there rows are copied and then multiplied, so it moves up to three times what it reads (a kernel's place is here); None
takes the first that can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from backbone import native
from backbone.errors import ConfigError

Array = jax.Array
IMPLEMENTATIONS = ('native', 'xla')


def check(implementation: str | None) -> None:
    """Errors: ConfigError for a name nobody implements."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ConfigError(f'implementation: unknown {implementation!r}, one of {", ".join(IMPLEMENTATIONS)}, or None')


def rows_in(x: Array, w: Array, ids: Array, active: Array, block: int, implementation: str | None = None) -> Array:
    """x [m, k] against the blocks `ids` [K] of w [n, k], of which the first `active` count -> [m, K block], at least
    float32, 0 for those that do not count."""
    blocks = w.reshape(-1, block, w.shape[-1])
    x, active = x.astype(w.dtype), jnp.asarray(active, jnp.int32)
    if _native(implementation, x.shape[0], w.dtype):
        return jax.lax.platform_dependent(x, blocks, ids, active, cpu=native.rows_in, default=_xla_in)
    return _xla_in(x, blocks, ids, active)


def rows_out(h: Array, w: Array, ids: Array, active: Array, block: int, implementation: str | None = None) -> Array:
    """h [m, K block] against the same blocks of w [n, k] -> [m, k], at least float32. What does not count adds nothing,
    not even a NaN."""
    blocks = w.reshape(-1, block, w.shape[-1])
    active = jnp.asarray(active, jnp.int32)
    if _native(implementation, h.shape[0], w.dtype):
        h = h.astype(w.dtype).astype(jnp.float32)  # rounded as any other operand is
        return jax.lax.platform_dependent(h, blocks, ids, active, cpu=native.rows_out, default=_xla_out)
    return _xla_out(h, blocks, ids, active)


def _native(implementation: str | None, rows: int, dtype: jnp.dtype) -> bool:
    """Errors: ConfigError where it was asked for by name and cannot be had."""
    check(implementation)
    if implementation == 'xla':
        return False
    able = native.takes_product(rows, dtype)
    if implementation == 'native' and not able:
        why = native.problem() or f'it takes float32 and bfloat16 and up to {native.MAX_ROWS} rows, got {dtype}, {rows}'
        raise ConfigError(f'implementation native: {why}')
    return able


def _xla_in(x: Array, w: Array, ids: Array, active: Array) -> Array:
    y = _dot(x, _rows(w, ids), 1)
    return jnp.where(_counting(w, ids, active), y, 0)


def _xla_out(h: Array, w: Array, ids: Array, active: Array) -> Array:
    h = jnp.where(_counting(w, ids, active), h, 0).astype(w.dtype)
    return _dot(h, _rows(w, ids), 0)


def _rows(w: Array, ids: Array) -> Array:
    return w[ids].reshape(-1, w.shape[-1])


def _counting(w: Array, ids: Array, active: Array) -> Array:
    return jnp.arange(ids.shape[0] * w.shape[1]) < active * w.shape[1]


def _dot(x: Array, rows: Array, axis: int) -> Array:
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.dot_general(x, rows, (((1,), (axis,)), ((), ())), preferred_element_type=wide)
