"""Mosaic TPU: the kept blocks of neurons stream through VMEM, both products of a few of them at once.

The weights of all layers stay in HBM; layer and ids are prefetched scalars, so that copies start before anything is
computed. No copy is started for an id that does not count. What the neurons make never leaves VMEM.

A width that is no multiple of 128: XLA keeps such matrices the other way round, and would turn the whole stack before
every call. Hold them with jax.experimental.layout.Layout((0, 1, 2)).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_rows.stream_tpu import at_once, refuses_block, stream
from pallas_kernels.sparse_mlp.ref import activated, counting

Array = jax.Array
MAX_ROWS = 64


def refuses(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0,
            bias: Array | None = None, own: Array | None = None, block: int = 16,
            activation: str = 'silu') -> str | None:
    if {x.dtype, down.dtype} != {up.dtype} or up.dtype not in (jnp.float32, jnp.bfloat16):
        return f'x, up and down must all be float32 or bfloat16, got {x.dtype}, {up.dtype}, {down.dtype}'
    if x.shape[0] > MAX_ROWS:
        return f'{x.shape[0]} rows are more than {MAX_ROWS}'
    return refuses_block(block, up.dtype, (up.shape[1] // down.shape[1] + 1) * block * x.shape[1] * up.dtype.itemsize)


def sparse_mlp(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0,
               bias: Array | None = None, own: Array | None = None, block: int = 16, activation: str = 'silu',
               interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.sparse_mlp."""
    act = activated(activation)
    (rows, d), neurons, count = x.shape, down.shape[1], ids.shape[0]
    gates, blocks = up.shape[1] // neurons, neurons // block
    together = at_once(count, block, (gates + 1) * block * d * up.dtype.itemsize)
    wide, steps = together * block, pl.cdiv(count, together)
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if up.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(a: Array, b: Array, axis: int) -> Array:
        return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision,
                                   preferred_element_type=jnp.float32)

    def kernel(layer_ref, active_ref, ids_ref, x_ref, counts_ref, bias_ref, up_ref, down_ref, y_ref, up_buffer,
               down_buffer, done):
        def copies(at, slot, place):
            for g in range(gates):
                yield pltpu.make_async_copy(up_ref.at[layer_ref[0], g, ids_ref[at]],
                                            up_buffer.at[slot, g, pl.ds(place * block, block)], done.at[slot])
            yield pltpu.make_async_copy(down_ref.at[layer_ref[0], ids_ref[at]],
                                        down_buffer.at[slot, pl.ds(place * block, block)], done.at[slot])

        def use(step, slot):
            y = [product(x_ref[...], up_buffer[slot, g], 1) + bias_ref[step, g] for g in range(gates)]
            h = act(y[0]) * y[1] if gates == 2 else act(y[0])
            h = jnp.where(counts_ref[step] > 0, h, 0).astype(down_buffer.dtype)
            y_ref[...] += product(h, down_buffer[slot], 0)

        y_ref[...] = jnp.zeros_like(y_ref)
        down_buffer[...] = jnp.zeros_like(down_buffer)  # where no block comes, 0 times what lay there must be 0
        stream(active_ref[0], together, copies, use)

    def by_step(a: Array) -> Array:
        """[..., K, block] -> [steps, ..., together block]."""
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, steps * together - count), (0, 0)])
        return jnp.moveaxis(a.reshape(*a.shape[:-2], steps, wide), -2, 0)

    ids, active = ids.astype(jnp.int32), jnp.asarray(active, jnp.int32)
    counts = counting(ids, active, own)[..., None].astype(jnp.float32)
    counts = by_step(jnp.broadcast_to(counts, (*counts.shape[:2], block)))
    shifts = (jnp.zeros((gates, 1, count, block)) if bias is None else
              bias.reshape(-1, gates, 1, blocks, block)[layer][:, :, ids]).astype(jnp.float32)
    here, there = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(), in_specs=[here, here, here, there, there], out_specs=here,
            scratch_shapes=[pltpu.VMEM((2, gates, wide, d), up.dtype), pltpu.VMEM((2, wide, d), down.dtype),
                            pltpu.SemaphoreType.DMA((2,))]),
        out_shape=jax.ShapeDtypeStruct((rows, d), jnp.float32),
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32).reshape(1), active.reshape(1), ids, x, counts, by_step(shifts),
      up.reshape(-1, gates, blocks, block, d), down.reshape(-1, blocks, block, d))
