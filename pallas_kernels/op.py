"""What an op is: a reference, kernels that may stand in for it, and the shapes all of them are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PLATFORMS = ('tpu', 'gpu')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One op on one platform.

    run(*args, interpret=False): as the reference's positional arguments; `interpret` is what pallas_call takes.
    refuses(*args) -> None, or why it does not take arguments of these shapes and types (ShapeDtypeStructs will do).
    """

    platform: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


class Draw:
    """Makes the arrays of a spec: random ones, or only their shapes."""

    def __init__(self, seed: int | None = 0):
        self._rng = None if seed is None else np.random.default_rng(seed)

    def normal(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Any:
        if self._rng is None:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return jnp.asarray(scale * self._rng.standard_normal(shape, np.float32), dtype)

    def integers(self, shape: tuple[int, ...], low: int, high: int) -> Any:
        """int32 in low..high-1."""
        if self._rng is None:
            return jax.ShapeDtypeStruct(shape, jnp.int32)
        return jnp.asarray(self._rng.integers(low, high, shape), jnp.int32)

    def given(self, values: Any, dtype: str = 'int32') -> Any:
        """These values, for edges that chance would not hit."""
        array = np.asarray(values, dtype)
        return jax.ShapeDtypeStruct(array.shape, array.dtype) if self._rng is None else jnp.asarray(array)


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """One shape of an op. make(draw) -> its arguments: arrays made by `draw`, and static values.

    sizes: what the shape is called in tables, and what a measurement is looked up by.
    bench: a shape worth timing on a device; such shapes are too large to interpret. Others are for tests.
    tolerance: largest difference to the reference over the reference's largest value.
    """

    name: str
    dtype: str
    make: Callable[[Draw], tuple]
    bench: bool = False
    tolerance: float = 1e-5

    def arguments(self, seed: int = 0) -> tuple:
        return self.make(Draw(seed))

    def shapes(self) -> tuple:
        """The arguments with ShapeDtypeStructs in the place of arrays, at no cost in memory."""
        return self.make(Draw(None))


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """name; ref(*args); kernels; specs.

    sizes(*args): what a call is looked up by among measurements. cost(*args): (bytes, FLOPs) that it cannot do without.
    unsupported: by platform, the names of specs its kernel does not take, each with (part of) the reason it gives.
    gradient: the numbers of the arguments that its kernels can be differentiated by.
    """

    name: str
    ref: Callable[..., Any]
    kernels: tuple[Kernel, ...]
    specs: tuple[Spec, ...]
    sizes: Callable[..., dict[str, int]]
    cost: Callable[..., tuple[int, int]]
    unsupported: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    gradient: tuple[int, ...] = ()

    def kernel(self, platform: str) -> Kernel | None:
        return next((kernel for kernel in self.kernels if kernel.platform == platform), None)


def tiled(size: int, unit: int, limit: int) -> int | None:
    """The largest multiple of `unit` up to `limit` that divides `size`, or None: a block that leaves no rest."""
    found = [block for block in range(unit, min(size, limit) + 1, unit) if size % block == 0]
    return found[-1] if found else None
