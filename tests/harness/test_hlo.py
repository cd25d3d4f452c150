"""Counting on the text of compiled programs: short pieces of real ones, and one program counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.mesh import make_mesh
from harness import hlo, hlo_costs

# As the TPU compiler writes them, attributes that are not read left out.
LOOP = """
%fused_add (p0: s32[], p1: s32[]) -> s32[] {
  %p0 = s32[]{:T(128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %sum = s32[]{:T(128)} add(%p0, %p1)
}

%inner_body (in.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %in.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%in.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%in.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next.1 = s32[]{:T(128)} add(%i.1, %two)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%x.1), replica_groups={{0,1},{2,3}}, to_apply=%add, \
backend_config={"estimated_cycles":"7"}
  ROOT %out.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next.1, %all-reduce.1)
}

%inner_condition (in.2: (s32[], f32[8,128])) -> pred[] {
  %in.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%in.2), index=0
  %seven = s32[]{:T(128)} constant(7)
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %seven), direction=LT
}

%outer_body (in.3: (s32[], f32[8,128], s32[], s32[])) -> (s32[], f32[8,128], s32[], s32[]) {
  %in.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%in.3), index=0
  %x.3 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%in.3), index=1
  %one.3 = s32[]{:T(128)} get-tuple-element(%in.3), index=2
  %bound.3 = s32[]{:T(128)} get-tuple-element(%in.3), index=3
  %next.3 = s32[]{:T(128)} fusion(%i.3, %one.3), kind=kLoop, calls=%fused_add
  %zero.3 = s32[]{:T(128)} constant(1)
  %start.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero.3, %x.3)
  %while.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start.3), condition=%inner_condition, body=%inner_body
  %y.3 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.3), index=1
  ROOT %out.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%next.3, %y.3, \
%one.3, %bound.3)
}

%outer_condition (in.4: (s32[], f32[8,128], s32[], s32[])) -> pred[] {
  %in.4 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%in.4), index=0
  %bound.4 = s32[]{:T(128)} get-tuple-element(%in.4), index=3
  ROOT %more.4 = pred[]{:T(512)} compare(%bound.4, %i.4), direction=GT
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %one = s32[]{:T(128)} constant(1)
  %bound = s32[]{:T(128)} constant(BOUND)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%copied, %x, %one, %bound)
  %while = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}) while(%start), \
condition=%outer_condition, body=%outer_body
  ROOT %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""

COLLECTIVES = """
%start_part (p.1: bf16[256,128]) -> (bf16[256,128], bf16[1024,128], u32[]) {
  %p.1 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=6, replica_groups=mesh['a'=4,'b'=1] \
{'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%middle_part (p.2: bf16[256,128], p.3: bf16[1024,128]) -> bf16[1024,128] {
  %p.2 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.3 = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.2 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=6, \
replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter (p.4: f32[1024,128]) -> f32[256,128] {
  %p.4 = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[1024,128]{1,0:T(8,128)} all-reduce(%p.4), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %zero.1 = u32[] constant(0)
  ROOT %dynamic-slice.1 = f32[256,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero.1, %zero.1), \
dynamic_slice_sizes={256,128}
}

%wrapped (p.5: s8[64]) -> s8[64] {
  %p.5 = s8[64]{0:T(64)} parameter(0)
  ROOT %all-to-all.1 = s8[64]{0:T(64)} all-to-all(%p.5), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

ENTRY %main (x: bf16[256,128], y: f32[1024,128], z: s8[64]) -> f32[256,128] {
  %x = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[1024,128]{1,0:T(8,128)} parameter(1)
  %z = s8[64]{0:T(64)} parameter(2)
  %begin = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start_part
  %part = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=0
  %whole = bf16[1024,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=1
  %during = bf16[1024,128]{1,0:T(8,128)(2,1)} fusion(%part, %whole), kind=kOutput, calls=%middle_part
  %ags = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %agd = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather-done(%ags)
  %as = ((s8[64]{0}), s8[64]{0}, u32[]) async-start(%z), calls=%wrapped
  %ad = s8[64]{0:T(64)} async-done(%as)
  %cps = (bf16[256,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,2},{2,3}}
  %cpd = bf16[256,128]{1,0:T(8,128)(2,1)} collective-permute-done(%cps)
  %pair = (f32[1024,128]{1,0:T(8,128)}, bf16[256,128]{1,0}) all-reduce(%y, %x), replica_groups={{0,2},{1,3}}, \
to_apply=%add
  ROOT %scattered = f32[256,128]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_nested_loops_multiply():
    module = hlo.parse(LOOP.replace('BOUND', '5'))
    counts = {step.instruction.name: (step.count, step.known) for step in hlo.schedule(module)}
    assert counts['while'] == (1, True)
    assert counts['while.3'] == (5, True)  # the bound is an element of the state; the step is inside a fusion
    assert counts['all-reduce.1'] == (15, True)  # 1, 3, 5 of each
    [found] = hlo_costs.collectives(module)
    assert (found.kind, found.payload, found.count, found.groups) == ('all-reduce', 4096, 15, ((0, 1), (2, 3)))
    assert hlo_costs.work(module).cycles == 15 * 7 and hlo_costs.work(module).complete


def test_a_loop_of_unknown_length_is_said_to_be_one():
    text = LOOP.replace('constant(BOUND)', 'custom-call(), custom_call_target="Read"')
    counts = {step.instruction.name: (step.count, step.known) for step in hlo.schedule(hlo.parse(text))}
    assert counts['all-reduce.1'] == (3, False)
    assert not hlo_costs.work(hlo.parse(text)).complete


def test_the_count_the_compiler_wrote_down_is_taken():
    text = LOOP.replace('constant(BOUND)', 'custom-call(), custom_call_target="Read"').replace(
        'body=%outer_body', 'body=%outer_body, backend_config={"known_trip_count":{"n":"9"}}')
    assert hlo_costs.collectives(hlo.parse(text))[0].count == 27


def test_each_collective_is_counted_once():
    found = hlo_costs.collectives(hlo.parse(COLLECTIVES))
    everyone = ((0, 1, 2, 3),)
    assert [(c.kind, c.payload, c.groups) for c in found] == [
        ('all-gather', 4 * 256 * 128 * 2, everyone),  # spread over two fusions
        ('all-gather', 4 * 256 * 128 * 2, everyone),  # start and done
        ('all-to-all', 64, ((0, 2), (1, 3))),  # in a wrapper; the groups are a transposed table
        ('collective-permute', 256 * 128 * 2, ((0, 1), (1, 2), (2, 3))),
        ('all-reduce', 1024 * 128 * 4 + 256 * 128 * 2, ((0, 2), (1, 3))),  # two arrays at once
        ('reduce-scatter', 1024 * 128 * 4, everyone),  # an all-reduce of which a slice is kept
    ]


def test_shapes():
    [one] = hlo.leaves('bf16[3,5,130]{2,1,0:T(8,128)(2,1)S(1)}')
    assert (one.bytes, one.padded_bytes, one.space) == (3 * 5 * 130 * 2, 3 * 8 * 256 * 2, 1)
    [swapped] = hlo.leaves('f32[130,5]{0,1:T(8,128)}')
    assert swapped.padded_bytes == 8 * 256 * 4  # the first dimension is the minor one
    parts = hlo.leaves('(s32[]{:T(128)}, /*index=1*/pred[7]{0}, f8e4m3fn[2,2]{1,0}, s4[10]{0})')
    assert [leaf.bytes for leaf in parts] == [4, 7, 4, 5]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        hlo.parse('HloModule empty')


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


@pytest.mark.parametrize(('fn', 'shapes'), [
    (lambda a, b: a @ b, ((64, 32), (32, 48))),
    (lambda a, b: jnp.einsum('bij,bjk->bik', a, b), ((5, 64, 32), (5, 32, 48))),
    (lambda a, b: jax.lax.conv(a, b, (1, 1), 'SAME'), ((2, 3, 16, 16), (4, 3, 3, 3))),
], ids=('matmul', 'batched', 'convolution'))
def test_flops_are_those_xla_counts(fn, shapes):
    program = compiled(fn, *shapes)
    costs = program.cost_analysis()
    assert hlo_costs.work(hlo.parse(program.as_text())).flops == pytest.approx(costs['flops'], rel=0.05)


def test_flops_in_a_loop_are_counted_as_often_as_it_runs():
    def fn(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    program = compiled(fn, (16, 64), (7, 64, 64))
    work = hlo_costs.work(hlo.parse(program.as_text()))
    assert work.flops == 7 * 2 * 16 * 64 * 64
    assert work.flops > 3 * program.cost_analysis()['flops']  # which XLA does not do
    # A layer reads its own slice of the stack (copied, then used), not the stack: that would be seven times as much.
    assert 1 < work.bytes / (7 * 64 * 64 * 4) < 5


def test_fsdp_collectives_by_hand():
    """y = x w over data=4: the weight is gathered once, its gradient reduced once; with data=1 neither."""
    rows, wide = 64, 32

    def found(data):
        mesh = make_mesh(data=data)
        place = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
        step = jax.jit(jax.grad(lambda w, x: ((x @ w) ** 2).sum()), out_shardings=NamedSharding(mesh, P('data')))
        text = step.lower(place((wide, wide), 'data'), place((rows, wide), 'data')).compile().as_text()
        return {c.kind: c.payload * c.count for c in hlo_costs.collectives(hlo.parse(text))}

    assert found(1) == {}
    collectives = found(4)
    assert collectives['all-gather'] == wide * wide * 4
    assert collectives.get('all-reduce', 0) + collectives.get('reduce-scatter', 0) == wide * wide * 4


NESTED = """
%only_a_name (n0: bf16[1024,4096]) -> bf16[1024,4096,1] {
  %n0 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %other_shape = bf16[1024,4096,1]{1,0,2:T(8,128)(2,1)} bitcast(%n0)
}

%product (p.0: bf16[4,4096], p.1: bf16[1024,4096]) -> f32[4,1024] {
  %p.0 = bf16[4,4096]{1,0:T(4,128)(2,1)} parameter(0)
  %p.1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %named = bf16[1024,4096,1]{1,0,2:T(8,128)(2,1)} fusion(%p.1), kind=kLoop, calls=%only_a_name
  ROOT %use = USE
}

ENTRY %main (x: bf16[4,4096], w: bf16[1024,4096]) -> f32[4,1024] {
  %x = bf16[4,4096]{1,0:T(4,128)(2,1)} parameter(0)
  %w = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %out = f32[4,1024]{1,0:T(4,128)} fusion(%x, %w), kind=kOutput, calls=%product
}
"""


@pytest.mark.parametrize(('operands', 'of_the_weights'), [('%p.0, %named', 1024), ('%p.0', 0)])
def test_an_operand_that_an_inner_fusion_only_renames_is_read(operands, of_the_weights):
    use = f'f32[4,1024]{{1,0:T(4,128)}} custom-call({operands}), custom_call_target="Other"'
    moved = hlo_costs.work(hlo.parse(NESTED.replace('USE', use))).bytes
    assert moved == 2 * 4 * 4096 + 4 * 4 * 1024 + of_the_weights * 2 * 4096


def test_a_prefetched_slice_counts_once():
    text = """
ENTRY %main (w: bf16[2048,4096]) -> bf16[512,4096] {
  %w = bf16[2048,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = ((bf16[2048,4096]{1,0:T(8,128)(2,1)}), bf16[512,4096]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) \
slice-start(%w), slice={[0:512], [0:4096]}
  ROOT %slice-done = bf16[512,4096]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
}
"""
    assert hlo_costs.work(hlo.parse(text)).bytes == 2 * 512 * 4096
