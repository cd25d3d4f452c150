"""The measurements that wait for a GPU, in their tiny form: the whole path, so that nothing is found out there."""

import csv
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[1]
QUICK_COMPILE = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def run(script, *args):
    done = subprocess.run([sys.executable, f'scripts/gpu/{script}', '--tiny', *args], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=os.environ | {
                              'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK_COMPILE, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_train_135m(tmp_path):
    run('train_135m.py', '--minutes=0.02', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'train_135m.json').read_text())
    assert len(report['variants']) == 2 and all(v['tokens_per_s'] > 0 for v in report['variants'])
    rows = list(csv.DictReader((tmp_path / 'train_135m_loss.csv').open()))
    assert len(rows) == report['run']['steps'] - 1 and float(rows[0]['loss']) > 9
    assert report['text'].startswith('random tokens')


def test_train_tensorhead(tmp_path):
    run('train_tensorhead.py', '--heads=r2', '--steps=12', '--batch=1', '--timed=1', '--repeats=2',
        '--logits_gib=0.0006', '--max_new_tokens=16', '--piece_bytes=9000', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'train_tensorhead.json').read_text())
    head, decoding = report['heads']['r2'], report['decoding']
    assert head['accumulate'] == 2 and len(head['step_ms']) == 2 and head['curve'][-1][0] == 12
    assert head['curve'][-1][1] < head['curve'][0][1]  # it learns the rows it is measured on
    losses = head['held_out']
    assert losses['nll_1'] < 5.6 and 2.9 * losses['nll_1'] < losses['joint_nll'] < 3.1 * losses['nll_1']
    assert losses['tokens'] == 2 * 8 * 64
    assert head['greedy']['rounds'] > 0 and 0 <= head['sampled']['accepted'] <= 2
    assert decoding['r2']['same_text'] == 1.0 and len(decoding['r2']['speedups']) == 2
    assert decoding['plain']['speedup'] == 1.0

    pieces = [load_file(tmp_path / name) for name in head['files']]
    assert len(pieces) > 2 and all(sum(a.nbytes for a in piece.values()) <= 9000 for piece in pieces)
    joined: dict[str, list] = {}
    for key, part in sorted((item for piece in pieces for item in piece.items()),
                            key=lambda item: int(item[0].rpartition(':')[2])):
        joined.setdefault(key.rpartition(':')[0], []).append(part)
    assert {path: (sum(map(len, parts)), *parts[0].shape[1:]) for path, parts in joined.items()} == {
        'gate/kernel': (64, 2), 'gate/bias': (2,), 'factors/down': (3, 2, 64, 8), 'factors/up': (3, 2, 8, 64)}


def test_train_stagformer(tmp_path):
    run('train_stagformer.py', '--models=separate,p9', '--save=separate', '--forms=tuple', '--piece_bytes=20000',
        '--scale=30m', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'train_stagformer.json').read_text())
    made, failed = report['runs']
    assert made['steps'] == 10 and made['curve'][-1][1] < made['curve'][0][1] and made['scale'] == 'toy'
    assert abs(made['bits_per_byte'] * math.log(2) - made['nll']) < 1e-6, 'a byte a token'
    assert failed['error'].startswith('ConfigError: depths')
    assert [json.loads(line)['model'] for line in (tmp_path / 'rows.jsonl').read_text().splitlines()] == ['separate']
    pieces = [load_file(tmp_path / name) for name in made['files']]
    assert all(sum(a.nbytes for a in piece.values()) <= 20000 for piece in pieces)
    assert sum(a.size for piece in pieces for a in piece.values()) == made['parameters']
    rows = report['decoding']['tiny']['rows']
    assert [row['name'] for row in rows] == ['dense', 'half', 'separate', 'separate, window 128', 'shared',
                                             'shared, window 128', 'recurrent']
    assert rows[0]['ratio']['min'] == 1 and all(row['ms']['min'] > 0 < row['predicted_ms'] for row in rows)


@pytest.mark.slow  # train_tensorhead's code with another task
def test_train_m2r2(tmp_path):
    run('train_m2r2.py', '--heads=k1', '--steps=12', '--batch=1', '--timed=1', '--repeats=2', '--max_new_tokens=16',
        '--piece_bytes=9000', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'train_m2r2.json').read_text())
    trained = report['heads']['k1']
    assert trained['exit'] == 1 and trained['curve'][-1][1] < trained['curve'][0][1]
    assert 0 < trained['held_out']['overlap_1'] <= 1 and trained['held_out']['kl_1'] > 0
    assert report['decoding']['k1']['same_text'] == 1.0 and len(report['decoding']['k1']['speedups']) == 2
    assert all(load_file(tmp_path / name) for name in trained['files'])


@pytest.mark.slow  # tests/m2r2/test_expert_runtime.py runs what it drives
def test_moe_offload(tmp_path):
    run('moe_offload.py', '--sizes=12,75', '--recalls=1.0,0.5', '--tokens=6', '--repeats=2', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'moe_offload.json').read_text())
    ways = ['resident', 'on_demand', 'lru', 'ahead_1.0', 'ahead_0.5']
    assert [(row['size'], row['way']) for row in report['rows']] == [(size, way) for size in (12, 75) for way in ways]
    assert report['same_words'] and report['left_out'] == [] and report['link_gb_s'] > 0
    for row in report['rows']:
        assert row['ms_a_token']['min'] > 0
        assert (row['mb_a_token'] > 0) == (row['way'] != 'resident') or row['size'] == 75  # all it wants fits there
        assert row['hit_rate'] == {'resident': 1.0, 'on_demand': 0.0}.get(row['way'], row['hit_rate'])
    by_way = {(row['size'], row['way']): row['a_token'] for row in report['rows']}
    assert by_way[12, 'ahead_1.0']['demand'] < by_way[12, 'lru']['demand']


def test_train_rad(tmp_path):
    run('train_rad.py', '--variants=tiny/set,tiny/evenly/finetune', '--steps=12', '--batch=1', '--timed=1',
        '--repeats=2', '--max_new_tokens=16', '--piece_bytes=60000', '--blocks=2', '--contexts=64', f'--out={tmp_path}')
    report = json.loads((tmp_path / 'train_rad.json').read_text())
    hybrid, control = report['runs']['tiny_set'], report['runs']['tiny_evenly_finetune']
    assert hybrid['layers'] == json.loads((tmp_path / 'chosen.json').read_text())['2']['set']['attention']
    assert len(report['searched']['2']) == 4 + 1 and hybrid['curve'][-1][1] < hybrid['curve'][0][1]
    assert 0 < hybrid['held_out']['kl'] < 1 and 0 < hybrid['held_out']['overlap'] < 1
    assert hybrid['trained'] > control['trained'] and control['held_out']['teacher_nll'] > 0
    positions = hybrid['by_position']['0-64']
    assert positions['tokens'] == 8 * 64 and abs(positions['hybrid'] - hybrid['held_out']['nll']) < 1e-3
    assert all(0 <= drafts['greedy']['accepted'] <= 2 for drafts in hybrid['drafts'].values())
    assert report['decoding']['tiny_set:rad_2']['same_text'] == report['decoding']['tiny_set:skip_2']['same_text'] == 1
    step, = report['steps']
    assert set(step['ms']) == {'plain', 'tiny_set'} and step['cache_bytes']['tiny_set'] < step['cache_bytes']['plain']
    assert sum(a.size for name in hybrid['files'] for a in load_file(tmp_path / name).values()) == hybrid['trained']
