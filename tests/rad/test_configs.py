"""The configs of distillation: every variant by name, the layers it says, and the published shapes."""

import json

import jax
import pytest

from backbone.errors import ConfigError, FormatError
from backbone.presets import preset
from configs import compare_rad, rad_pod
from configs import rad as config_file
from harness.train_step import build_task
from rad import cost, student
from rad.config import RadConfig
from rad.select import chosen
from rad.task import RadTask


def test_layers_by_name_and_from_the_file_of_a_search(tmp_path):
    assert chosen('evenly', 28, 14) == tuple(range(0, 28, 2)) and chosen('last', 6, 2) == (4, 5)
    drawn = [chosen(f'random:{seed}', 30, 7) for seed in range(3)]
    assert len(set(drawn)) == 3 and drawn[0] == chosen('random:0', 30, 7)
    assert all(list(layers) == sorted(set(layers)) and len(layers) == 7 and max(layers) < 30 for layers in drawn)
    assert chosen((3, 1), 6) == (1, 3)
    file = tmp_path / 'chosen.json'
    file.write_text(json.dumps({'2': {'set': {'attention': [4, 1], 'mlp': []}}, '3': {'set': {'attention': [0, 1],
                                                                                            'mlp': [2]}}}))
    assert chosen(str(file), 6, 2) == (1, 4)
    for layers, count, error, says in (
            (str(file), 3, ConfigError, 'MLPs too'), (str(file), 7, FormatError, 'result'),
            ('none.json', 2, FormatError, 'a search writes it'), ('some', 2, ConfigError, 'some'),
            ('evenly', 0, ConfigError, 'count'), ('random:x', 2, ConfigError, 'random:x'),
            ((1, 2), 3, ConfigError, '2 where count says 3')):
        with pytest.raises(error, match=says):
            chosen(layers, 6, count)


@pytest.mark.parametrize('how', config_file.HOW)
def test_every_way_is_a_task(how):
    """On the random model; what is trained differs as the name says."""
    task = build_task(config_file.get_config(f'tiny/evenly/{how}'))
    assert task.rad.layers == (0, 2)
    made = jax.eval_shape(task.init, jax.random.key(0))['rad']
    assert ('whole' in made) == how.endswith('_all')
    assert ('layers' in made) == (how in ('rad_norms', 'finetune', 'self'))
    assert ('mixers' in made) != task.in_place and task.train_flops(4, 64) > 0
    assert ('norm' in made.get('mixers', {'norm': 0})) == (how != 'ungated') and task.by_step == (how == 'stepwise')


def test_variants_of_the_trained_models():
    for model, base in (('stories', 'stories-15m'), ('k7', 'smollm2-135m'), ('k15', 'smollm2-135m')):
        for layers in ('evenly', 'random2', 'last'):
            kwargs = config_file.get_config(f'{model}/{layers}').task.kwargs
            found = chosen(kwargs.layers, preset(base).num_layers, kwargs.count)
            RadTask(preset(base), RadConfig.of(preset(base), {'layers': found}))
            assert kwargs.base == base and len(found) == config_file.COUNT[model]
        assert config_file.get_config(model).task.kwargs.layers == config_file.SETS[model]
    assert build_task(config_file.get_config('tiny')).rad.layers == (1, 2)
    for bad in ('k8', 'k7/first', 'k7/random', 'k7/set/none', 'k7/set/rad/more', ''):
        with pytest.raises(ValueError, match='unknown variant'):
            config_file.get_config(bad)


def test_same_tokens_for_all_that_is_compared():
    apart = lambda variant: {k: v for k, v in config_file.get_config(variant).to_dict().items() if k != 'task'}
    assert apart('k15/evenly/mamba_in_llama') == apart('k15/random1/rad') == apart('k15/set/finetune') == apart('k7')


def test_the_published_shapes():
    """3B student of 28 layers, 14 replaced, an 8B teacher. A mixer there has 34.7 M scalars, the attention 25.2 M."""
    task = build_task(rad_pod.get_config())
    assert (task.cfg, task.teacher) == (preset('llama-3.2-3b'), preset('llama-3.1-8b'))
    assert task.rad.layers == tuple(range(0, 28, 2)) and task.by_step
    sizes = cost.mixer_scalars(task.cfg, task.rad.ssm), cost.attention_scalars(task.cfg)
    assert [round(size / 1e6, 1) for size in sizes] == [34.7, 25.2]
    tree = jax.eval_shape(task.init, jax.random.key(0))
    assert set(tree) == {'base', 'rad', 'teacher'} and round(student.count(tree['rad']) / 1e6) == 486
    alone = build_task(rad_pod.get_config('4x4/self/all'))
    assert alone.teacher is None and alone.train == 'all'
    with pytest.raises(ValueError, match='8x8'):
        rad_pod.get_config('8x8')


def test_rows_of_the_comparison():
    for variant in ('', 'stories', 'tiny'):
        methods = compare_rad.get_config(variant).methods
        assert 'plain' in methods and any(name.startswith('rad_') for name in methods)
    assert compare_rad.EVENLY[''] == chosen('evenly', 30, 7) and compare_rad.EVENLY['stories'] == chosen('evenly', 6, 3)
    with pytest.raises(ValueError, match='unknown variant'):
        compare_rad.get_config('code')
