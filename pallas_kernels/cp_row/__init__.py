"""The conditional law of a CP head at one position, from its components' logits."""

from pallas_kernels.cp_row import gpu, ref, specs, tpu
from pallas_kernels.op import Kernel, Op


def sizes(log_w, z) -> dict[str, int]:
    return {'batch': z.shape[0], 'components': z.shape[1], 'words': z.shape[2]}


def cost(log_w, z) -> tuple[int, int]:
    """Bytes: the logits once, the row. FLOPs: about ten a logit, two exponentials among them."""
    return z.size * z.dtype.itemsize + 4 * z.shape[0] * z.shape[2], 10 * z.size


OP = Op('cp_row', ref.cp_row, (Kernel('tpu', tpu.cp_row, tpu.refuses), Kernel('gpu', gpu.cp_row, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED)
