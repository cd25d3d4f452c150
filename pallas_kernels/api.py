"""What other rooms call: the ops by name, each by its reference or by a kernel.

Every function takes `implementation`: None chooses (see choice.py), 'xla' is the reference, 'tpu' or 'gpu' that kernel
or a KernelError that says why not.
"""

from __future__ import annotations

import jax

from pallas_kernels import stacked_gemv as _stacked_gemv
from pallas_kernels.choice import choose
from pallas_kernels.op import Op

Array = jax.Array
OPS = {op.name: op for op in (_stacked_gemv.OP,)}


def _call(op: Op, args: tuple, implementation: str | None):
    kernel = choose(op, args, implementation)
    return op.ref(*args) if kernel is None else kernel.run(*args)


def stacked_gemv(x: Array, w: Array, layer: Array | int = 0, *, implementation: str | None = None) -> Array:
    """x [S, M, K] times w [L, S, K, N] of one layer -> [S, M, N]: a few rows by each of S matrices, in one launch."""
    return _call(_stacked_gemv.OP, (x, w, layer), implementation)
