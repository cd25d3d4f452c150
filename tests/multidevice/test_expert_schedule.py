"""What a TPU would do while guessed experts travel, read off the schedule that its compiler makes without one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.config import MoeConfig
from backbone.errors import CompilerMissing
from backbone.mesh import make_mesh
from backbone.model import init_params
from harness import hlo, topology
from m2r2 import expert_gather
from m2r2.expert_guess import NextRouter
from m2r2.expert_mesh import MeshTarget
from tests.conftest import tiny_config

SLOTS, ROWS, CAPACITY = 6, 8, 2048


def model(layers):
    cfg = tiny_config(vocab=512, hidden=1024, layers=layers, heads=8, kv_heads=8, max_seq_len=CAPACITY)
    return cfg.replace(mlp=dataclasses.replace(cfg.mlp, intermediate_size=512), moe=MoeConfig(32, 4))


@pytest.fixture(scope='module')
def chips():
    try:
        return topology.get('v5e:2x4')[0]
    except CompilerMissing as error:
        pytest.skip(str(error))


def schedule(chips, layers, lead, **settings):
    """The instructions of a decode step, in the order that a chip runs them. Experts are spread over eight chips."""
    cfg, mesh = model(layers), make_mesh(expert=8, devices=chips)
    target = MeshTarget(cfg, NextRouter(lead), SLOTS, cache_dtype='bfloat16', **settings)

    def make():
        base = init_params(cfg, jax.random.key(0), jnp.bfloat16)
        unstacked = tuple(jax.tree.map(lambda a: a[l], base['layers']) for l in range(layers))
        return {'base': expert_gather.pack(base | {'layers': unstacked})}

    params = jax.eval_shape(make)
    cache = jax.eval_shape(lambda: target.init_cache(ROWS, CAPACITY, 0))
    tokens = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
    put = lambda tree, places: jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree,
                                            places)
    everywhere = lambda tree: put(tree, jax.tree.map(lambda a: NamedSharding(mesh, P()), tree))
    with jax.set_mesh(mesh):
        lowered = jax.jit(target.forward, donate_argnums=2).lower(
            put(params, expert_gather.packed_shardings(cfg, params, mesh)), everywhere(tokens), everywhere(cache))
    text = lowered.compile().as_text()
    assert 'is_scheduled=true' in text
    return list(hlo.parse(text).entry.instructions.values())


def spans(order, m):
    """Where the collectives that gather experts for layer m start and are done; the same place if nothing can run
    between."""
    place = {instruction.name: i for i, instruction in enumerate(order)}
    found = []
    for i, done in enumerate(order):
        weights = any(len(array.dims) == 4 for array in done.arrays)  # a sum of them may be one with another sum
        if done.opcode == 'all-reduce' and weights:
            found.append((i, i))
        elif not re.search(rf'/prefetch_{m}/.*(ppermute|all_gather|reduce_scatter)', done.op_name):
            continue
        elif done.opcode == 'collective-permute-done':
            found.append((place[done.operands[0]], i))
        elif 'async-collective-done' in done.name:
            found.append((place[done.name.replace('-done', '-start')], i))
        elif done.opcode in ('all-gather', 'reduce-scatter'):
            found.append((i, i))
    assert found
    return found


def products(order, l):
    """Where the scores and the values of layer l's attention are computed."""
    found = [i for i, instruction in enumerate(order) if re.search(rf'/attention_{l}/bkm', instruction.op_name)
             and instruction.opcode in ('fusion', 'dot', 'convolution')]
    assert len(found) >= 2
    return found


def covered(order, m, l):
    """Whether all of layer l's attention lies between some start and done of the gathering for layer m."""
    return all(any(start < i < done for start, done in spans(order, m)) for i in products(order, l))


def test_guessed_experts_travel_during_attention(chips):
    """Guessed one layer ahead: the gathering starts before the attention of the layer and is done after it."""
    order = schedule(chips, 2, 1)
    assert covered(order, 1, 1)


def test_experts_gathered_on_demand_do_not(chips):
    """The control: what the router asked for is gathered after the attention, and nothing but waiting is left."""
    order = schedule(chips, 2, 1, wait=True)
    assert not covered(order, 1, 1)
    assert min(start for start, _ in spans(order, 1)) > max(products(order, 1))


@pytest.mark.slow
def test_two_layers_ahead(chips):
    order = schedule(chips, 3, 2)
    assert covered(order, 2, 1) and covered(order, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(('form', 'overlaps'), [('scatter', True), ('gather', True), ('ring', True), ('sum', False)])
def test_what_the_compiler_makes_of_each_form(chips, form, overlaps):
    """An all-reduce is one step for it; all-gathers and permutes it can run beside other work."""
    order = schedule(chips, 2, 1, form=form)
    assert covered(order, 1, 1) == overlaps
    assert any(start < done for start, done in spans(order, 1)) == overlaps
