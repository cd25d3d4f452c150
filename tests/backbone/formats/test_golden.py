"""Logits of every architecture against those of transformers, kept in tests/golden (scripts/golden_models.py)."""

from pathlib import Path

import numpy as np

from .conftest import TINY, logits

GOLDEN = TINY.parent / 'smollm2-135m.npz'


def test_tiny_checkpoints(tiny):
    name, loaded, tokens, expected = tiny
    found = logits(loaded, tokens)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), name
    assert np.array_equal(found.argmax(-1), expected.argmax(-1)), name


def test_golden_logits_depend_on_the_text(tiny):
    """The tiny checkpoints attend: else a wrong rotation or mask would not show."""
    name, loaded, tokens, expected = tiny
    shuffled = logits(loaded, np.concatenate([tokens[:, :-1][:, ::-1], tokens[:, -1:]], axis=1))
    assert np.abs(shuffled[:, -1] - expected[:, -1]).max() > 1e-2 * np.abs(expected).max(), name


def test_smollm2(smollm2):
    golden = np.load(GOLDEN)
    found = logits(smollm2, golden['tokens'])[0]
    assert np.array_equal(found.argmax(-1), golden['argmax'])
    best = np.take_along_axis(found[golden['positions']], golden['best'], -1)
    difference = max(np.abs(found[:, golden['columns']] - golden['at_columns']).max(),
                     np.abs(best - golden['at_best']).max())
    print(f'max logit difference {difference:.2e}')
    assert difference <= 5e-4


def test_golden_files_are_small():
    assert all(sum(f.stat().st_size for f in folder.iterdir()) < 60_000 for folder in TINY.iterdir())
    assert Path(GOLDEN).stat().st_size < 200_000
