"""Times ops on the device at hand: the reference as XLA compiles it, the kernel, and what the device can do at most.

Device time: many calls in one program, each fed with a number of the one before, so that none can be left out or
overlap and no launch is waited for by the host. Reference and kernel take turns; medians and middle halves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Kernel, Op, Spec

REPEATS = 7


def row(op: Op, kernel: Kernel, spec: Spec, target_s: float = 0.05, repeats: int = REPEATS) -> dict:
    """One line of the table: seconds a call of both, with quartiles, bytes and FLOPs that the op needs, and the largest
    difference to the reference in float32 over its largest value. target_s: how long a timed program should take."""
    args = spec.arguments()
    runs = {'xla': op.ref, 'kernel': kernel.run}
    timed = {name: _program(run, args, target_s) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (call, count) in timed.items():
            seconds[name].append(_once(call) / count)
    moved, flops = op.cost(*args)
    found = {'op': op.name, 'spec': spec.name, 'sizes': op.sizes(*args), 'dtype': spec.dtype, 'bytes': moved,
             'flops': flops, 'difference': difference(jax.jit(kernel.run, static_argnums=_fixed(args))(*args),
                                                      exact(op, args))}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found |= {f'{name}_s': middle, f'{name}_quartiles': [low, high]}
    return found


def exact(op: Op, args: tuple) -> Any:
    """What the reference says of the same numbers in float32, at full precision."""
    wide = lambda a: a.astype(jnp.float32) if hasattr(a, 'dtype') and jnp.issubdtype(a.dtype, jnp.floating) else a
    args = tuple(jax.tree.map(wide, a) for a in args)
    with jax.default_matmul_precision('highest'):
        return jax.jit(op.ref, static_argnums=_fixed(args))(*args)


def difference(got: Any, want: Any) -> float:
    """Largest difference of any leaf, over the largest value of that leaf."""
    far = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / max(np.abs(np.asarray(b)).max(), 1e-30)
           for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
    return float(max(far))


def rates(megabytes: int = 1024, size: int = 8192) -> dict[str, float]:
    """What this device does at most, measured: bytes/s of a copy (read and written), FLOP/s of a bfloat16 product."""
    x = jnp.ones((megabytes << 20) // 4, jnp.float32)
    a = jnp.ones((size, size), jnp.bfloat16)
    copy, copies = _program(lambda x: x + 1, (x,), 0.2)
    product, products = _program(lambda a: a @ a, (a,), 0.2)
    best = lambda call, count: min(_once(call) for _ in range(REPEATS)) / count
    return {'copy_bytes_per_s': 2 * x.nbytes / best(copy, copies),
            'matmul_flops_per_s': 2 * size ** 3 / best(product, products)}


def _fixed(args: tuple) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if not jax.tree.leaves(a) or not hasattr(jax.tree.leaves(a)[0], 'shape'))


def _program(run: Callable, args: tuple, target_s: float) -> tuple[Callable[[], Any], int]:
    """A compiled program of many calls in a chain, warmed up, and how many it makes."""
    at = next(i for i, a in enumerate(args) if hasattr(a, 'dtype') and jnp.issubdtype(a.dtype, jnp.floating))
    arrays = tuple(i for i in range(len(args)) if i not in _fixed(args))

    @jax.jit
    def chain(given, count):
        def step(_, fed):
            full = list(args)
            for i, value in zip(arrays, given, strict=True):
                full[i] = value
            full[at] = fed
            out = jax.tree.leaves(run(*full))[0]
            # A zero that the compiler cannot know: the next call waits for this one, and nothing of it is dead.
            zero = (out[(0,) * out.ndim] * 0).astype(fed.dtype)
            return fed.at[(0,) * fed.ndim].add(jnp.where(jnp.isfinite(zero), zero, 0))

        return jax.lax.fori_loop(0, count, step, given[arrays.index(at)])

    given = tuple(jnp.asarray(args[i]) if not isinstance(args[i], dict) else args[i] for i in arrays)
    jax.block_until_ready(chain(given, 1))
    once = _once(lambda: chain(given, 2)) / 2
    count = max(2, min(4096, int(target_s / max(once, 1e-7))))
    call = lambda: chain(given, count)
    jax.block_until_ready(call())
    return call, count


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
