"""How many FLOPs a second the devices could do: published for a chip, measured for a CPU."""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp

from harness import roofline


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of one local device for matrix products of `dtype`, where the figure is from)."""
    device = jax.devices()[0]
    known = roofline.known_device(device.device_kind)
    if known is not None:
        return known.flops[dtype], f'{known.name}, published'
    # Fake devices of one CPU share its cores.
    return measured_flops(dtype) / len(jax.local_devices()), 'measured on this machine'


@functools.cache
def measured_flops(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of square matrix products in XLA: the median of `repeats`, on this process's first device."""
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.full((size, size), 0.5, dtype)
    product(a, a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
