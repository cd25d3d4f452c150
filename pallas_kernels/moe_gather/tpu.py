"""Mosaic TPU: one expert after the other, a few of its neurons at a time, through VMEM.

Slots are prefetched scalars, read by the index maps. Steps beyond what is active ask for the block before them again,
which is not fetched again; what the neurons make never leaves VMEM.

For widths that are no multiple of 128 see sparse_mlp/tpu.py: it matters how the matrices are kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.op import tiled
from pallas_kernels.sparse_mlp.ref import activated

Array = jax.Array
MAX_ROWS = 64
_TILE_BYTES = 4 << 20  # of gate, up and down together; two tiles are in flight, and VMEM holds 16 MiB or more


def refuses(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array, active: Array,
            activation: str = 'silu') -> str | None:
    if {x.dtype, down.dtype} != {up.dtype} or up.dtype not in (jnp.float32, jnp.bfloat16):
        return f'x and weights must all be float32 or bfloat16, got {x.dtype}, {up.dtype}, {down.dtype}'
    if x.shape[0] > MAX_ROWS:
        return f'{x.shape[0]} rows are more than {MAX_ROWS}'
    if _neurons(gate, up) is None:
        return f'{up.shape[2]} neurons have no tiles that fit: they go by 128'
    return None


def _neurons(gate: Array | None, up: Array) -> int | None:
    """How many neurons are a tile."""
    _, d, f = up.shape
    limit = _TILE_BYTES // ((2 if gate is None else 3) * d * up.dtype.itemsize)
    return f if f <= limit else tiled(f, 128, limit)


def moe_gather(x: Array, gate: Array | None, up: Array, down: Array, slots: Array, weights: Array, active: Array,
               activation: str = 'silu', interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As ref.moe_gather."""
    act = activated(activation)
    (rows, d), (_, _, f), count = x.shape, up.shape, slots.shape[0]
    neurons = _neurons(gate, up)
    tiles = f // neurons
    # Said outright: Mosaic refuses bfloat16 products under a process-wide precision of `highest`.
    precision = jax.lax.Precision.HIGHEST if up.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(a: Array, b: Array) -> Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)

    def kernel(slots_ref, active_ref, x_ref, share_ref, *refs):
        *into, down_ref, y_ref = refs
        k, tile = pl.program_id(0), pl.program_id(1)

        @pl.when((k == 0) & (tile == 0))
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

        @pl.when(k < active_ref[0])
        def _():
            h = [product(x_ref[...], w_ref[0]) for w_ref in into]
            h = act(h[0]) * h[1] if len(into) == 2 else act(h[0])
            y, share = product(h.astype(down_ref.dtype), down_ref[0]), share_ref[0]
            y_ref[...] += jnp.where(share > 0, share * y, 0)

    def place(k, tile, slots, active):
        counts = k < active[0]
        slot = slots[jnp.minimum(k, jnp.maximum(active[0] - 1, 0))]
        return slot, jnp.where(counts, tile, tiles - 1)

    def columns(k, tile, slots, active):
        slot, tile = place(k, tile, slots, active)
        return slot, 0, tile

    def lines(k, tile, slots, active):
        slot, tile = place(k, tile, slots, active)
        return slot, tile, 0

    into = [w for w in (gate, up) if w is not None]
    whole = lambda k, tile, slots, active: (0, 0)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(count, tiles),
            in_specs=[pl.BlockSpec((rows, d), whole),
                      pl.BlockSpec((1, rows, 1), lambda k, tile, slots, active: (k, 0, 0)),
                      *(pl.BlockSpec((1, d, neurons), columns) for _ in into),
                      pl.BlockSpec((1, neurons, d), lines)],
            out_specs=pl.BlockSpec((rows, d), whole)),
        out_shape=jax.ShapeDtypeStruct((rows, d), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary', 'arbitrary')),
        interpret=interpret,
    )(slots.astype(jnp.int32), jnp.asarray(active, jnp.int32).reshape(1), x, weights.astype(jnp.float32).T[..., None],
      *into, down)
