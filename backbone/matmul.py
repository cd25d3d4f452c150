"""One matrix product, in the kernel's dtype and layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def dense(p: dict[str, Array], x: Array) -> Array:
    """x [..., in] -> [..., out] in x's dtype, accumulated in at least float32.

    p: 'kernel' [in, out] or 'kernel_t' [out, in], and an optional 'bias' [out].
    """
    kernel, axis = (p['kernel'], 0) if 'kernel' in p else (p['kernel_t'], 1)
    y = contract(x, kernel, axis)
    if 'bias' in p:
        y = y + p['bias']
    return y.astype(x.dtype)


def contract(x: Array, kernel: Array, axis: int) -> Array:
    """x [..., in] against `axis` of a matrix -> [..., out] in the accumulation dtype."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
    single = rows.shape[0] == 1 and kernel.dtype == jnp.bfloat16
    if single:  # XLA:CPU has no fast bfloat16 matrix-vector path; two rows take the matrix one
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    y = jax.lax.dot_general(rows, kernel, (((1,), (axis,)), ((), ())), preferred_element_type=wide)
    return (y[:1] if single else y).reshape(*x.shape[:-1], -1)
