"""Blocks of rows that lie anywhere in a large matrix, brought into VMEM a few at a time, the next ones on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array
_IN_FLIGHT = 8 << 20  # bytes of both buffers; VMEM holds 16 MiB or more


def at_once(count: int, block: int, bytes_each: int) -> int:
    """How many of `count` blocks of `block` rows go through the matrix unit together: about the 128 rows it is wide, if
    two buffers of blocks of `bytes_each` fit."""
    return max(1, min(count, 128 // block, _IN_FLIGHT // (2 * bytes_each)))


def refuses_block(block: int, dtype: jnp.dtype, bytes_each: int) -> str | None:
    """Why blocks of `block` rows, `bytes_each` in all they bring, cannot be streamed: they must consist of whole tiles
    of memory, for any other block would be made one by a copy of the whole matrix; and two of them must fit."""
    shared = 32 // jnp.dtype(dtype).itemsize
    if block % shared:
        return f'a block of {block} rows is not made of the {shared} that share a tile of memory'
    return f'two blocks of {bytes_each} bytes are more than {_IN_FLIGHT}' if 2 * bytes_each > _IN_FLIGHT else None


def stream(active: Array, together: int, copies: Callable[[Array, Array, int], Iterable], use: Callable) -> None:
    """For every `together` of positions 0..active-1, in order: use(step, slot) once their blocks are there.

    copies(position, slot, place): what brings the block at `position` to `place` of buffer `slot` (0 or 1). What is
    not active is never copied: its place holds what was there before.
    """
    steps = jax.lax.div(active + together - 1, together)

    def every(step: Array, slot: Array, act: Callable) -> None:
        for place in range(together):
            at = step * together + place

            @pl.when(at < active)
            def _():
                for copy in copies(at, slot, place):
                    act(copy)

    @pl.when(steps > 0)
    def _():
        every(0, 0, lambda copy: copy.start())

    def one(step: Array, _: None) -> None:
        slot = jax.lax.rem(step, 2)

        @pl.when(step + 1 < steps)
        def _():
            every(step + 1, 1 - slot, lambda copy: copy.start())

        every(step, slot, lambda copy: copy.wait())
        use(step, slot)

    jax.lax.fori_loop(0, steps, one, None)
