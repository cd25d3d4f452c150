"""An MLP through some blocks of its neurons. The others are not read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.errors import KernelError

Array = jax.Array
_ACTIVATIONS = {'relu': lambda a: jnp.maximum(a, 0), 'silu': lambda a: a * jax.nn.sigmoid(a)}


def sparse_mlp(x: Array, up: Array, down: Array, ids: Array, active: Array, layer: Array | int = 0,
               bias: Array | None = None, own: Array | None = None, block: int = 16,
               activation: str = 'silu') -> Array:
    """x [M, d] -> [M, d], float32 at least: the sum over what is kept of act(up x) down, or act(gate x) (up x) down.

    Neurons are rows, and `block` of them in a row a block. up [L, n, d]; or [L, 2 n, d], the gate's first. down
    [L, n, d]. bias [L, n] or [L, 2 n]: of up and gate. layer [] or int. ids [K] int32: blocks, in any order, of which
    the first `active` [] count. own [M, K]: which of them a row goes through, above 0; all without.
    What does not count adds nothing, not even a NaN. Errors: KernelError for an unknown activation.
    """
    act = activated(activation)
    wide, blocks = jnp.promote_types(up.dtype, jnp.float32), down.shape[1] // block
    gates = up.shape[1] // down.shape[1]
    rows = up.reshape(-1, gates, blocks, block, up.shape[2])[layer][:, ids]
    y = jnp.einsum('md,gkbd->gmkb', x.astype(up.dtype), rows, preferred_element_type=wide)
    if bias is not None:
        y = y + bias.reshape(-1, gates, 1, blocks, block)[layer][:, :, ids]
    h = act(y[0]) * y[1] if gates == 2 else act(y[0])
    h = jnp.where(counting(ids, active, own)[..., None], h, 0).astype(down.dtype)
    return jnp.einsum('mkb,kbd->md', h, down.reshape(-1, blocks, block, down.shape[2])[layer][ids],
                      preferred_element_type=wide)


def counting(ids: Array, active: Array, own: Array | None) -> Array:
    """bool [M or 1, K]: which blocks a row goes through."""
    live = (jnp.arange(ids.shape[0]) < active)[None]
    return live if own is None else live & (own > 0)


def activated(name: str):
    if name not in _ACTIVATIONS:
        raise KernelError(f'activation: unknown {name!r}, one of {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]
