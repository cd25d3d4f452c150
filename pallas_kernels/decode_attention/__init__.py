"""Decoding and verification over a KV cache: what is read of it ends with the longest slot a row needs."""

from pallas_kernels.decode_attention import gpu, ref, specs, tpu
from pallas_kernels.op import Kernel, Op


def sizes(q, k, v, pos, lag=0, window=None, ring=False) -> dict[str, int]:
    return {'batch': q.shape[0], 'queries': q.shape[1], 'heads': q.shape[2], 'groups': k.shape[1],
            'head_dim': q.shape[3], 'slots': k.shape[2] if window is None else min(k.shape[2], window)}


def cost(q, k, v, pos, lag=0, window=None, ring=False) -> tuple[int, int]:
    """Bytes: keys and values of a full cache (of a window), queries in and out. FLOPs: two a multiplication."""
    slots = sizes(q, k, v, pos, lag, window, ring)['slots']
    batch, size, heads, hd = q.shape
    moved = 2 * batch * k.shape[1] * slots * hd * k.dtype.itemsize + 2 * batch * size * heads * hd * q.dtype.itemsize
    return moved, 4 * batch * size * heads * slots * hd


OP = Op('decode_attention', ref.decode_attention,
        (Kernel('tpu', tpu.decode_attention, tpu.refuses), Kernel('gpu', gpu.decode_attention, gpu.refuses)),
        specs.SPECS, sizes, cost, specs.UNSUPPORTED)
