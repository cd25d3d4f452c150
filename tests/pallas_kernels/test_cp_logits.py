"""What is cp_logits' own: that it is the head's log-sum-exp, and what is never made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cp_logits import OP
from pallas_kernels.cp_logits.gradient import again
from pallas_kernels.cp_logits.ref import cp_logits
from pallas_kernels.modes import interpreter
from tensorhead.lse import linear_lse


def data(rows=5, words=77, width=24):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((rows, width), (words, width), (rows,)))


@pytest.mark.parametrize('frozen', (False, True))
def test_it_is_the_log_sum_exp_of_the_head(frozen):
    h, U, g = data()
    value, back = jax.vjp(lambda h, U: cp_logits(h, U, frozen), h, U)
    want, wanted_back = jax.vjp(lambda h, U: linear_lse(h, U, 16, frozen), h, U)
    for mine, true in zip((value, *back(g)), (want, *wanted_back(g)), strict=True):
        np.testing.assert_allclose(mine, true, atol=1e-5)


@pytest.mark.parametrize('frozen', (False, True))
def test_the_gradient_in_parts_is_that_of_the_whole(frozen, monkeypatch):
    h, U, g = data()
    value, back = jax.vjp(lambda h, U: cp_logits(h, U, frozen), h, U)
    monkeypatch.setattr('pallas_kernels.cp_logits.gradient._LOGITS', 5 * 16)  # the last of five parts reaches back
    for mine, true in zip(again(h, U, value, g, frozen), back(g), strict=True):
        np.testing.assert_allclose(mine, true, atol=1e-5)


def test_the_mean_of_a_frozen_vocabulary_is_its_gradient():
    """The only use of the second product: the other path of the backward pass gives the same."""
    h, U, g = data()
    run = OP.kernel('tpu').run
    of = lambda frozen: jax.grad(lambda h: run(h, U, frozen, interpret=interpreter('tpu')) @ g)(h)
    np.testing.assert_allclose(of(True), of(False), atol=1e-5)


def largest(jaxpr) -> int:
    """Numbers in the largest value that a program makes outside its kernels."""
    is_program = lambda value: hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
    kernels = ('pallas_call', 'core_map')
    inner = [getattr(value, 'jaxpr', value) for eqn in jaxpr.eqns if eqn.primitive.name not in kernels
             for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program) if is_program(value)]
    return max((*(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars), *map(largest, inner)), default=0)


@pytest.mark.parametrize('frozen', (False, True))
@pytest.mark.parametrize('platform', ('tpu', 'gpu', None))
def test_no_logits_are_made(platform, frozen):
    rows, words, width = 4096, 128256, 64
    h, U = (jax.ShapeDtypeStruct((n, width), jnp.bfloat16) for n in (rows, words))
    run = cp_logits if platform is None else OP.kernel(platform).run
    program = jax.make_jaxpr(jax.grad(lambda h, U: run(h, U, frozen).sum(), (0, 1)))(h, U)
    made = largest(program.jaxpr)
    assert made >= rows * words if platform is None else made <= rows * words // 8
