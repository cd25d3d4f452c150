"""Mosaic GPU (Hopper): two launches over the components' logits, and nothing of their size is written.

In the first a block of threads goes down a part of one component's words, every thread with a running maximum and sum
of its own; XLA joins these few. In the second a block of threads mixes the components of a tile of words.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
MAX_COMPONENTS = 32
_LINE, _IN_FLIGHT = 128, 4
_LINES = (8, 6, 4, 2, 1)  # of a tile: threads hold pairs
_BLOCKS = 2 * 132  # of threads, about: two for each multiprocessor of an H100 or H200
_LOWEST = -1e30  # finite: exp(-inf - _LOWEST) is 0


def refuses(log_w: Array, z: Array) -> str | None:
    if z.dtype != jnp.float32:
        return f'z must be float32, got {z.dtype}'
    if log_w.shape != z.shape[:2]:
        return f'log_w {list(log_w.shape)} does not fit z {list(z.shape)}'
    if z.shape[1] > MAX_COMPONENTS:
        return f'{z.shape[1]} components are more than {MAX_COMPONENTS}'
    return f'{z.shape[2]} words are not a multiple of {_LINE}' if z.shape[2] % _LINE else None


def cp_row(log_w: Array, z: Array, interpret=False) -> Array:
    """As ref.cp_row."""
    lines = z.reshape(*z.shape[:2], -1, _LINE)  # one dimension of a copy may have 256 numbers
    size = next(size for size in _LINES if lines.shape[2] % size == 0)
    return _mixed(log_w.astype(jnp.float32) - _lse(lines, size, interpret), lines, size, interpret)


def _lse(z: Array, size: int, interpret) -> Array:
    """[B, r] of z [B, r, W / 128, 128], `size` lines at a time."""
    batch, components, lines = z.shape[:3]
    tiles = lines // size
    parts = max(1, min(tiles, _BLOCKS // (batch * components)))
    each = pl.cdiv(tiles, parts)
    parts = pl.cdiv(tiles, each)  # none of them without a tile

    def kernel(z_ref, top_ref, total_ref, found):
        b, a, part = (jax.lax.axis_index(name) for name in ('row', 'component', 'part'))

        def step(_, tile, carry):
            top, total = carry
            value = tile[...]
            new = jnp.maximum(top, value)
            return new, total * jnp.exp(top - new) + jnp.exp(value - new)

        found[0] = jnp.full((size, _LINE), _LOWEST, jnp.float32)
        found[1] = jnp.zeros((size, _LINE), jnp.float32)
        top, total = plgpu.emit_pipeline(
            step, grid=(jnp.minimum(tiles - part * each, each),), max_concurrent_steps=_IN_FLIGHT,
            init_carry=(found[0], found[1]),  # read back, they lie in registers as the tiles do
            in_specs=[plgpu.BlockSpec((size, _LINE), lambda i: (part * each + i, 0))])(z_ref.at[b, a])
        found[0] = top
        found[1] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(found.at[0], top_ref.at[b, a, part])
        plgpu.copy_smem_to_gmem(found.at[1], total_ref.at[b, a, part])
        plgpu.wait_smem_to_gmem(0)

    each_thread = jax.ShapeDtypeStruct((batch, components, parts, size, _LINE), jnp.float32)
    top, total = plgpu.kernel(
        kernel, out_type=(each_thread, each_thread), scratch_types=[plgpu.SMEM((2, size, _LINE), jnp.float32)],
        grid=(batch, components, parts), grid_names=('row', 'component', 'part'), interpret=interpret)(z)
    highest = top.max((2, 3, 4), keepdims=True)
    return highest[..., 0, 0, 0] + jnp.log((total * jnp.exp(top - highest)).sum((2, 3, 4)))


def _mixed(shift: Array, z: Array, size: int, interpret) -> Array:
    """log sum_a exp(z_a + shift_a): shift [B, r], z [B, r, W / 128, 128] -> [B, W]."""
    batch, components, lines = z.shape[:3]

    def kernel(shift_ref, z_ref, y_ref, tile, out, arrived):
        b, own = jax.lax.axis_index('row'), pl.ds(jax.lax.axis_index('part') * size, size)
        plgpu.copy_gmem_to_smem(z_ref.at[b, :, own], tile, arrived)
        plgpu.barrier_wait(arrived)
        each = [tile[a] + shift_ref[b, a] for a in range(components)]
        top = functools.reduce(jnp.maximum, each, _LOWEST)
        out[...] = top + jnp.log(sum(jnp.exp(value - top) for value in each))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, y_ref.at[b, own])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((batch, lines, _LINE), jnp.float32),
        scratch_types=[plgpu.SMEM((components, size, _LINE), jnp.float32), plgpu.SMEM((size, _LINE), jnp.float32),
                       plgpu.Barrier()],
        grid=(batch, lines // size), grid_names=('row', 'part'), interpret=interpret)(shift, z).reshape(batch, -1)
