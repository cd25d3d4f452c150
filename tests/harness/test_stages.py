"""Hops and stages: against limits and byte counts worked out by hand, and against the parameters that exist."""

import dataclasses
import importlib.util
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import ConfigError
from backbone.presets import PRESETS
from harness import roofline
from harness.stages import Stacks, head_cost, kv_scalars, on_one_device, stage_costs, staggered_step
from stagformer import model as staggered
from stagformer.config import StagFormerConfig
from tests.conftest import tiny_config

# A layer with an MLP of 8 d and as many key heads as query heads: 4 d^2 + 24 d^2 = 28 d^2; a cross block is 4 d^2.
PAPER = ModelConfig('llama', 256_000, 1536, 36, 1024, AttentionConfig(12, 12, 128), MlpConfig(12_288),
                    tie_embeddings=True)
HEADLESS = PAPER.replace(vocab_size=1)
# Llama-2's layer: 4 d^2 + 3 * 2.6875 d^2 = 12.0625 d^2, of which a cross block is a third.
LLAMA = PRESETS['llama-2-7b'].replace(vocab_size=1)
BYTES_ONLY = roofline.Device('toy', 1e12, {'bfloat16': math.inf}, math.inf)


def speedup(config, depths, dense_layers=36, device=BYTES_ONLY, context=0, split_head=False, batch=1, **kw):
    """One device with all layers in a row, over a device a stack."""
    request = {'context': context, 'batch': batch}
    dense = staggered_step(config, device, Stacks((dense_layers,)), **request).seconds
    stacks = Stacks(depths, **kw)
    return dense / staggered_step(config, device, stacks, stages=len(depths), split_head=split_head, **request).seconds


@pytest.mark.parametrize(('stacks', 'context', 'batch'), [((36,), 0, 1), ((36,), 900, 3)])
def test_one_stack_on_one_device_is_the_plain_step(stacks, context, batch):
    plain = roofline.step_time(PAPER, roofline.DEVICES['tpu-v5e'], dtype='bfloat16', context=context, batch=batch)
    step = staggered_step(PAPER, roofline.DEVICES['tpu-v5e'], Stacks(stacks), context=context, batch=batch)
    parts = dataclasses.astuple(step.stages[0]), dataclasses.astuple(step.head)
    assert [a + b for a, b in zip(*parts, strict=True)] == pytest.approx(dataclasses.astuple(plain.cost))
    assert (step.seconds, step.hops) == (pytest.approx(plain.seconds), 0)


@pytest.mark.parametrize(('config', 'ratio'), [(HEADLESS, 1 / 7), (LLAMA, 4 / 12.0625)])
@pytest.mark.parametrize('p', (2, 4))
def test_bound_by_weights_the_cross_block_is_the_price(config, ratio, p):
    assert speedup(config, (32 // p,) * p, 32) == pytest.approx(p / (1 + ratio), rel=1e-3)


def test_a_narrow_cross_side_costs_less():
    """One key head of twelve: its keys and values shrink to 1/12, so the block to (2 + 2/12) d^2."""
    assert speedup(HEADLESS, (18, 18), cross_kv_heads=1) == pytest.approx(2 / (1 + (2 + 2 / 12) / 28), rel=1e-3)


@pytest.mark.parametrize('p', (2, 4))
def test_bound_by_the_cache_full_cross_attention_gains_half_and_a_window_all(p):
    long = {'context': 10_000_000, 'dense_layers': 36}
    assert speedup(PAPER, (36 // p,) * p, **long) == pytest.approx(p / 2, rel=2e-3)
    assert speedup(PAPER, (36 // p,) * p, window=128, **long) == pytest.approx(p, rel=2e-3)
    # A large batch does the same as a long context.
    assert speedup(PAPER, (36 // p,) * p, context=1000, batch=10_000) == pytest.approx(p / 2, rel=2e-2)


@pytest.mark.parametrize(('depths', 'split', 'times'), [
    # In layers: the head is 256000 * 1536 / (28 * 1536^2) = 5.952; a layer with its cross block 8/7.
    ((18, 18), False, (36 + 5.952) / (18 * 8 / 7 + 5.952)),  # 1.58
    ((18, 18), True, (36 + 5.952) / (18 * 8 / 7 + 5.952 / 2)),  # 1.78
    ((22, 14), False, (36 + 5.952) / 22)])  # 1.91: the lower stack is now the longer one
def test_where_the_head_lies(depths, split, times):
    assert speedup(PAPER, depths, split_head=split) == pytest.approx(times, rel=1e-3)


def test_cache_of_two_stacks_is_half_as_large_again():
    plain = kv_scalars(PAPER, Stacks((36,)), 1000)
    assert plain == roofline.cache_scalars(PAPER) * 1000 == 2 * 36 * 1536 * 1000
    for depths, times in (((18, 18), 1.5), ((9,) * 4, 1.75), ((22, 14), 1 + 14 / 36)):
        assert kv_scalars(PAPER, Stacks(depths), 1000) == times * plain
    # All lower stacks: the third of three reads two, so 12 + 24 cross caches beside 36.
    assert kv_scalars(PAPER, Stacks((12,) * 3, all_prev=True), 1000) == 2 * plain
    assert kv_scalars(PAPER, Stacks((18, 18), window=128), 1000) == plain + 2 * 18 * 1536 * 128
    assert kv_scalars(PAPER, Stacks((18, 18), window=128), 64) == 1.5 * kv_scalars(PAPER, Stacks((36,)), 64)
    assert kv_scalars(PAPER, Stacks((18, 18), cross_kv_heads=6), 1000) == 1.25 * plain


def test_what_a_step_reads_of_the_caches():
    """Its own keys include this token's; those of the stack below end before it."""
    low, high = stage_costs(PAPER, Stacks((18, 18), window=128), context=1000)
    assert low.cache_bytes == 2 * 2 * 18 * 1536 * 1001
    assert high.cache_bytes == low.cache_bytes + 2 * 2 * 18 * 1536 * 128
    assert stage_costs(PAPER, Stacks((18, 18)))[1].cache_bytes == 2 * 2 * 18 * 1536  # nothing to read yet
    assert high.flops - low.flops == 2 * 18 * (4 * 1536**2 + 2 * 1536 * 128)


@pytest.mark.parametrize('kw', [{}, {'shared': True}, {'context_from': 'all_prev', 'cross_kv_heads': 1}])
def test_weights_read_are_the_parameters_that_exist(kw):
    """On one device every parameter once, but for the input embedding: shared layers, too."""
    base = tiny_config(layers=6, tie_embeddings=True)
    cfg = StagFormerConfig.even(base, 3, **kw)
    tree = jax.eval_shape(lambda: staggered.init_params(cfg, jax.random.key(0), jnp.bfloat16))
    stacks = Stacks(cfg.depths, None, cfg.shared, cfg.context_from == 'all_prev', cfg.cross_kv_heads)
    found = on_one_device(base, stacks).weight_bytes + head_cost(base).weight_bytes
    assert found == sum(a.size * 2 for a in jax.tree.leaves(tree))
    apart = sum(cost.weight_bytes for cost in stage_costs(base, stacks))
    again = 2 * 2 * sum(a.size for a in jax.tree.leaves(tree['base']['layers'])) if cfg.shared else 0
    assert apart == on_one_device(base, stacks).weight_bytes + again  # a stage of its own needs its own copy


def test_on_one_device_only_shared_layers_save_bytes():
    dense = staggered_step(PAPER, BYTES_ONLY, Stacks((36,)))
    separate = staggered_step(PAPER, BYTES_ONLY, Stacks((18, 18)))
    shared = staggered_step(PAPER, BYTES_ONLY, Stacks((18, 18), shared=True))
    assert separate.seconds / dense.seconds == pytest.approx((36 + 18 / 7 + 5.952) / (36 + 5.952), rel=1e-3)
    assert shared.seconds / dense.seconds == pytest.approx((18 + 18 / 7 + 5.952) / (36 + 5.952), rel=1e-3)
    assert shared.stages[0].flops == separate.stages[0].flops


def test_hops_and_links_by_hand():
    device = dataclasses.replace(BYTES_ONLY, link_bytes_per_s=1e9, hop_s=1e-6)
    payload = 2 * 1536
    two = staggered_step(PAPER, device, Stacks((18, 18)), stages=2)
    assert two.hops == 2 and two.link_s == pytest.approx(2 * payload / 1e9)  # an all-reduce over two sends it once
    assert two.seconds == two.stage_s + two.link_s + two.hops * 1e-6
    assert staggered_step(PAPER, device, Stacks((18, 18)), stages=2, split_head=True).hops == 3
    assert staggered_step(PAPER, device, Stacks((9,) * 4), stages=4).hops == 1 + 2
    # One model on eight chips: two sums a layer, three hops each; two stages of four chips: three sums in 18 layers.
    assert staggered_step(PAPER, device, Stacks((36,)), chips=8).hops == 36 * 2 * 3
    four = staggered_step(PAPER, device, Stacks((18, 18)), stages=2, chips=4)
    assert four.hops == 18 * 3 * 2 + 2
    assert four.link_s == pytest.approx((18 * 3 * 1.5 + 2) * payload / 1e9)
    assert four.stage_s == pytest.approx(two.stage_s / 4)


@pytest.mark.parametrize(('make', 'named'), [
    (lambda: Stacks((2, 0)), 'depths'), (lambda: Stacks((2, 2), window=0), 'window must be at least 1, got 0'),
    (lambda: Stacks((2, 4), shared=True), 'shared'),
    (lambda: staggered_step(PAPER, BYTES_ONLY, Stacks((18, 18)), stages=3), 'stages must be 1 or 2')])
def test_what_cannot_be_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_the_document_is_what_the_script_prints(capsys):
    path = pathlib.Path(__file__).parents[2] / 'scripts' / 'stagformer_cost.py'
    spec = importlib.util.spec_from_file_location('stagformer_cost', path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(script)
    script.main('paper', 'tpu-v5e', [1, 2, 4, 16], 1, None)
    document = (path.parents[1] / 'docs' / 'stagformer_cost.md').read_text()
    assert document.partition('\n---\n\n')[2] == capsys.readouterr().out
    # The shape is the one whose counts fit the paper's: 2.8 B, two stacks 2.9 B, shared 1.75 B.
    for name, count in (('plain', '2.77 G'), ('2 stacks', '2.94 G'), ('2 passes of 18 shared layers', '1.75 G')):
        assert f'| {name} | {count} |' in document
