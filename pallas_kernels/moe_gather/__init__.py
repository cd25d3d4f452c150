"""The chosen experts of a mixture, out of the slots of an expert cache (M2R2) or of all experts."""

from pallas_kernels.moe_gather import gpu, ref, specs, tpu
from pallas_kernels.op import Kernel, Op


def sizes(x, gate, up, down, slots, weights, active, activation='silu') -> dict[str, int]:
    return {'rows': x.shape[0], 'd': x.shape[1], 'f': up.shape[2], 'gates': 1 if gate is None else 2,
            'experts': slots.shape[0]}


def cost(x, gate, up, down, slots, weights, active, activation='silu') -> tuple[int, int]:
    """Bytes: K experts, the rows in and out. FLOPs: two a multiplication. As if all K were active."""
    rows, d = x.shape
    each = (2 if gate is None else 3) * slots.shape[0] * d * up.shape[2]
    return each * up.dtype.itemsize + rows * d * (x.dtype.itemsize + 4), 2 * rows * each


OP = Op('moe_gather', ref.moe_gather,
        (Kernel('tpu', tpu.moe_gather, tpu.refuses), Kernel('gpu', gpu.moe_gather, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED)
