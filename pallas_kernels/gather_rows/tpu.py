"""Mosaic TPU: the named blocks of rows stream through VMEM, as many at once as the matrix unit is wide.

For widths that are no multiple of 128 see sparse_mlp/tpu.py: it matters how the matrix is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_rows.ref import counting
from pallas_kernels.gather_rows.stream_tpu import at_once, refuses_block, stream

Array = jax.Array
MAX_ROWS = 64


def refuses(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64) -> str | None:
    if x.dtype != w.dtype or w.dtype not in (jnp.float32, jnp.bfloat16):
        return f'both operands must be float32 or bfloat16, got {x.dtype}, {w.dtype}'
    if x.shape[0] > MAX_ROWS:
        return f'{x.shape[0]} rows are more than {MAX_ROWS}'
    return refuses_block(block, w.dtype, block * w.shape[2] * w.dtype.itemsize)


def rows_in(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64,
            interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.rows_in."""
    together, steps = _steps(w, ids, block)
    rows = x.shape[0]

    def use(step, x_ref, tile, y_ref):
        y_ref[step] = _dot(x_ref[...], tile, 1)

    y = _call(use, x, w, ids, active, layer, block, jax.ShapeDtypeStruct((steps, rows, together * block), jnp.float32),
              interpret)
    y = jnp.moveaxis(y, 0, 1).reshape(rows, -1)[:, :ids.shape[0] * block]
    return jnp.where(counting(ids, active, block), y, 0)


def rows_out(h: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64,
             interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.rows_out."""
    together, steps = _steps(w, ids, block)
    rows = h.shape[0]
    h = jnp.where(counting(ids, active, block), h, 0).astype(w.dtype)
    h = jnp.pad(h, ((0, 0), (0, steps * together * block - h.shape[1])))
    h = jnp.moveaxis(h.reshape(rows, steps, -1), 1, 0)

    def use(step, h_ref, tile, y_ref):
        y_ref[...] += _dot(h_ref[step], tile, 0)

    return _call(use, h, w, ids, active, layer, block, jax.ShapeDtypeStruct((rows, w.shape[2]), jnp.float32), interpret)


def _steps(w: Array, ids: Array, block: int) -> tuple[int, int]:
    together = at_once(ids.shape[0], block, block * w.shape[2] * w.dtype.itemsize)
    return together, pl.cdiv(ids.shape[0], together)


def _dot(a: Array, b: Array, axis: int) -> Array:
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _call(use, a: Array, w: Array, ids: Array, active: Array, layer: Array | int, block: int,
          out: jax.ShapeDtypeStruct, interpret) -> Array:
    """use(step, a's ref, tile [rows together, k], out's ref) for each tile, in order; out begins as zeros."""
    together, _ = _steps(w, ids, block)
    k = w.shape[2]

    def kernel(layer_ref, active_ref, ids_ref, a_ref, w_ref, y_ref, buffer, done):
        def copies(at, slot, place):
            yield pltpu.make_async_copy(w_ref.at[layer_ref[0], ids_ref[at]],
                                        buffer.at[slot, pl.ds(place * block, block)], done.at[slot])

        y_ref[...] = jnp.zeros_like(y_ref)
        buffer[...] = jnp.zeros_like(buffer)  # where no block comes, 0 times what lay there must be 0
        stream(active_ref[0], together, copies, lambda step, slot: use(step, a_ref, buffer[slot], y_ref))

    here, there = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(), in_specs=[here, there], out_specs=here,
            scratch_shapes=[pltpu.VMEM((2, together * block, k), w.dtype), pltpu.SemaphoreType.DMA((2,))]),
        out_shape=out, interpret=interpret,
    )(jnp.asarray(layer, jnp.int32).reshape(1), jnp.asarray(active, jnp.int32).reshape(1), ids.astype(jnp.int32), a,
      w.reshape(w.shape[0], -1, block, k))
