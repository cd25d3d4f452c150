"""The measurements that wait for a GPU, in their tiny form: the whole path, so that nothing is found out there."""

import csv
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_train_135m(tmp_path):
    command = [sys.executable, 'scripts/gpu/train_135m.py', '--tiny', '--minutes=0.02', f'--out={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'train_135m.json').read_text())
    assert len(report['variants']) == 2 and all(v['tokens_per_s'] > 0 for v in report['variants'])
    rows = list(csv.DictReader((tmp_path / 'train_135m_loss.csv').open()))
    assert len(rows) == report['run']['steps'] - 1 and float(rows[0]['loss']) > 9
    assert report['text'].startswith('random tokens')
