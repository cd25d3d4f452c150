"""Every kernel against its reference: interpreted, lowered for its platform, and compiled by that platform's compiler.

An op brings its own tests only for what is its own (negative controls, edges); these hold for all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from backbone.errors import CompilerMissing
from harness import topology
from pallas_kernels import api
from pallas_kernels.modes import interpreter, races_found
from pallas_kernels.op import Op, Spec

CASES = [(op, kernel, spec) for op in api.OPS.values() for kernel in op.kernels for spec in op.specs
         if not spec.bench and spec.name not in op.unsupported.get(kernel.platform, ())]


def named(case):
    return '-'.join((case[0].name, case[1].platform, case[2].name))


def once_an_op(cases):
    """The first shape of each kernel in the suite, the others as slow tests."""
    seen = set()
    for case in cases:
        key = case[0].name, case[1].platform
        yield pytest.param(case, id=named(case), marks=() if key not in seen else pytest.mark.slow)
        seen.add(key)


@functools.cache
def arguments(op: Op, spec: Spec):
    """The arguments of a spec, and what the reference says of them."""
    args = spec.arguments()
    return args, jax.jit(op.ref, static_argnums=statics(args))(*args)


def statics(args) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if not hasattr(a, 'shape') and not isinstance(a, dict))


def close(got, want, tolerance):
    """Leaf by leaf, relative to the largest value of the reference's leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == true.shape and mine.dtype == true.dtype
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        np.testing.assert_allclose(mine, true, rtol=0, atol=tolerance * max(np.abs(true).max(initial=0), 1e-30))


@pytest.mark.parametrize('case', [pytest.param(case, id=named(case)) for case in CASES])
def test_interpreted_it_is_the_reference(case):
    op, kernel, spec = case
    args, want = arguments(op, spec)
    assert kernel.refuses(*args) is None
    close(kernel.run(*args, interpret=interpreter(kernel.platform)), want, spec.tolerance)


@pytest.mark.parametrize('op', api.OPS.values(), ids=lambda op: op.name)
def test_what_is_not_supported_is_listed(op):
    """Of every shape, tests' and devices': a kernel takes it, or the op's list says why it does not."""
    for kernel in op.kernels:
        listed = op.unsupported.get(kernel.platform, {})
        assert listed.keys() <= {spec.name for spec in op.specs}
        for spec in op.specs:
            why = kernel.refuses(*spec.shapes())
            assert (why is None) == (spec.name not in listed), (spec.name, why)
            assert why is None or listed[spec.name] in why


@pytest.mark.parametrize('case', once_an_op(CASES))
def test_no_races(case):
    op, kernel, spec = case
    args, want = arguments(op, spec)
    got = jax.block_until_ready(kernel.run(*args, interpret=interpreter(kernel.platform, races=True)))
    assert not races_found(kernel.platform)
    close(got, want, spec.tolerance)


def test_a_race_would_be_found():
    """Negative control: what a copy into scratch has not brought yet is read."""
    def early(x_ref, y_ref, buffer, done):
        copy = pltpu.make_async_copy(x_ref, buffer, done)
        copy.start()
        y_ref[...] = buffer[...]
        copy.wait()

    x = jnp.ones((8, 128))
    run = pl.pallas_call(early, out_shape=x, in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                         scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
                         interpret=interpreter('tpu', races=True))
    jax.block_until_ready(run(x))
    assert races_found('tpu')


@pytest.mark.parametrize('case', once_an_op([case for case in CASES if case[0].gradient]))
def test_its_gradients_are_those_of_the_reference(case):
    op, kernel, spec = case
    args, want = arguments(op, spec)
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), want)

    def loss(run):
        def of(*given):
            full = list(args)
            for at, value in zip(op.gradient, given, strict=True):
                full[at] = value
            out = run(*full)
            return sum(jnp.vdot(w, leaf).astype(jnp.float32)
                       for w, leaf in zip(jax.tree.leaves(weights), jax.tree.leaves(out), strict=True))
        return of

    given = [args[at] for at in op.gradient]
    which = tuple(range(len(given)))
    got = jax.grad(loss(functools.partial(kernel.run, interpret=interpreter(kernel.platform))), which)(*given)
    close(got, jax.grad(loss(op.ref), which)(*given), 10 * spec.tolerance)


@pytest.mark.parametrize('case', once_an_op(CASES))
def test_it_lowers_for_its_platform(case):
    op, kernel, spec = case
    args, _ = arguments(op, spec)
    lowered = jax.jit(kernel.run, static_argnums=statics(args)).trace(*args).lower(
        lowering_platforms=({'tpu': 'tpu', 'gpu': 'cuda'}[kernel.platform],))
    assert 'custom_call' in lowered.as_text()


def every(platform):
    """All shapes that a platform's kernels take, devices' included."""
    return [(op, kernel, spec) for op in api.OPS.values() for kernel in op.kernels for spec in op.specs
            if kernel.platform == platform and spec.name not in op.unsupported.get(platform, ())]


def compiled(case, name):
    """The program's text. Skips, with the reason, where there is no compiler for that device."""
    op, kernel, spec = case
    try:
        place = jax.sharding.SingleDeviceSharding(topology.get(name)[0][0])
    except CompilerMissing as error:
        pytest.skip(str(error))
    args = spec.shapes()
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) if hasattr(a, 'shape') else a for a in args]
    return jax.jit(kernel.run, static_argnums=statics(args)).lower(*shapes).compile().as_text()


@pytest.mark.parametrize('name', ('v5e:1x1', pytest.param('v6e:1x1', marks=pytest.mark.slow)))
@pytest.mark.parametrize('case', once_an_op(every('tpu')))
def test_the_tpu_compiler_takes_it(case, name):
    assert 'tpu_custom_call' in compiled(case, name)


@pytest.mark.slow
@pytest.mark.parametrize('case', [pytest.param(case, id=named(case)) for case in every('gpu')])
def test_the_gpu_compiler_takes_it(case):
    assert 'mosaic_gpu' in compiled(case, 'h200:1')
