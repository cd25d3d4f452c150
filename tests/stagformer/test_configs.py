"""The comparison's configs: same text and steps for all, the shapes they claim, and the grid that trains them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from backbone.language_model import LanguageModel
from configs import stagformer as configs
from harness.train_step import build_task

ROOT = pathlib.Path(__file__).parents[2]
QUICK_COMPILE = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_of(variant):
    return build_task(configs.get_config(variant))


def size(task):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scale', configs.SCALES)
def test_every_model_of_a_scale(scale):
    tasks = {model: task_of(f'{scale}/{model}') for model in configs.MODELS}
    layers, d = tasks['dense'].cfg.num_layers, tasks['dense'].cfg.hidden_size
    assert all(isinstance(tasks[name], LanguageModel) for name in ('dense', 'half', 'wide'))
    assert tasks['half'].cfg.num_layers == tasks['wide'].cfg.num_layers == layers // 2
    assert tasks['half'].cfg.hidden_size == d < tasks['wide'].cfg.hidden_size
    sizes = {name: size(task) for name, task in tasks.items()}
    assert abs(sizes['wide'] / sizes['separate'] - 1) < 0.02
    assert sizes['half'] < sizes['shared'] < sizes['dense'] < sizes['separate'] < sizes['p4']
    assert sizes['separate'] == sizes['w1'] == sizes['w128'] == sizes['unstaggered']

    models = {name: task.model for name, task in tasks.items() if not isinstance(task, LanguageModel)}
    assert {name: model.depths for name, model in models.items() if name != 'p4'} == dict.fromkeys(
        ('separate', 'shared', 'w1', 'w128', 'unstaggered'), (layers // 2,) * 2)
    assert sum(models['p4'].depths) == layers and max(models['p4'].depths) - min(models['p4'].depths) <= 1
    assert [models[name].window for name in ('separate', 'w1', 'w128')] == [None, 1, 128]
    assert [name for name in models if models[name].lag == 0] == ['unstaggered']
    assert [name for name in models if models[name].shared] == ['shared']


@pytest.mark.parametrize('scale', configs.SCALES)
def test_all_models_of_a_scale_read_the_same_tokens_in_the_same_steps(scale):
    apart = {'task'}
    found = [{key: value for key, value in configs.get_config(f'{scale}/{model}').to_dict().items() if key not in apart}
             for model in configs.MODELS]
    assert all(one == found[0] for one in found)


def test_the_paper_s_sizes():
    said = {'half': 1.58, 'dense': 2.77, 'separate': 2.94, 'shared': 1.75}
    assert {name: round(size(task_of(f'paper/{name}')) / 1e9, 2) for name in said} == said
    config = configs.get_config('paper/separate')
    assert config.num_steps * config.data.batch_size * config.data.seq_len == 327_680_000_000


def test_other_windows_and_stacks_by_name():
    assert task_of('30m/w512').model.window == 512
    assert task_of('tiny/p2').model == task_of('tiny/separate').model
    mixed = task_of('tiny/p4mix').model
    assert mixed.mix and mixed.depths == (1, 1, 1, 1)
    assert task_of('135m/p4').model.depths == (8, 8, 7, 7)


@pytest.mark.parametrize(('variant', 'named'), [('huge/dense', 'huge'), ('dense', 'dense'), ('tiny/narrow', 'narrow'),
                                                ('tiny/w0', 'w0'), ('tiny/w', 'w'), ('tiny/p1', 'p1')])
def test_an_unknown_variant_is_refused_by_name(variant, named):
    with pytest.raises(ValueError, match=f"unknown (scale|model) '{named}'"):
        configs.get_config(variant)


# --- the grid ---------------------------------------------------------------------------------------------------------


def rows(**bits):
    return [{'model': name, 'seed': seed, 'bits_per_byte': value, 'perplexity': 2 ** value, 'parameters': 3_000_000,
             'train_s': 60.0} for name, values in bits.items() for seed, value in enumerate(values)]


def test_differences_are_taken_within_a_seed():
    """Seeds differ more than models do: unpaired, nothing could be said."""
    grid = script('stagformer_grid')
    apart, half, count = grid.paired(rows(a=(1.00, 1.20, 1.40), b=(0.98, 1.19, 1.37)), 'a', 'b')
    assert count == 3 and apart == pytest.approx(0.02) and half == pytest.approx(4.303 * 0.01 / 3 ** 0.5)
    assert grid.verdict(apart, half) == 'not resolved'
    assert grid.verdict(*grid.paired(rows(a=(1.0, 1.2), b=(0.98, 1.18)), 'a', 'b')[:2]) == 'yes'
    assert grid.verdict(-0.1, 0.01) == 'no, the reverse'
    assert grid.paired(rows(a=(1.0,), b=(0.9, 0.8)), 'a', 'b')[1:] == (float('inf'), 1)


def test_the_table_says_whether_the_order_holds():
    grid = script('stagformer_grid')
    text = grid.table(rows(half=(1.3, 1.31), shared=(1.2, 1.21), dense=(1.1, 1.11), separate=(1.15, 1.16)))
    assert '- shared better than half: yes, +0.1000 bits a byte ± 0.0000 over 2 seeds' in text
    assert '- separate better than dense: no, the reverse, -0.0500' in text
    assert '| separate | 3.00 M | 1.1550 (1.1500 to 1.1600) | +0.0500 ± 0.0000 |' in text
    cut = grid.table(rows(half=(1.3,), dense=(1.1,)))  # a grid that was stopped early
    assert 'better' not in cut and '| half | 3.00 M | 1.3000 | +0.2000 |' in cut


def run(name, *args):
    return subprocess.run([sys.executable, f'scripts/{name}.py', *args], cwd=ROOT, text=True, capture_output=True,
                          timeout=300, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK_COMPILE,
                                                         'PYTHONPATH': str(ROOT)})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """(folder, command, what it said) of a grid of one model."""
    out = tmp_path_factory.mktemp('grid')
    command = ('--scale=toy', '--seeds=0', f'--out={out}')
    done = run('stagformer_grid', *command, '--models=shared')
    assert done.returncode == 0, done.stderr
    return out, command, done.stdout


def test_the_grid_trains_writes_rows_and_takes_no_others_for_its_own(runs):
    out, command, said = runs
    found = [json.loads(line) for line in (out / 'rows.jsonl').read_text().splitlines()]
    assert [(row['model'], row['seed'], row['steps'], row['tokens']) for row in found] == [('shared', 0, 10, 1280)]
    assert 3 < found[0]['bits_per_byte'] < 8 and found[0]['parameters'] == size(task_of('toy/shared'))
    assert (out / 'table.md').read_text().strip() in said
    other = run('stagformer_grid', *command, '--models=shared', '--steps=11')
    assert other.returncode == 2 and 'num_steps 10 -> 11' in other.stderr  # these rows are not those runs


@pytest.mark.slow
def test_the_grid_goes_on_and_what_it_trained_is_judged_by_what_it_writes(runs, tmp_path):
    out, command, _ = runs
    before = (out / 'rows.jsonl').read_text()
    again = run('stagformer_grid', *command, '--models=shared,dense')
    assert again.returncode == 0, again.stderr
    after = (out / 'rows.jsonl').read_text()
    assert after.startswith(before)
    assert [json.loads(line)['model'] for line in after.splitlines()] == ['shared', 'dense']

    done = run('stagformer_generated', f'--runs={out}', '--models=dense,shared', '--judge=', '--prompts=4',
               '--prompt=8', '--pieces=1,4,16', f'--out={tmp_path}')
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'generated.json').read_text())
    assert set(found['judged']) == {'text', 'dense', 'shared', 'recurrent'}
    first = {way: pieces[0]['bits_per_byte'] for way, pieces in found['judged'].items()}
    assert first['recurrent'] == first['shared'], 'the first token after a prompt is the exact one'
    assert found['agreement'][0] == {'to': 1, 'equal': 1.0}
    assert (tmp_path / 'generated.md').read_text().strip() in done.stdout
