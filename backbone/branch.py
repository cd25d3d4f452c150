"""A branch that leaves what it does not change where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar('T')


def when(flag: jax.Array, function: Callable[[T], T], carry: T) -> T:
    """function(carry) where the scalar `flag` is true, else carry, of the same shapes and types; not both are computed.

    A loop of at most one turn: XLA updates what a loop carries in place, while a conditional copies the arrays that go
    in and out of it, key/value caches among them.
    """
    def turn(state: tuple[Any, T]) -> tuple[Any, T]:
        return jax.numpy.zeros_like(state[0]), function(state[1])

    return jax.lax.while_loop(lambda state: state[0], turn, (flag, carry))[1]
