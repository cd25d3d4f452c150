"""What the decode-speed script counts and prints, without taking a time."""

import numpy as np
import pytest

from backbone.presets import preset
from scripts import stagformer_speed as speed


@pytest.fixture(scope='module')
def rows():
    return {row.name: row for row in speed.rows_of(speed.tiny(), ('arrays',))}


def test_a_step_reads_every_weight_once(rows):
    """Shared weights too, and the pass that recurrent decoding leaves out has none of its own."""
    for name, row in rows.items():
        assert row.cost(0, 'bfloat16').weight_bytes == speed.bytes_of(row.abstract('bfloat16')), name
    read, far = ({name: row.cost(n, 'bfloat16').bytes for name, row in rows.items()} for n in (10, 1000))
    assert read['half'] < read['recurrent'] < read['shared'] < read['dense'] < read['separate']
    assert far['separate, window 128'] < far['separate'] and far['shared, window 128'] < far['shared']


def test_ratios_are_of_the_same_turn(rows):
    pair = [rows['dense'], rows['half']]
    found = speed.figures(pair, [[10.0, 5.0], [40.0, 10.0], [9.0, 9.0]], 1e9, 64, 'bfloat16')
    assert [row['ratio']['median'] for row in found] == [1, 2] and found[1]['ratio']['max'] == 4
    assert found[0]['ms']['median'] == 10 and found[1]['predicted_ms'] == 1e-6 * pair[1].cost(64, 'bfloat16').bytes
    text = speed.table({'rows': found})
    assert text.splitlines()[2].startswith('| dense | 64 | 10 (9.5-25) | 1.00 (1.00-1.00) |')
    assert '| 2.00 (1.00-4.00) |' in text.splitlines()[3]


def test_a_shape_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(speed, 'free_bytes', lambda: 1e9)
    monkeypatch.setattr(speed, 'filled', lambda *_: pytest.fail('nothing is made'))
    assert 'GB of memory, 1.0 GB are free' in speed.measure(preset('llama-3.2-1b'), 'bfloat16', [64], 1)['skipped']


def test_weights_are_cheap_numbers_of_ordinary_size(rows):
    made = speed.filled(rows['separate'].abstract('float32'), 'float32')
    assert np.all(made['stagformer']['context_norm']['scale'] == 1)
    kernel = made['base']['layers']['mlp']['up']['kernel']
    assert 0.015 < kernel.std() < 0.025 and not np.array_equal(kernel[0, 0], kernel[0, 1])
