"""Which implementation a call gets: XLA, unless a measurement on this kind of device says that a kernel is faster.

`measured/<device kind>.json`, written by `python -m pallas_kernels.tune`:
    {"device": ..., "jax": ..., "rows": [{"op", "spec", "sizes", "dtype", "xla_s", "kernel_s", ...}]}
A call is looked up by the op, its dtype and its sizes: the nearest measured shape counts, if none of its sizes is more
than a factor of two away. A shape that nobody measured gets XLA.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import jax

from pallas_kernels.errors import KernelError
from pallas_kernels.op import Kernel, Op

MEASURED = Path(__file__).parent / 'measured'
PLATFORM_OF = {'tpu': 'tpu', 'gpu': 'gpu', 'cuda': 'gpu', 'rocm': None, 'cpu': None}


def choose(op: Op, args: tuple, implementation: str | None = None, platform: str | None = None,
           device_kind: str | None = None) -> Kernel | None:
    """The kernel for a call, or None for the reference compiled by XLA.

    implementation: None, the choice above; 'xla'; or 'tpu' / 'gpu', that kernel or an error.
    platform, device_kind: of the device the call is compiled for; by default the process's own.
    Errors: KernelError for an unknown name, and for a kernel asked for by name that does not take the call.
    """
    if implementation == 'xla':
        return None
    if implementation is not None:
        kernel = op.kernel(implementation)
        if kernel is None:
            known = ', '.join(('xla', *(k.platform for k in op.kernels)))
            raise KernelError(f'{op.name}: no implementation {implementation!r}, only {known}')
        if why := kernel.refuses(*args):
            raise KernelError(f'{op.name} by its {implementation} kernel: {why}')
        return kernel
    kernel = op.kernel(PLATFORM_OF.get(platform or jax.default_backend()) or '')
    if kernel is None or kernel.refuses(*args):
        return None
    row = nearest(table(device_kind or jax.devices()[0].device_kind), op.name, str(args[0].dtype), op.sizes(*args))
    return kernel if row is not None and 'error' not in row and row['kernel_s'] < row['xla_s'] else None


@functools.cache
def table(device_kind: str) -> tuple[dict, ...]:
    """What was measured on this kind of device; empty where nothing was."""
    path = MEASURED / f'{file_name(device_kind)}.json'
    found = json.loads(path.read_text()) if path.exists() else {'rows': [], 'interpreted': False}
    return () if found['interpreted'] else tuple(found['rows'])


def file_name(device_kind: str) -> str:
    return ''.join(c if c.isalnum() else '_' for c in device_kind.lower())


def nearest(rows: tuple[dict, ...], op: str, dtype: str, sizes: dict[str, int]) -> dict | None:
    """The measured row of the shape nearest to `sizes`, None where there is none within a factor of two."""
    def apart(row: dict) -> float:
        return max(abs(math.log2(max(row['sizes'][name], 1) / max(size, 1))) for name, size in sizes.items())

    found = [row for row in rows if row['op'] == op and row['dtype'] == dtype and row['sizes'].keys() == sizes.keys()]
    best = min(found, key=apart, default=None)
    return best if best is not None and apart(best) <= 1 else None
