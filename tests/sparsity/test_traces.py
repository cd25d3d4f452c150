"""The store of traces: what was put in comes out, and an interruption leaves no trace."""

import itertools

import jax
import numpy as np
import pytest

from backbone.config import ModelConfig
from backbone.errors import ConfigError, DataError
from configs import training
from scripts import sparsity_traces
from sparsity import predictor_task, traces

LAYOUT = traces.Layout((8,), (3, 2), (3, 5))
KEY = {'base': 'abc', 'criterion': 'plainact'}


def example(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {'context': rng.normal(size=8), 'heads': rng.random((3, 2)), 'neurons': rng.random((3, 5))}


def examples(first: int, last: int) -> list[dict[str, np.ndarray]]:
    return [example(number) for number in range(first, last)]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_at(call: int, make=examples):
    """`make`, ended from outside at its call of that number."""
    calls = itertools.count()

    def dying(first: int, last: int) -> list:
        if next(calls) == call:
            raise KeyboardInterrupt
        return make(first, last)
    return dying


def test_killed_and_continued_it_is_the_same_file_for_file(tmp_path):
    assert traces.write(tmp_path / 'whole', KEY, LAYOUT, 10, 4, examples) == 10
    cut = tmp_path / 'cut'
    with pytest.raises(KeyboardInterrupt):
        traces.write(cut, KEY, LAYOUT, 10, 4, killed_at(1))
    with pytest.raises(DataError, match='2 of 3 files are missing'):
        traces.Traces(cut)
    (cut / '.traces-00001.array_record.999').write_bytes(b'half a file')  # what a killed process leaves
    done = (cut / traces.file_name(0)).stat().st_mtime_ns
    assert traces.write(cut, KEY, LAYOUT, 10, 4, examples) == 6
    assert (cut / traces.file_name(0)).stat().st_mtime_ns == done
    (cut / '.traces-00001.array_record.999').unlink()
    assert contents(cut) == contents(tmp_path / 'whole')
    assert traces.write(cut, KEY, LAYOUT, 10, 4, killed_at(0)) == 0  # nothing is left to do
    read = traces.Traces(cut, KEY).read([9, 0, 4])
    for place, number in enumerate((9, 0, 4)):
        for name, a in example(number).items():
            np.testing.assert_allclose(read[name][place], a, rtol=2e-3, atol=1e-3)


def test_other_traces_are_not_taken_for_these(tmp_path):
    traces.write(tmp_path, KEY, LAYOUT, 3, 4, examples)
    with pytest.raises(ConfigError, match='key.criterion differ'):
        traces.write(tmp_path, KEY | {'criterion': 'fisher'}, LAYOUT, 3, 4, examples)
    with pytest.raises(ConfigError, match='key.base differ'):
        traces.Traces(tmp_path, KEY | {'base': 'other'})
    with pytest.raises(DataError, match='no traces'):
        traces.Traces(tmp_path / 'nowhere')
    with pytest.raises(DataError, match='trace 3 of 3'):
        traces.Traces(tmp_path).read([3])
    path = tmp_path / traces.file_name(0)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r'record \d is damaged'):
        traces.Traces(tmp_path).read([0, 1, 2])


def test_small_scores_survive_sixteen_bits():
    """Squared gradients are below the smallest half; with the largest of each layer beside them their order stays."""
    tiny = example(0) | {'neurons': np.random.default_rng(1).random((3, 5)) * np.float32([[1e-9], [1e-14], [1]])}
    read = LAYOUT.from_bytes(LAYOUT.to_bytes(tiny))
    np.testing.assert_allclose(read['neurons'], tiny['neurons'], rtol=1e-3)
    assert not tiny['neurons'].astype(np.float16)[:2].any()  # as they are, nothing is left
    wide = traces.Layout((8,), (3, 2), (3, 5), 'float32')
    np.testing.assert_allclose(wide.from_bytes(wide.to_bytes(tiny))['context'], tiny['context'], rtol=1e-6)
    for change, words in (({'heads': np.full((3, 2), np.nan)}, 'heads_largest'), ({'context': np.ones(7)}, r'\(7,\)'),
                          ({'context': np.full(8, 1e6)}, 'not finite')):
        with pytest.raises(DataError, match=words):
            LAYOUT.to_bytes(example(0) | change)
    with pytest.raises(DataError, match='instead of'):
        LAYOUT.from_bytes(LAYOUT.to_bytes(tiny) + b'x')


class Rows:
    """Rows of 12 tokens, the last of which is a document of its own without a loss."""

    fingerprint = 'rows'

    def batch(self, numbers):
        rng = [np.random.default_rng(int(i)) for i in numbers]
        pair = lambda a: np.broadcast_to(np.asarray(a, np.int32), (len(rng), 12))
        weights = np.ones((len(rng), 12), np.float32)
        weights[:, 8:] = np.asarray(numbers)[:, None] % 2
        return {'tokens': np.stack([r.integers(0, 99, 12) for r in rng]).astype(np.int32), 'segments': pair(1 + (
            np.arange(12) >= 8)), 'positions': pair(np.r_[:8, :4]), 'weights': weights,
            'targets': np.stack([r.integers(0, 99, 12) for r in rng]).astype(np.int32)}


def test_a_store_of_a_models_traces(tmp_path, monkeypatch, quick_compile):
    """As the script makes it: resumed it has the same bytes, and holds what the task says of each span that counts."""
    cfg = ModelConfig.from_dict(training.llama(vocab=99, hidden=16, layers=2, heads=2, kv_heads=2, intermediate=24,
                                               max_seq_len=16))
    task = predictor_task.PredictorTask(cfg, predictor_task.PredictorConfig(block=2), window=4)
    rng = np.random.default_rng(3)
    base = jax.tree.map(lambda a: (rng.normal(size=a.shape) * 16**-0.5).astype(np.float32),
                        jax.eval_shape(task.init, jax.random.key(0))['base'])
    base = jax.tree.map(jax.numpy.asarray, base)
    make = lambda out: sparsity_traces.store(task, base, Rows(), 5, out, 'train', 2, 4)
    whole = make(tmp_path / 'whole')
    write = traces.write
    monkeypatch.setattr(traces, 'write', lambda *a: write(*a[:-1], killed_at(2, a[-1])))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / 'cut')
    monkeypatch.setattr(traces, 'write', write)
    assert contents(make(tmp_path / 'cut')) == contents(whole)
    found = traces.Traces(whole)
    assert len(found) == 3 * 2 + 2 * 3  # rows 0, 2, 4 have two spans that count, rows 1 and 3 all three
    expected = jax.jit(task.features)(base, Rows().batch([1, 1]))
    read = found.read([2, 3, 4])
    for name in ('context', 'heads', 'neurons'):
        np.testing.assert_allclose(read[name], expected[name][0], rtol=3e-3, atol=1e-3 * np.abs(expected[name]).max())
    np.testing.assert_allclose(found.mean()['heads'], found.read(range(12))['heads'].mean(0), rtol=1e-5)
