"""What differs between versions of JAX, in one place."""

from __future__ import annotations

import dataclasses


def interpreter(platform: str, races: bool = False):
    """What a kernel's `interpret` takes on a CPU host. races: afterwards `races_found` tells."""
    if platform == 'tpu':
        from jax.experimental.pallas import tpu
        params = tpu.InterpretParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name before JAX 0.11
        params = InterpretGPUParams
    known = {field.name for field in dataclasses.fields(params)}
    quiet = {'on_race': 'warn'} if 'on_race' in known else {}  # newer ones would raise: one way to find out for all
    return params(detect_races=races, **quiet)


def races_found(platform: str) -> bool:
    """Whether the kernel interpreted last, with races=True, reads or writes what another thread or copy writes.

    Its outputs must be there already (block_until_ready). JAX keeps the finding where no public name leads.
    """
    if platform == 'tpu':
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call
        return interpret_pallas_call.races.races_found
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpret_gpu_call
    return interpret_gpu_call.get_races().races_found
