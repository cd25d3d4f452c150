"""What a decode step spends its time on, in C, for CPU hosts: a thin matrix product, attention, the cache,
the embedding.

Compiled by the machine's C compiler on first use and called by XLA through its foreign function interface.
Without a compiler everything runs on XLA. Why this exists, with measurements: docs/performance.md.

  doors.c      the handlers XLA calls        pool.h   threads        vec.h   sixteen floats at a time
  product.h    y = x w^T for a few rows          attention.h   a few queries over a cache
  store.h      a block into the cache            gather.h   products with some rows of a matrix
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import jaxlib

from backbone.native import build

Array = jax.Array
MAX_ROWS = 16  # of one call; beyond it XLA's own products are faster
_TARGETS = ('headway_matmul', 'headway_attend', 'headway_store', 'headway_rows', 'headway_rows_in', 'headway_rows_out')
_DTYPES = (jnp.float32, jnp.bfloat16)


@functools.cache
def problem() -> str | None:
    """None where the C code works, else one line that says why it does not. Builds and registers it once."""
    try:
        library = build.load(pathlib.Path(__file__).parent / 'doors.c', pathlib.Path(jax.ffi.include_dir()),
                             jaxlib.__version__)
    except build.NoCompiler as error:
        return str(error)
    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
    return None


def available() -> bool:
    return problem() is None


def takes_product(rows: int, dtype) -> bool:
    """Whether `matmul` may be called with that many rows of that type here."""
    return rows <= MAX_ROWS and dtype in _DTYPES and available()


def matmul(x: Array, w: Array) -> Array:
    """x [m, k] times w [n, k] transposed -> float32 [m, n]. m at most MAX_ROWS, one dtype."""
    return jax.ffi.ffi_call('headway_matmul', jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32))(x, w)


def takes_attention(q: Array, k: Array) -> bool:
    """Whether `attend` may be called with these here."""
    hd = q.shape[-1]
    return q.shape[1] <= MAX_ROWS and q.dtype == jnp.float32 and k.dtype in _DTYPES and hd % 16 == 0 \
        and hd <= 256 and available()


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, S, H, hd] float32 over k, v [B, KH, C, hd] under mask [B, S, C] -> [B, S, H, hd]."""
    return jax.ffi.ffi_call('headway_attend', jax.ShapeDtypeStruct(q.shape, jnp.float32))(q, k, v, mask)


def takes_store(cache: Array, block: Array) -> bool:
    """Whether `store` may be called with these here."""
    return cache.dtype in _DTYPES and block.dtype == jnp.float32 and available()


def store(cache: Array, block: Array, pos: Array) -> Array:
    """Block [B, S, KH, hd] float32 into cache [B, KH, C, hd] at slots pos[b].., in place; the rest is dropped."""
    result = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    return jax.ffi.ffi_call('headway_store', result, input_output_aliases={0: 0})(cache, block, pos)


def rows(table: Array, ids: Array) -> Array:
    """table [V, d] at ids [n] int32 -> float32 [n, d]."""
    result = jax.ShapeDtypeStruct((ids.shape[0], table.shape[1]), jnp.float32)
    return jax.ffi.ffi_call('headway_rows', result)(table, ids)


def rows_in(x: Array, w: Array, ids: Array, active: Array) -> Array:
    """x [m, k] times rows of w [nb, bn, k], blocks ids [n] of which the first `active` count -> float32 [m, n bn].

    x of w's type. A row has the same bits as of `matmul`; what does not count is 0. m at most MAX_ROWS."""
    result = jax.ShapeDtypeStruct((x.shape[0], ids.shape[0] * w.shape[1]), jnp.float32)
    return jax.ffi.ffi_call('headway_rows_in', result)(x, w, ids, active.reshape(1))


def rows_out(h: Array, w: Array, ids: Array, active: Array) -> Array:
    """h [m, n bn] float32 times the same rows -> float32 [m, k]: the sum of those that count, in their order."""
    result = jax.ShapeDtypeStruct((h.shape[0], w.shape[2]), jnp.float32)
    return jax.ffi.ffi_call('headway_rows_out', result)(h, w, ids, active.reshape(1))
