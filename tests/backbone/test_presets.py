"""Presets have the sizes their releases state."""

import jax
import pytest

from backbone.errors import ConfigError
from backbone.model import abstract_params
from backbone.presets import PRESETS, preset

# Sum of the tensors in each release's checkpoint; a tied head counts once.
PUBLISHED = {
    'smollm2-135m': 134_515_008, 'smollm2-360m': 361_821_120, 'smollm2-1.7b': 1_711_376_384,
    'tinyllama-1.1b': 1_100_048_384, 'llama-2-7b': 6_738_415_616,
    'llama-3.2-1b': 1_235_814_400, 'llama-3.2-3b': 3_212_749_824,
    'llama-3.1-8b': 8_030_261_248, 'llama-3.1-70b': 70_553_706_496,
    'opt-125m': 125_239_296, 'opt-350m': 331_196_416, 'opt-1.3b': 1_315_758_080, 'opt-2.7b': 2_651_596_800,
    'opt-6.7b': 6_658_473_984, 'opt-13b': 12_853_473_280, 'opt-30b': 29_974_540_288,
    'gemma-2b': 2_506_172_416, 'gemma-7b': 8_537_680_896,
    'qwen2.5-0.5b': 494_032_768, 'qwen2.5-1.5b': 1_543_714_304, 'qwen2.5-7b': 7_615_616_512,
    'olmoe-1b-7b': 6_919_161_856, 'mixtral-8x7b': 46_702_792_704,
    'stories-15m': 15_191_712,
}


def test_every_preset_has_a_published_count():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize('name', PRESETS)
def test_parameter_count(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(preset(name)))) == PUBLISHED[name]


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="'llama-9', .*llama-2-7b"):
        preset('llama-9')
