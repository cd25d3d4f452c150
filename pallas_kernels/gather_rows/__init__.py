"""The projections of the KV groups that a selector keeps: their rows of q, and of o (transposed)."""

from pallas_kernels.gather_rows import gpu, ref, specs, tpu
from pallas_kernels.op import Kernel, Op


def sizes(x, w, ids, active, layer=0, block=64) -> dict[str, int]:
    return {'rows': x.shape[0], 'k': w.shape[2], 'kept': ids.shape[0] * block, 'block': block}


def cost(x, w, ids, active, layer=0, block=64) -> tuple[int, int]:
    """Bytes: K blocks of rows, what comes in, and float32 out. FLOPs: two a multiplication. As if all K were active."""
    rows, k, kept = x.shape[0], w.shape[2], ids.shape[0] * block
    out = k if x.shape[1] == kept else kept
    return kept * k * w.dtype.itemsize + rows * (x.shape[1] * x.dtype.itemsize + 4 * out), 2 * rows * kept * k


IN = Op('rows_in', ref.rows_in, (Kernel('tpu', tpu.rows_in, tpu.refuses), Kernel('gpu', gpu.rows_in, gpu.refuses)),
        specs.IN, sizes, cost, specs.UNSUPPORTED)
OUT = Op('rows_out', ref.rows_out, (Kernel('tpu', tpu.rows_out, tpu.refuses), Kernel('gpu', gpu.rows_out, gpu.refuses)),
         specs.OUT, sizes, cost, specs.UNSUPPORTED)
