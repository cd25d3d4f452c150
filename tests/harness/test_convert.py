"""Conversion and its check, from the function and from the command line."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backbone import formats
from backbone.errors import FormatError, RequestError
from harness import convert

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'tests' / 'golden' / 'tiny'


def test_identical_copy(tmp_path):
    found = convert.convert(str(TINY / 'llama'), tmp_path / 'x.gguf', check=True)
    assert formats.sniff(tmp_path / 'x.gguf') == 'gguf'
    assert (found.kl, found.max_logit_difference, found.top5, found.top1) == (0, 0, 1, 1)
    assert found.positions == 64 and found.source_loss is None  # no tokenizer: random tokens, all of the context


def test_rounding_shows(tmp_path):
    found = convert.convert(str(TINY / 'llama'), tmp_path / 'x', 'hf', 'bf16', check=True)
    assert 0 < found.kl < 1e-2 and 0 < found.max_logit_difference < 1 and found.top5 < 1


def test_agreement_of_known_laws():
    """KL of (1/2, 1/2) from (1/4, 3/4), losses, overlaps; over more positions than one chunk."""
    p, q = np.log([0.5, 0.5, 1e-30, 1e-30, 1e-30, 1e-30]), np.log([0.25, 0.75, 1e-30, 1e-30, 1e-30, 1e-30])
    found = convert.agreement(np.tile(p, (100, 1)).astype(np.float32), np.tile(q, (100, 1)).astype(np.float32),
                              np.zeros(100, np.int32))
    assert found.kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
    assert found.source_loss == pytest.approx(np.log(2), rel=1e-5)
    assert found.result_loss == pytest.approx(np.log(4), rel=1e-5)
    assert found.max_logit_difference == pytest.approx(np.log(2), rel=1e-5)
    assert (found.top1, found.positions) == (0, 100)
    shifted = np.arange(12.0, dtype=np.float32)[None].repeat(70, 0)
    assert convert.agreement(shifted, np.roll(shifted, 2, -1), None).top5 == pytest.approx(3 / 5)
    with pytest.raises(RequestError, match='not comparable'):
        convert.agreement(shifted, shifted[:, :-1], None)


def test_refused_before_the_model_is_read(tmp_path, monkeypatch):
    (tmp_path / 'x').touch()
    monkeypatch.setattr(formats, 'load', lambda *_: pytest.fail('read'))
    with pytest.raises(FormatError, match='exists already'):
        convert.convert('smollm2-135m', tmp_path / 'x')
    with pytest.raises(FormatError, match="dtype q8_0: not one of hf's"):
        convert.convert('smollm2-135m', tmp_path / 'y', 'hf', 'q8_0')


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'harness.launch.convert', *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True)


def test_command_line(tmp_path):
    done = run(TINY / 'opt', tmp_path / 'x', '--check', '--dtype=f16')
    assert done.returncode == 0, done.stderr
    assert re.search(r'KL\(source \|\| result\) +\d\.\d+e[-+]\d+ nats', done.stdout)
    assert 'max logit difference' in done.stdout and 'top-5 agreement' in done.stdout
    assert formats.sniff(tmp_path / 'x') == 'headway'
    again = run(TINY / 'opt', tmp_path / 'x')
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1] == f'headway: error: {tmp_path / "x"}: exists already, not overwritten'


def test_overwrite(tmp_path):
    for _ in range(2):
        convert.convert(str(TINY / 'opt'), tmp_path / 'x', overwrite=True)
    with pytest.raises(FormatError, match='opt: no gguf form of this architecture'):
        convert.convert(str(TINY / 'opt'), tmp_path / 'x', 'gguf', overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ['x'] and formats.sniff(tmp_path / 'x') == 'headway'


def test_command_line_without_destination():
    done = run(TINY / 'llama')
    assert done.returncode == 2 and 'headway: error: usage: headway-convert' in done.stderr
