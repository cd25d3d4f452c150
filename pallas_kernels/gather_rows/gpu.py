"""Mosaic GPU (Hopper): TMA brings the named blocks of rows side by side into shared memory, tensor cores do the rest.

64 gathered rows are a tile, one operand of a wgmma as they lie: its left one where rows become outputs (the few rows of
x, transposed and padded, are the right one), its right one where they are summed over. The last id that counts stands
in for those of its tile that do not: L2 has it. Tiles of which none counts are not touched.

A tile's inner loop is spread over several blocks of threads where there are fewer tiles than the chip has processors;
their parts are summed outside, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gather_rows.ref import counting
from pallas_kernels.op import tiled

Array = jax.Array
MAX_ROWS = 64
TILE = 64  # gathered rows, and of the other axis what a swizzle of 128 bytes spans
IN_FLIGHT, PROCESSORS = 4, 132
SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of bfloat16
SWIZZLE_32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # of float32


def refuses(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64) -> str | None:
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f'both operands must be bfloat16, what its tensor cores multiply, got {x.dtype}, {w.dtype}'
    return refuses_shape(x.shape[0], w.shape[2], block)


def refuses_shape(rows: int, k: int, block: int) -> str | None:
    if rows > MAX_ROWS:
        return f'{rows} rows are more than {MAX_ROWS}'
    if TILE % block and block % TILE or block % 8:
        return f'blocks of {block} rows do not make up tiles of {TILE} in pieces of 8 or more'
    return f'{k} columns are not made of tiles of {TILE}' if k % TILE else None


def rows_in(x: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64,
            interpret=False) -> Array:
    """As ref.rows_in."""
    rows, k = x.shape
    place, live, unit = _places(ids, active, block)
    tiles, steps = place.shape[0] * unit // TILE, k // TILE
    parts = max(1, min(steps, PROCESSORS // tiles))
    kept = 32 if rows <= 32 else 64  # columns of what is multiplied that are written

    def kernel(layer_ref, live_ref, place_ref, x_ref, w_ref, y_ref, w_tile, x_tile, out, ready):
        tile, part, at = jax.lax.axis_index('tile'), jax.lax.axis_index('part'), layer_ref[0]

        def product(acc):
            def copies(step, slot):
                depth = pl.ds((part + step * parts) * TILE, TILE)
                yield from _gathered(w_ref, at, place_ref, tile, unit, depth, w_tile.at[slot])
                yield x_ref.at[depth], x_tile.at[slot]

            stream(jax.lax.div(steps - part + parts - 1, parts), copies, ready,
                    lambda slot: plgpu.wgmma(acc, w_tile.at[slot], x_tile.at[slot]))
            return acc[...][:, :kept]

        @pl.when(tile * TILE < live_ref[0])
        def _():
            out[...] = pl.run_scoped(product, plgpu.ACC((TILE, MAX_ROWS), jnp.float32))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, y_ref.at[part, pl.ds(tile * TILE, TILE)])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((parts, tiles * TILE, kept), jnp.float32),
        scratch_types=[plgpu.SMEM((IN_FLIGHT, TILE, TILE), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((IN_FLIGHT, TILE, MAX_ROWS), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((TILE, kept), jnp.float32, transforms=SWIZZLE_32),
                       plgpu.Barrier(num_arrivals=TILE // unit + 1, num_barriers=IN_FLIGHT)],
        grid=(tiles, parts), grid_names=('tile', 'part'), interpret=interpret)
    y = run(jnp.asarray(layer, jnp.int32).reshape(1), live, place, jnp.pad(x.T, ((0, 0), (0, MAX_ROWS - rows))), w)
    y = y.sum(0)[:ids.shape[0] * block, :rows].T
    return jnp.where(counting(ids, active, block), y, 0)  # what was not touched may be anything


def rows_out(h: Array, w: Array, ids: Array, active: Array, layer: Array | int = 0, block: int = 64,
             interpret=False) -> Array:
    """As ref.rows_out."""
    rows, k = h.shape[0], w.shape[2]
    place, live, unit = _places(ids, active, block)
    depth, columns = place.shape[0] * unit, tiled(k, TILE, 2 * TILE)
    parts = max(1, min(depth // TILE, PROCESSORS // (k // columns)))
    kept = -(-rows // 8) * 8  # rows of what is multiplied that are read and written; the others are never looked at

    def kernel(layer_ref, live_ref, place_ref, h_ref, w_ref, y_ref, h_tile, w_tile, out, ready):
        column, part, at = jax.lax.axis_index('column'), jax.lax.axis_index('part'), layer_ref[0]
        across = pl.ds(column * columns, columns)
        steps = jax.lax.div(live_ref[0] + TILE - 1, TILE)

        def product(acc):
            def copies(step, slot):
                tile = part + step * parts
                yield from _gathered(w_ref, at, place_ref, tile, unit, across, w_tile.at[slot])
                yield h_ref.at[:, pl.ds(tile * TILE, TILE)], h_tile.at[slot, pl.ds(0, kept)]

            stream(jax.lax.div(steps - part + parts - 1, parts), copies, ready,
                    lambda slot: plgpu.wgmma(acc, h_tile.at[slot], w_tile.at[slot]))
            return acc[...]

        out[...] = pl.run_scoped(product, plgpu.ACC((MAX_ROWS, columns), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[pl.ds(0, kept)], y_ref.at[part, :, across])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((parts, kept, k), jnp.float32),
        scratch_types=[plgpu.SMEM((IN_FLIGHT, MAX_ROWS, TILE), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((IN_FLIGHT, TILE, columns), w.dtype, transforms=SWIZZLE),
                       plgpu.SMEM((MAX_ROWS, columns), jnp.float32, transforms=SWIZZLE_32),
                       plgpu.Barrier(num_arrivals=TILE // unit + 1, num_barriers=IN_FLIGHT)],
        grid=(k // columns, parts), grid_names=('column', 'part'), interpret=interpret)
    h = jnp.where(counting(ids, active, block), h, 0).astype(w.dtype)
    h = jnp.pad(h, ((0, kept - rows), (0, depth - h.shape[1])))
    return run(jnp.asarray(layer, jnp.int32).reshape(1), live, place, h, w).sum(0)[:rows]


def _places(ids: Array, active: Array, block: int) -> tuple[Array, Array, int]:
    """Where pieces of `unit` rows, a block or a tile's worth of one, begin in the matrix, for whole tiles [P]; how many
    rows count [1]; unit."""
    unit = min(block, TILE)
    pieces = jnp.arange(-(-ids.shape[0] * block // TILE) * TILE // unit)
    live = jnp.asarray(active, jnp.int32) * block
    at = jnp.minimum(pieces * unit, jnp.maximum(live - unit, 0))
    place = ids.astype(jnp.int32)[at // block] * block + at % block
    return place.astype(jnp.int32), live.reshape(1), unit


def _gathered(w_ref, layer, place_ref, tile, unit: int, across, tile_ref) -> Iterable:
    """The copies (from, to) that fill a tile with its rows."""
    for i in range(TILE // unit):
        piece = pl.ds(place_ref[tile * (TILE // unit) + i], unit)
        yield w_ref.at[layer, piece, across], tile_ref.at[pl.ds(i * unit, unit)]


def stream(steps: Array, copies: Callable[[Array, Array], Iterable], ready, use: Callable) -> None:
    """use(slot) for each of `steps`, in order, once its copies (from, to) have come; the next ones are on their way."""
    def fetch(step, slot):
        for source, target in copies(step, slot):
            plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    for ahead in range(IN_FLIGHT):
        @pl.when(ahead < steps)
        def _():
            fetch(ahead, ahead)

    def one(step, _):
        slot = jax.lax.rem(step, IN_FLIGHT)
        plgpu.barrier_wait(ready.at[slot])
        use(slot)
        plgpu.wgmma_wait(0)

        @pl.when(step + IN_FLIGHT < steps)
        def _():
            fetch(step + IN_FLIGHT, slot)

    jax.lax.fori_loop(0, steps, one, None)
