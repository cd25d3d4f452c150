"""The vocabulary's log-sum-exp and its gradient, without the logits."""

from pallas_kernels.cp_logits import gpu, ref, specs, tpu
from pallas_kernels.op import Kernel, Op


def sizes(h, U, frozen=False) -> dict[str, int]:
    return {'rows': h.shape[0], 'words': U.shape[0], 'width': U.shape[1]}


def cost(h, U, frozen=False) -> tuple[int, int]:
    """Of the forward pass. Bytes: the vocabulary once, the rows. FLOPs: two a multiplication."""
    (rows, width), words = h.shape, U.shape[0]
    return U.size * U.dtype.itemsize + h.size * h.dtype.itemsize + 4 * rows, 2 * rows * words * width


OP = Op('cp_logits', ref.cp_logits,
        (Kernel('tpu', tpu.cp_logits, tpu.refuses), Kernel('gpu', gpu.cp_logits, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED, gradient=(0, 1))
