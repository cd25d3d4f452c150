"""From accelerators to gates to an artefact with thresholds, and the table of it: the scripts on a small model."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.config import ModelConfig
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded, flatten, params_hash
from backbone.layout import pack
from backbone.model import PlainTarget, forward
from configs import m2r2_gates, m2r2_smollm2, training
from harness import artefacts, train, zoo
from m2r2 import gate_task
from m2r2.gates import GateConfig
from scripts import m2r2_artefact, m2r2_tradeoff
from tests.conftest import lively, tiny_config

SHAPE = training.llama(vocab=257, hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48, max_seq_len=64)


@pytest.mark.slow
def test_one_token_at_a_time_is_the_whole_sequence():
    """The measure of quality, for a target that leaves nothing out: perplexity and choices of an ordinary pass."""
    cfg = tiny_config(layers=2)
    base = lively(cfg)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)
    _, perplexity, choice = m2r2_tradeoff.forced(PlainTarget(cfg, stacked=False), {'base': pack(base)}, tokens, 5)
    logits = np.asarray(jax.jit(lambda p: forward(cfg, p, tokens))(base))[:, 5:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(expected, tokens[:, 6:, None], -1)
    np.testing.assert_allclose(perplexity, np.exp(nll.mean()), rtol=1e-4)
    np.testing.assert_array_equal(choice, logits.argmax(-1))


def test_a_line_that_a_kill_cut_short_is_measured_again(tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"key": "a"}\n{"key": "b"}\n{"ke')
    assert [row['key'] for row in m2r2_tradeoff.read_rows(path)] == ['a', 'b']
    assert path.read_text().endswith('"b"}\n') and m2r2_tradeoff.read_rows(tmp_path / 'none') == []


@pytest.mark.slow
def test_the_tiny_form_runs_goes_on_and_refuses_other_settings(tmp_path):
    args = lambda *more: m2r2_tradeoff.parse(['--tiny', f'--out={tmp_path}', *more])
    rows = m2r2_tradeoff.main(args())
    assert {row['key'].rsplit('/', 1)[0] for row in rows} >= {'fast/arla_depth/copy_h', 'fast/margin/defer',
                                                             'none/margin/copy_h', 'fast/schedule/drop'}
    for row in rows:
        assert 1 <= row['layers'] <= 3 and row['perplexity'] > 1 and 0 <= row['agreement'] <= 1
        assert row['equivalent_layers'] >= row['layers'] and row['ms'][1] <= row['ms'][0] <= row['ms'][2]
    lines = (tmp_path / 'rows.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'rows.jsonl').write_text(''.join(lines[1:]))
    again = m2r2_tradeoff.main(args())
    assert sorted(row['key'] for row in again) == sorted(row['key'] for row in rows) and again[:-1] == rows[1:]
    same = lambda row: {name: value for name, value in row.items() if name not in ('ms', 'plain_ms')}
    assert same(again[-1]) == same(rows[0])
    assert (tmp_path / 'tradeoff.png').stat().st_size > 10_000
    assert len((tmp_path / 'table.md').read_text().splitlines()) == len(rows) + 4
    with pytest.raises(RequestError, match='other settings'):
        m2r2_tradeoff.main(args('--dtype=bfloat16'))


@pytest.mark.slow
def test_from_accelerators_to_a_measured_artefact(tmp_path, monkeypatch):
    cfg = ModelConfig.from_dict(SHAPE)
    base = jax.tree.map(np.asarray, lively(cfg))
    formats.save(Loaded(cfg, base, tokenizer.of_bytes(), 'small', params_hash(base)), tmp_path / 'base', 'headway')
    rng = np.random.default_rng(0)
    text = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 30))} for i in range(80)]
    (tmp_path / 'text').mkdir()
    for name, rows in (('train', text), ('validation', text[:40])):
        (tmp_path / 'text' / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))

    def settings(config):
        config.data.update({'dataset': 'selfgen', 'manual_dir': str(tmp_path / 'text'), 'tokenizer': 'bytes',
                            'seq_len': 32, 'batch_size': 8, 'data_dir': str(tmp_path / 'made')})
        config.num_steps, config.eval.every, config.checkpoint.every, config.compute_dtype = 6, 6, 6, 'float32'
        return config

    accelerators = settings(m2r2_smollm2.get_config('tiny'))
    accelerators.task.kwargs = {'base': str(tmp_path / 'base'), 'cached': True, 'm2r2': {'exits': (1, 2), 'rank': 4}}
    assert train.run(accelerators, tmp_path / 'fast_run', say=lambda *_: None) == 'finished'
    artefacts.to_zoo('fast', tmp_path / 'fast_run', artefacts.card_of(str(tmp_path / 'fast_run')), None, tmp_path)
    config = settings(m2r2_gates.get_config('tiny'))
    config.task.kwargs = {'base': str(tmp_path / 'base'), 'cached': True, 'accelerators': str(tmp_path / 'fast'),
                          'gate': {'kind': 'arla_depth', 'size': 8}}
    assert train.run(config, tmp_path / 'gates_run', say=lambda *_: None) == 'finished'

    card = m2r2_artefact.main(m2r2_artefact.parse([
        f'--workdir={tmp_path / "gates_run"}', '--name=whole', f'--root={tmp_path}', '--rows=16', '--target=0.5']))
    tree, stored = zoo.load('whole', params_hash(base), tmp_path)
    assert len(stored['early_exit']['thresholds']) == 2 and stored['early_exit']['calibrated']['n'] == 64
    assert list(stored['early_exit']['thresholds']) == list(card['early_exit']['thresholds'])
    fast = gate_task.read_accelerators(str(tmp_path / 'fast'))[0]
    off = {path: np.abs(leaf - flatten(tree['m2r2'])[path]).max() for path, leaf in flatten(fast).items()}
    assert all(value <= np.abs(flatten(fast)[path]).max() / 127 for path, value in off.items())
    assert gate_task.build(base=str(tmp_path / 'base'), accelerators=str(tmp_path / 'whole')).m2r2.exits == (1, 2)

    module = types.ModuleType('configs.small')
    module.get_config = lambda variant='': config
    monkeypatch.setitem(sys.modules, 'configs.small', module)
    rows = m2r2_tradeoff.main(m2r2_tradeoff.parse([
        f'--out={tmp_path / "out"}', '--config=small', f'--model={tmp_path / "base"}', '--methods',
        f'whole={tmp_path / "whole"}', '--fills=defer', '--quantiles=0.5', '--targets', '--schedules=0',
        '--calibrate=8', '--rows=2', '--prompt=8', '--steps=8', '--repeats=1']))
    assert [row['key'] for row in rows] == [f'{key}/defer/q0.5' for key in (
        'whole/arla_depth', 'whole/margin', 'none/margin')]
    run, bare = (m2r2_tradeoff.method_of('x', str(tmp_path / name), cfg, params_hash(base)) for name in (
        'gates_run', 'fast'))
    assert list(run.gates) == [GateConfig('arla_depth', 8)] and not bare.gates and run.m == bare.m
    jax.tree.map(np.testing.assert_array_equal, run.m2r2, bare.m2r2)
    for source in ('whole', 'gates_run'):
        with pytest.raises(RequestError, match='trained on a base'):
            m2r2_tradeoff.method_of('x', str(tmp_path / source), cfg, 'f' * 64)
