"""One matrix product, in the kernel's dtype and layout.

A kernel is stored as 'kernel' [in, out] (trains, shards, runs everywhere on XLA) or, packed for decoding
on a CPU, as 'kernel_t' [out, in]: then a few rows go through C (backbone/native), which reads the
weights once at memory speed and gives every row the same bits whatever its neighbours are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from backbone import native

Array = jax.Array


def dense(p: dict[str, Array], x: Array) -> Array:
    """x [..., in] -> [..., out] in x's dtype, accumulated in at least float32.

    p: 'kernel' [in, out] or 'kernel_t' [out, in], and an optional 'bias' [out].
    """
    y = contract(x, p['kernel'], 0) if 'kernel' in p else contract_packed(x, p['kernel_t'])
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


def product(form: str, x: Array, kernel: Array) -> Array:
    """The same for any einsum `form` of x and a kernel: operands in the kernel's dtype, the sum in at least float32."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return jnp.einsum(form, x.astype(kernel.dtype), kernel, preferred_element_type=wide)


def contract_packed(x: Array, kernel_t: Array) -> Array:
    """x [..., in] against kernel_t [out, in] -> [..., out]; the native product where it applies."""
    rows = x.reshape(-1, x.shape[-1]).astype(kernel_t.dtype)
    if not native.takes_product(rows.shape[0], kernel_t.dtype):
        return contract(x, kernel_t, 1)
    y = jax.lax.platform_dependent(rows, kernel_t, cpu=native.matmul, default=lambda a, b: contract(a, b, 1))
    return y.reshape(*x.shape[:-1], -1)
