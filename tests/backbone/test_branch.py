"""A branch in a loop: one of two values, and no copy of what it carries."""

import jax
import jax.numpy as jnp
import pytest

from backbone.branch import when


def by_conditional(flag, function, carry):
    return jax.lax.cond(flag, function, lambda c: c, carry)


def add_twice(branch):
    """Eight rounds that may add to one of two buffers, and then perhaps to the other."""
    def turn(i, buffers):
        a, b = buffers
        a = branch(i % 2 == 0, lambda a: a.at[i].add(1.0), a)
        return a, branch(a[i] > 0, lambda b: b.at[i].add(a[i] + 1), b)

    return jax.jit(lambda a, b: jax.lax.fori_loop(0, 8, turn, (a, b)), donate_argnums=(0, 1))


@pytest.mark.parametrize('branch', (when, by_conditional))
def test_the_function_runs_where_the_flag_is_up(branch):
    a, b = add_twice(branch)(jnp.zeros(4096), jnp.zeros(4096))
    assert a[:9].tolist() == [1, 0] * 4 + [0] and b[:9].tolist() == [2, 0] * 4 + [0]


def test_a_carried_buffer_is_not_copied():
    buffers = [jax.ShapeDtypeStruct((4096,), jnp.float32)] * 2
    program = add_twice(when).lower(*buffers).compile().as_text()
    assert 'f32[4096]{0} copy(' not in program
