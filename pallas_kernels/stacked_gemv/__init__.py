"""Layer k of all stacks (StagFormer), or of slow and fast stream (M2R2), in one launch."""

from pallas_kernels.op import Kernel, Op
from pallas_kernels.stacked_gemv import gpu, ref, specs, tpu


def sizes(x, w, layer=0) -> dict[str, int]:
    return {'stacks': x.shape[0], 'rows': x.shape[1], 'k': x.shape[2], 'n': w.shape[3]}


def cost(x, w, layer=0) -> tuple[int, int]:
    """Bytes: one layer's matrices, the rows in and out. FLOPs: two a multiplication."""
    stacks, rows, k = x.shape
    n = w.shape[3]
    moved = stacks * (k * n * w.dtype.itemsize + rows * (k + n) * x.dtype.itemsize)
    return moved, 2 * stacks * rows * k * n


OP = Op('stacked_gemv', ref.stacked_gemv,
        (Kernel('tpu', tpu.stacked_gemv, tpu.refuses), Kernel('gpu', gpu.stacked_gemv, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED)
