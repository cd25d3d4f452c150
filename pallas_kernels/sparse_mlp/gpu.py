"""Mosaic GPU (Hopper): the gathered products of gather_rows, one launch for up (and gate), one for down.

Blocks of threads cannot wait for each other's neurons, so what lies between the two products is XLA's: biases, the
activation and who counts, on K block numbers a row, against block d weights for each of the K.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.gather_rows import gpu as gather
from pallas_kernels.sparse_mlp.ref import activated, counting

Array = jax.Array


def refuses(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0,
            bias: Array | None = None, own: Array | None = None, block: int = 16,
            activation: str = 'silu') -> str | None:
    if any(a.dtype != jnp.bfloat16 for a in (x, up, down)):
        return f'x, up and down must all be bfloat16, what its tensor cores multiply, got {x.dtype}, {up.dtype}'
    return gather.refuses_shape(x.shape[0], x.shape[1], block)


def sparse_mlp(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0,
               bias: Array | None = None, own: Array | None = None, block: int = 16, activation: str = 'silu',
               interpret=False) -> Array:
    """As ref.sparse_mlp."""
    act = activated(activation)
    rows, neurons = x.shape[0], down.shape[1]
    gates, blocks = up.shape[1] // neurons, neurons // block
    # A block of the gate and the same of up in turn: what counts comes first.
    both = (ids[:, None] + jnp.arange(gates) * blocks).reshape(-1)
    y = gather.rows_in(x, up, both, active * gates, layer, block, interpret)
    if bias is not None:
        y = y + bias.reshape(bias.shape[0], -1, block)[layer][both].reshape(-1)
    y = y.reshape(rows, -1, gates, block)
    h = act(y[:, :, 0]) * y[:, :, 1] if gates == 2 else act(y[:, :, 0])
    h = jnp.where(counting(ids, active, own)[..., None], h, 0).reshape(rows, -1).astype(down.dtype)
    return gather.rows_out(h, down, ids, active, layer, block, interpret)
