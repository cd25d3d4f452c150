"""Mosaic GPU (Hopper): up to 64 query rows of a KV head by tiles of 64 slots that TMA streams in.

Grid (row, KV head, 64 query rows, part of the slots): one row's slots are shared out among blocks of threads, each with
a running softmax over its tiles, because a row and KV head alone would keep few of the multiprocessors busy. What the
parts found is joined outside, in XLA. Products take both operands from shared memory, with the queries padded to the
64 rows of a wgmma; the time is that of the cache's bytes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.limits import BOUNDS, by_head, by_query, common, limits

Array = jax.Array
_ROWS, _SLOTS, _IN_FLIGHT = 64, 64, 4
_BLOCKS = 2 * 132  # of threads, about: two for each multiprocessor of an H100 or H200
_LOWEST = -1e30  # finite: exp2(-inf - _LOWEST) is 0, also where a query has seen nothing yet


def refuses(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
            ring: bool = False) -> str | None:
    if k.dtype != jnp.bfloat16:
        return f'the cache must be bfloat16, what its tensor cores multiply, got {k.dtype}'
    if why := common(q, k, v, pos):
        return why
    if k.shape[3] not in (64, 128) or k.shape[2] % _SLOTS:
        return f'heads must be 64 or 128 wide and slots a multiple of {_SLOTS}, got {k.shape[3]}, {k.shape[2]}'
    return None


def _parts(programs: int, slots: int, window: int | None) -> int:
    """Into how many parts a row's slots go."""
    needed = slots if window is None else min(slots, window + 2 * _SLOTS)
    return max(1, min(_BLOCKS // programs, needed // _SLOTS))


def decode_attention(q: Array, k: Array, v: Array, pos: Array, lag: int = 0, window: int | None = None,
                     ring: bool = False, interpret=False) -> Array:
    """As ref.decode_attention."""
    batch, size, heads, hd = q.shape
    groups, slots = k.shape[1:3]
    above, latest, bounds = limits(pos, size, slots, _SLOTS, lag, window, ring)
    rows = by_head(q, groups).astype(k.dtype)
    count = rows.shape[2]
    tiles = pl.cdiv(count, _ROWS)
    kept = min(_ROWS, pl.cdiv(count, 8) * 8)  # of a tile's rows: written in eights
    parts = _parts(batch * groups * tiles, slots, window)
    rest = tiles * _ROWS - count
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, rest), (0, 0)))
    spread = lambda a: jnp.pad(jnp.tile(a, (1, heads // groups)), ((0, 0), (0, rest)), constant_values=-1)
    first, blocks, turn, base, lowest, highest = range(len(BOUNDS))
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    swizzle_f32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    # The interpreter of JAX 0.10 knows neither layouts nor transposed operands.
    lay = (lambda a, layout: a) if interpret else plgpu.layout_cast
    layout = plgpu.Layout.WGMMA
    along = layout.reduce(1)
    widen = lambda a, shape: jax.lax.broadcast_in_dim(a, shape, (0,))

    def kernel(bounds_ref, above_ref, latest_ref, q_ref, k_ref, v_ref, y_ref, top_ref, total_ref,
               q_tile, sees, p_tile, out, row, turned, arrived):
        b, group = jax.lax.axis_index('row'), jax.lax.axis_index('group')
        tile, part = jax.lax.axis_index('tile'), jax.lax.axis_index('part')
        own = pl.ds(tile * _ROWS, _ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, group, own], q_tile, arrived)
        plgpu.copy_gmem_to_smem(above_ref.at[b, own], sees.at[0], arrived)
        plgpu.copy_gmem_to_smem(latest_ref.at[b, own], sees.at[1], arrived)
        plgpu.barrier_wait(arrived)
        above, latest = lay(sees[0], along), lay(sees[1], along)
        each = (bounds_ref[b, blocks] + parts - 1) // parts
        begin = bounds_ref[b, first] + part * each
        steps = jnp.clip(bounds_ref[b, blocks] - part * each, 0, each)
        turn_b, base_b = bounds_ref[b, turn], bounds_ref[b, base]
        lowest_b, highest_b = bounds_ref[b, lowest], bounds_ref[b, highest]

        def held(shape, axis, start):
            """Positions of a tile's slots along an axis."""
            slot = lay(jax.lax.broadcasted_iota(jnp.int32, shape, axis), layout) + start
            return slot + jnp.where(slot > base_b, turn_b - slots, turn_b)

        def step(at, k_tile, v_tile, carry):
            top, total, y = carry
            start = (begin + at[0]) * _SLOTS

            def product(acc):
                plgpu.wgmma(acc, q_tile, transposed(k_tile, turned))
                return acc[...]

            scores = pl.run_scoped(product, plgpu.ACC((_ROWS, _SLOTS), jnp.float32))
            scores = scores * (hd ** -0.5 * math.log2(math.e))
            j = held((_ROWS, _SLOTS), 1, start)
            scores = jnp.where((j > widen(above, j.shape)) & (j <= widen(latest, j.shape)), scores, -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=1))
            p = jnp.exp2(scores - widen(new, scores.shape))
            old = jnp.exp2(top - new)
            p_tile[...] = p.astype(p_tile.dtype)

            # What no query sees is multiplied by 0, and 0 x NaN is NaN. Tiles inside the bounds have no such slot.
            @pl.when(ring | (start <= lowest_b) | (start + _SLOTS - 1 > highest_b))
            def _():
                j = held((_SLOTS, hd), 0, start)
                v_tile[...] = jnp.where((j > lowest_b) & (j <= highest_b), v_tile[...], jnp.zeros((), v_tile.dtype))

            plgpu.commit_smem()

            def weighed(acc):
                plgpu.wgmma(acc, p_tile, v_tile)
                return acc[...]

            added = pl.run_scoped(weighed, plgpu.ACC((_ROWS, hd), jnp.float32))
            return new, total * old + p.sum(axis=1), y * widen(old, y.shape) + added

        def transposed(ref, spare):
            if not interpret:
                return plgpu.transpose_ref(ref, (1, 0))
            spare[...] = ref[...].T
            return spare

        nothing = (lay(jnp.full((_ROWS,), _LOWEST, jnp.float32), along), lay(jnp.zeros((_ROWS,), jnp.float32), along),
                   lay(jnp.zeros((_ROWS, hd), jnp.float32), layout))
        tile_of = plgpu.BlockSpec((_SLOTS, hd), lambda i: (begin + i, 0), transforms=swizzle)
        top, total, y = plgpu.emit_pipeline(
            step, grid=(steps,), in_specs=[tile_of, tile_of], max_concurrent_steps=_IN_FLIGHT, init_carry=nothing,
        )(k_ref.at[b, group], v_ref.at[b, group])

        out[...] = y
        row[0, :] = top
        row[1, :] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[pl.ds(0, kept)], y_ref.at[part, b, group, tile])
        plgpu.copy_smem_to_gmem(row.at[0], top_ref.at[part, b, group, tile])
        plgpu.copy_smem_to_gmem(row.at[1], total_ref.at[part, b, group, tile])
        plgpu.wait_smem_to_gmem(0)

    lead = (parts, batch, groups, tiles)
    each_row = jax.ShapeDtypeStruct((*lead, _ROWS), jnp.float32)
    run = plgpu.kernel(
        kernel, out_type=(jax.ShapeDtypeStruct((*lead, kept, hd), jnp.float32), each_row, each_row),
        scratch_types=[plgpu.SMEM((_ROWS, hd), k.dtype, transforms=swizzle),
                       plgpu.SMEM((2, _ROWS), jnp.int32),
                       plgpu.SMEM((_ROWS, _SLOTS), k.dtype, transforms=swizzle),
                       plgpu.SMEM((_ROWS, hd), jnp.float32, transforms=swizzle_f32),
                       plgpu.SMEM((2, _ROWS), jnp.float32),
                       plgpu.SMEM((hd, _SLOTS) if interpret else (8, 64), k.dtype, transforms=swizzle),
                       plgpu.Barrier(num_arrivals=3)],
        grid=(batch, groups, tiles, parts), grid_names=('row', 'group', 'tile', 'part'), interpret=interpret)
    y, top, total = run(bounds, spread(above), spread(latest), rows, k, v)
    return by_query(_joined(y, top, total, count), size).astype(q.dtype)


def _joined(y: Array, top: Array, total: Array, count: int) -> Array:
    """Sums y [parts, B, KH, tiles, rows, hd] that were scaled by 2^-top, and their weights' -> [B, KH, count, hd]."""
    top, total = (a[..., :y.shape[-2]] for a in (top, total))
    share = jnp.exp2(top - top.max(0))
    total = (total * share).sum(0)[..., None]
    y = jnp.where(total > 0, (y * share[..., None]).sum(0) / total, 0)
    return y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :count]
