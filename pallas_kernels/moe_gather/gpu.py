"""Mosaic GPU (Hopper): the few rows, padded to the 64 of a wgmma, by tiles of the slots' matrices that TMA streams in.

One launch a matrix (gate, up, down) for all K experts; between them XLA runs the activation, after them the weighted
sum, on K f and K d numbers a row. A matrix's depth is spread over several blocks of threads where its columns alone
would not busy the chip; their parts are summed outside, always in the same order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gather_rows.gpu import IN_FLIGHT, MAX_ROWS, PROCESSORS, SWIZZLE, SWIZZLE_32, TILE, stream
from pallas_kernels.moe_gather.ref import weighted
from pallas_kernels.op import tiled
from pallas_kernels.sparse_mlp.ref import activated

Array = jax.Array


def refuses(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array, active: Array,
            activation: str = 'silu') -> str | None:
    if any(a.dtype != jnp.bfloat16 for a in (x, up, down)):
        return f'x and weights must all be bfloat16, what its tensor cores multiply, got {x.dtype}, {up.dtype}'
    if x.shape[0] > MAX_ROWS:
        return f'{x.shape[0]} rows are more than {MAX_ROWS}'
    if up.shape[1] % TILE or up.shape[2] % TILE:
        return f'a matrix of {up.shape[1]} x {up.shape[2]} is not made of tiles of {TILE} x {TILE}'
    return None


def moe_gather(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array, active: Array,
               activation: str = 'silu', interpret=False) -> Array:
    """As ref.moe_gather."""
    act = activated(activation)
    rows, slots = x.shape[0], slots.astype(jnp.int32)
    live = jnp.asarray(active, jnp.int32).reshape(1)
    x = jnp.pad(x, ((0, -rows % 8), (0, 0)))[None]
    h = _product(x, up, slots, live, interpret)
    h = act(h) if gate is None else act(_product(x, gate, slots, live, interpret)) * h
    y = _product(h.astype(down.dtype), down, slots, live, interpret)[:, :rows]
    return weighted(y, weights, active)


def _product(x: Array, w: Array, slots: Array, live: Array, interpret) -> Array:
    """x [K or 1, M, depth] by the matrices w [S, depth, n] in slots [K] -> [K, M, n] float32. M is a multiple of 8.
    Of those beyond live [1] nothing is read, and what comes out may be anything."""
    each, rows, depth = x.shape
    count, n = slots.shape[0], w.shape[2]
    columns, steps = tiled(n, TILE, 2 * TILE), depth // TILE
    parts = max(1, min(steps, PROCESSORS // (count * n // columns)))

    def kernel(slots_ref, live_ref, x_ref, w_ref, y_ref, x_tile, w_tile, out, ready):
        k, column, part = (jax.lax.axis_index(name) for name in ('expert', 'column', 'part'))
        across = pl.ds(column * columns, columns)

        def product(acc):
            slot, mine = slots_ref[k], k if each > 1 else 0

            def copies(step, at):
                here = pl.ds((part + step * parts) * TILE, TILE)
                yield x_ref.at[mine, :, here], x_tile.at[at, pl.ds(0, rows)]  # what lies below is never looked at
                yield w_ref.at[slot, here, across], w_tile.at[at]

            stream(jax.lax.div(steps - part + parts - 1, parts), copies, ready,
                   lambda at: plgpu.wgmma(acc, x_tile.at[at], w_tile.at[at]))
            return acc[...]

        @pl.when(k < live_ref[0])
        def _():
            out[...] = pl.run_scoped(product, plgpu.ACC((MAX_ROWS, columns), jnp.float32))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.at[pl.ds(0, rows)], y_ref.at[part, k, :, across])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((parts, count, rows, n), jnp.float32),
        scratch_types=[plgpu.SMEM((IN_FLIGHT, MAX_ROWS, TILE), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((IN_FLIGHT, TILE, columns), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((MAX_ROWS, columns), jnp.float32, transforms=SWIZZLE_32),
                       plgpu.Barrier(num_arrivals=2, num_barriers=IN_FLIGHT)],
        grid=(count, n // columns, parts), grid_names=('expert', 'column', 'part'), interpret=interpret)
    return run(slots, live, x, w).sum(0)
