"""The byte and FLOP model against numbers worked out by hand, and against the parameters that exist."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import layout, model
from backbone.presets import PRESETS
from harness import roofline

SMOL = PRESETS['smollm2-135m']

# By hand. One layer: q 576*576, k and v 576*192 each, o 576*576, gate, up, down 576*1536 each; norms 2*576.
SMOL_LAYER = 331_776 + 2 * 110_592 + 331_776 + 3 * 884_736
SMOL_MATRICES = 30 * SMOL_LAYER + 49_152 * 576  # the tied embedding counts once, as the unembedding
SMOL_VECTORS = 30 * 1152 + 576


def test_smollm2_bytes_of_a_step_by_hand():
    assert SMOL_MATRICES + SMOL_VECTORS == 134_515_008  # all parameters of the model
    cost = roofline.step_cost(SMOL, dtype='float32', context=100)
    assert cost.weight_bytes == 4 * 134_515_008
    assert cost.embed_bytes == 4 * 576  # one row
    assert cost.cache_bytes == 4 * 2 * 30 * 3 * 64 * 101  # keys and values, 3 heads of 64, 30 layers, 101 tokens
    half = roofline.step_cost(SMOL, dtype='bfloat16', context=100)
    assert half.bytes == cost.bytes / 2


def test_smollm2_flops_by_hand():
    one = roofline.step_cost(SMOL, context=0)
    # Two per weight and token; attention scores and values: 2 * 2 * 9 heads * 64 a layer for the one token seen.
    assert one.flops == 2 * SMOL_MATRICES + 4 * 30 * 576
    block = roofline.step_cost(SMOL, batch=3, k_tokens=4, context=10)
    assert block.flops == 3 * (4 * 2 * SMOL_MATRICES + 4 * 30 * 576 * (11 + 12 + 13 + 14))
    assert block.weight_bytes == one.weight_bytes  # read once, whatever the batch and the block
    assert block.cache_bytes == 3 * 4 * 2 * 30 * 192 * 14


def test_a_window_bounds_what_attention_reads():
    windowed = SMOL.replace(attention=dataclasses.replace(SMOL.attention, window=8))
    assert roofline.step_cost(windowed, context=1000).cache_bytes == roofline.step_cost(SMOL, context=7).cache_bytes


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_weights_read_are_the_parameters_that_exist(name):
    cfg = PRESETS[name]
    shapes = model.abstract_params(cfg, jnp.bfloat16)
    total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    gathered = [shapes['embed'][k] for k in ('tokens', 'positions') if k in shapes['embed']]
    rows_only = sum(a.size * 2 for a in gathered)
    if cfg.tie_embeddings:
        rows_only -= shapes['embed']['tokens'].size * 2  # read in full as the unembedding
    batch = 1 if cfg.moe is None else 4096  # so many tokens need every expert
    assert roofline.step_cost(cfg, dtype='bfloat16', batch=batch).weight_bytes == total - rows_only
    assert roofline.embed_scalars(cfg) == sum(a.shape[1] for a in gathered)


def test_olmoe_reads_the_experts_that_its_tokens_need():
    """By hand: 3 * 2048 * 1024 an expert, 8 of 64 a token and layer; attention 4 * 2048^2, router 2048 * 64."""
    cfg, expert = PRESETS['olmoe-1b-7b'], 3 * 2048 * 1024
    rest = 16 * (4 * 2048**2 + 2048 * 64) + 2048 * 50_304
    one = roofline.step_cost(cfg, dtype='bfloat16')
    assert roofline.read_params(cfg)[0] == rest + 16 * 8 * expert
    assert one.weight_bytes == 2 * (rest + 16 * 8 * expert + 16 * 4 * 2048 + 2048)
    assert one.flops == 2 * (rest + 16 * 8 * expert) + 4 * 16 * 2048
    two = roofline.step_cost(cfg, dtype='bfloat16', batch=2)
    assert two.flops == 2 * one.flops
    assert (two.weight_bytes - one.weight_bytes) / (2 * 16 * expert) == pytest.approx(8 - 1)  # of 8 more, 1 is had


def test_the_slower_side_decides():
    device = roofline.Device('toy', 1e9, {'float32': 1e12, 'bfloat16': 1e12}, 1e9)
    one = roofline.step_time(SMOL, device, dtype='bfloat16')
    assert one.bound == 'memory'
    assert one.seconds == pytest.approx(one.cost.bytes / 1e9)
    many = roofline.step_time(SMOL, device, dtype='bfloat16', batch=4096)
    assert many.bound == 'compute'
    assert many.seconds == pytest.approx(many.cost.flops / 1e12)


def test_an_8b_model_on_a_v5e_takes_about_as_long_as_its_bytes_say():
    step = roofline.step_time(PRESETS['llama-3.1-8b'], roofline.DEVICES['tpu-v5e'], dtype='bfloat16')
    # 8.03e9 parameters less the input embedding of 0.525e9, two bytes each, at 819 GB/s.
    assert step.seconds == pytest.approx(2 * (8.030e9 - 0.525e9) / 819e9, rel=1e-3)


@pytest.mark.parametrize(('kind', 'name'), [
    ('TPU v5 lite', 'tpu-v5e'), ('TPU v5p', 'tpu-v5p'), ('TPU v5', 'tpu-v5p'), ('TPU v6 lite', 'tpu-v6e'),
    ('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H200', 'h200')])
def test_chips_are_found_by_what_jax_calls_them(kind, name):
    assert roofline.known_device(kind) is roofline.DEVICES[name]


def test_a_processor_is_not_a_listed_chip():
    assert roofline.known_device('cpu') is None


def test_traced_bytes_count_each_use_at_the_stored_type():
    def fn(stack, x):
        def body(x, w):
            return jax.jit(lambda x, w: x @ w.astype(jnp.float32))(x, w), None
        x, _ = jax.lax.scan(body, x, stack)
        return jax.lax.cond(x.sum() > 0, lambda: x @ x.T, lambda: jnp.zeros((2, 2)))

    stack, x = jax.ShapeDtypeStruct((5, 8, 8), jnp.bfloat16), jax.ShapeDtypeStruct((2, 8), jnp.float32)
    assert roofline.matmul_bytes(fn, stack, x) == 5 * (8 * 8 * 2 + 2 * 8 * 4) + 2 * (2 * 8 * 4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_traced_bytes_of_a_model_step_agree_with_the_model(dtype):
    """Counted on the trace of a real decode step: weights and cache as the model says; activations come on top."""
    cfg = PRESETS['smollm2-135m'].replace(num_layers=3, vocab_size=2048)
    packed = jax.eval_shape(lambda: layout.pack(model.init_params(cfg, jax.random.key(0)), dtype))
    target = model.PlainTarget(cfg, cache_dtype=dtype, stacked=False)
    capacity = 64
    cache = jax.eval_shape(lambda: target.init_cache(1, capacity, 0))
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    counted = roofline.matmul_bytes(lambda p, c, t: target.forward({'base': p}, t, c).logits, packed, cache, tokens)
    # This implementation reads the whole capacity of the cache; norms multiply no matrix.
    cost = roofline.step_cost(cfg, dtype=dtype, context=capacity - 1)
    expected = roofline.read_params(cfg)[0] * roofline.ITEM_BYTES[dtype] + cost.cache_bytes
    assert expected <= counted <= 1.02 * expected
