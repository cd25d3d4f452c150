"""The MLP of a layer through the blocks of neurons that a selector keeps (ShadowLLM), ReLU or SwiGLU."""

from pallas_kernels.op import Kernel, Op
from pallas_kernels.sparse_mlp import gpu, ref, specs, tpu


def sizes(x, up, down, ids, active, layer=0, bias=None, own=None, block=16, activation='silu') -> dict[str, int]:
    return {'rows': x.shape[0], 'd': x.shape[1], 'gates': up.shape[1] // down.shape[1], 'kept': ids.shape[0] * block,
            'block': block}


def cost(x, up, down, ids, active, layer=0, bias=None, own=None, block=16, activation='silu') -> tuple[int, int]:
    """Bytes: the weights of K blocks, the rows in and out. FLOPs: two a multiplication. As if all K were active."""
    rows, d = x.shape
    weights = (up.shape[1] // down.shape[1] + 1) * ids.shape[0] * block * d
    return weights * up.dtype.itemsize + rows * d * (x.dtype.itemsize + 4), 2 * rows * weights


OP = Op('sparse_mlp', ref.sparse_mlp,
        (Kernel('tpu', tpu.sparse_mlp, tpu.refuses), Kernel('gpu', gpu.sparse_mlp, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED)
