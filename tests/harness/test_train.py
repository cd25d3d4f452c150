"""The loop: what a run writes, how it goes on, and what it refuses. Kills are in test_resume.py."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError, DataError, FingerprintMismatch, RequestError, TrainingDiverged
from backbone.language_model import LanguageModel
from backbone.language_model import build as build_language_model
from configs import base_enwik8, training
from harness import metrics, train
from harness.checkpoint import read_part, steps_in

MESH = {'stage': 1, 'data': 1, 'expert': 1, 'model': 1, 'fsdp': True}
ROOT = pathlib.Path(__file__).parents[2]
QUICK = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}  # of a process that compiles much and computes little
WORDS = ('time', 'stack', 'river', 'model', 'light', 'token', 'stone', 'layer', 'house', 'early', 'draft', 'exit')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """A small wiki dump of random words."""
    folder, rng = tmp_path_factory.mktemp('text'), random.Random(0)
    pages = (f'  <page>\n    <title>{i}</title>\n{" ".join(rng.choices(WORDS, k=rng.randint(20, 120)))}\n  </page>\n'
             for i in range(300))
    (folder / 'enwik8').write_text('<mediawiki>\n' + ''.join(pages))
    return folder


@pytest.fixture(scope='module')
def make(text, tmp_path_factory):
    """A config of a few steps on that text."""
    store = tmp_path_factory.mktemp('datasets')

    def config(**changes):
        found = base_enwik8.get_config('tiny')
        found.task.kwargs.model = training.llama(vocab=257, hidden=32, layers=2, heads=2, kv_heads=2, intermediate=48,
                                                 max_seq_len=64)
        found.data.update({'manual_dir': str(text), 'data_dir': str(store), 'seq_len': 32, 'batch_size': 8})
        found.num_steps, found.log_every = 8, 2
        found.optimizer.update({'warmup_steps': 2})
        found.eval.update({'every': 4, 'batches': 2})
        found.samples.update({'max_new_tokens': 4})
        found.checkpoint.update({'every': 3})
        for key, value in changes.items():
            group, _, name = key.rpartition('__')
            (found[group] if group else found)[name] = value
        return found.lock()
    return config


@pytest.fixture(scope='module')
def finished(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    said = []
    assert train.run(make(), folder, say=said.append) == 'finished'
    return folder, said


def losses(folder):
    return {(row['step'], row['kind']): row['loss'] for row in metrics.rows(folder) if row['kind'] != 'event'}


def same(one, other):
    for part in ('params', 'rest'):
        (step, ours), (also, theirs) = (read_part(folder / 'checkpoints', part) for folder in (one, other))
        assert step == also and ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_what_a_run_leaves(finished):
    folder, said = finished
    assert {p.name for p in folder.iterdir()} >= {'config.json', 'tokenizer', 'checkpoints', 'metrics.jsonl',
                                                  'loss.png', 'tensorboard', 'samples.jsonl', 'finished'}
    assert steps_in(folder / 'checkpoints') == [3, 6, 8]
    rows = metrics.rows(folder)
    assert [row['step'] for row in rows if row['kind'] == 'train'] == [2, 4, 6, 8]
    assert [row['step'] for row in rows if row['kind'] == 'eval'] == [4, 8]
    assert rows[-1]['bits_per_byte'] == pytest.approx(
        rows[-1]['nll'] / np.log(2), rel=0.01)  # a byte a token, but for the ends of documents
    assert rows[0]['loss'] > rows[-2]['loss'] and all(row['mfu'] > 0 for row in rows[1:] if row['kind'] == 'train')
    assert json.loads((folder / 'samples.jsonl').read_text())['step'] == 8
    assert any('finished 8 steps' in line for line in said)


class Killed(BaseException):
    """Nothing in the loop catches it."""


def interrupt(monkeypatch, config, folder, after):
    """Runs until the batch after `after` is asked for, and dies there."""
    real = train.data.batches

    def batches(*args, start_step, **kwargs):
        stream = real(*args, start_step=start_step, **kwargs)

        class Dying:
            step = start_step

            def __next__(self):
                self.step += 1
                if self.step > after:
                    raise Killed
                return next(stream)

            def close(self):
                stream.close()
        return Dying()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.data, 'batches', batches)
        train.run(config, folder, say=lambda _: None)


def test_continuing_is_bit_equal_and_rows_are_neither_doubled_nor_lost(make, finished, tmp_path, monkeypatch):
    folder = tmp_path / 'broken'
    interrupt(monkeypatch, make(), folder, after=1)  # before there is a checkpoint
    interrupt(monkeypatch, make(), folder, after=5)
    said = []
    assert train.run(make(), folder, say=said.append) == 'finished'
    assert 'continuing after step 3 of 8' in said[0]
    same(folder, finished[0])
    assert losses(folder) == losses(finished[0])
    assert len(metrics.rows(folder)) == len(metrics.rows(finished[0]))


@pytest.mark.filterwarnings('ignore:.*257 vocab are not divided')
def test_continuing_on_another_mesh(make, finished, tmp_path, monkeypatch):
    """One device, then 2 x 2 x 2, with the same batches: equal to rounding."""
    folder = tmp_path / 'elastic'
    interrupt(monkeypatch, make(), folder, after=4)
    wide = make(mesh=MESH | {'data': 4, 'model': 2}, samples__prompts=())
    assert train.run(wide, folder, say=lambda _: None) == 'finished'
    for key, loss in losses(finished[0]).items():
        assert losses(folder)[key] == pytest.approx(loss, abs=1e-5), key


def test_a_finished_run_stays_as_it_is(make, finished):
    before = (finished[0] / 'metrics.jsonl').read_bytes()
    assert train.run(make(), finished[0], say=lambda _: None) == 'finished'
    assert (finished[0] / 'metrics.jsonl').read_bytes() == before


def test_a_signal_saves_and_leaves(make, finished, tmp_path, monkeypatch):
    folder, real = tmp_path / 'signal', train.place_batch
    calls = []

    def place(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'place_batch', place)
        assert train.run(make(eval__every=0), folder, say=lambda _: None) == 'preempted'
    assert steps_in(folder / 'checkpoints') == [3, 5] and not (folder / 'finished').exists()
    assert train.run(make(eval__every=4), folder, say=lambda _: None) == 'finished'
    same(folder, finished[0])


def test_another_config_is_refused_by_the_fields_that_differ(make, finished):
    with pytest.raises(FingerprintMismatch, match=r'optimizer\.learning_rate 0.003 -> 0.1.*seed 0 -> 1'):
        train.run(make(optimizer__learning_rate=0.1, seed=1), finished[0])
    train.claim(finished[0], make(log_every=5, checkpoint__every=1), True)  # these change no number


def test_a_directory_with_other_files_is_refused(make, tmp_path):
    (tmp_path / 'thesis.tex').write_text('x')
    with pytest.raises(RequestError, match='holds other files'):
        train.run(make(), tmp_path)


@dataclasses.dataclass(frozen=True)
class Diverging(LanguageModel):
    """The loss is not finite once the embedding has moved enough: after a few steps, for good."""

    def loss(self, params, batch, rng):
        loss, metrics = super().loss(params, batch, rng)
        moved = jnp.abs(params['base']['final_norm']['scale'] - 1).max()
        return jnp.where(moved > 6e-3, jnp.nan, loss), metrics


def diverging(**kwargs):
    return Diverging(build_language_model(**kwargs).cfg)


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(make, tmp_path):
    config = make(task={'factory': f'{__name__}.diverging', 'kwargs': make().task.kwargs}, max_bad_steps=3,
                  num_steps=20, log_every=1)
    said = []
    with pytest.raises(TrainingDiverged, match='3 steps in a row, up to step .*checkpoint of step 3 is kept'):
        train.run(config, tmp_path / 'run', say=said.append)
    assert sum('skipped' in line for line in said) == 3
    _, leaves = read_part(tmp_path / 'run' / 'checkpoints', 'params')
    assert all(np.isfinite(a).all() for a in leaves.values())
    assert [row['bad_steps'] for row in metrics.rows(tmp_path / 'run') if row['kind'] == 'event'] == [1, 2, 3]


@pytest.mark.parametrize('changes, error, names', (
    ({'data__batch_size': 0}, ConfigError, 'data.batch_size'),
    ({'mesh': MESH | {'data': 3}}, ConfigError, 'batch_size 8 .* mesh.data 3'),
    ({'mesh': MESH | {'data': 16}}, ConfigError, '16 devices'),
    ({'compute_dtype': 'float8'}, ConfigError, 'compute_dtype'),
    ({'data__dataset': 'enwik9'}, ConfigError, 'enwik9'),
    ({'data__manual_dir': '/nowhere'}, DataError, '/nowhere'),
    ({'task': {'factory': 'backbone.language_model.build', 'kwargs': {'model': 'llama-9'}}}, ConfigError, 'llama-9'),
), ids=lambda v: v if isinstance(v, str) else '')
def test_bad_configs_are_named(make, tmp_path, changes, error, names):
    with pytest.raises(error, match=names):
        train.run(make(**changes), tmp_path / 'run', say=lambda _: None)


def run_train(*args, env=(), wait=True):
    command = [sys.executable, '-m', 'harness.launch.train', *args]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''} | QUICK | dict(env))
    return (*process.communicate(timeout=240), process.returncode) if wait else process


def test_a_wrong_key_ends_with_code_2(tmp_path):
    _, err, code = run_train('--config=configs/base_enwik8.py:tiny', f'--workdir={tmp_path}/run',
                             '--config.optimizer.learnin_rate=1')
    assert code == 2 and 'learnin_rate' in err and not (tmp_path / 'run').exists()


def flags(config, folder):
    """The command line that makes configs/base_enwik8.py:tiny into this config."""
    model = config.task.kwargs.model
    changed = {'data.manual_dir': config.data.manual_dir, 'data.data_dir': config.data.data_dir,
               'data.seq_len': config.data.seq_len, 'data.batch_size': config.data.batch_size,
               'num_steps': config.num_steps, 'log_every': config.log_every, 'eval.every': config.eval.every,
               'eval.batches': config.eval.batches, 'optimizer.warmup_steps': config.optimizer.warmup_steps,
               'samples.max_new_tokens': 4, 'checkpoint.every': config.checkpoint.every,
               'task.kwargs.model.hidden_size': model.hidden_size, 'task.kwargs.model.max_seq_len': model.max_seq_len,
               'task.kwargs.model.mlp.intermediate_size': model.mlp.intermediate_size,
               'task.kwargs.model.attention.head_dim': model.attention.head_dim}
    return ['--config=configs/base_enwik8.py:tiny', f'--workdir={folder}',
            *(f'--config.{key}={value}' for key, value in changed.items())]


def start_two(make, folder, *changes):
    """Two processes that find each other on loopback, as one run over mesh.data=2."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    return [run_train(*flags(make(), folder), '--config.mesh.data=2', f'--coordinator=localhost:{port}',
                      '--num_processes=2', f'--process_id={i}', *changes, wait=False) for i in range(2)]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_both(make, tmp_path):
    """SIGTERM reaches only the process that does not lead; both agree on a step, and the run goes on from there."""
    folder = tmp_path / 'both'
    both = start_two(make, folder, '--config.num_steps=4000', '--config.checkpoint.every=4000')
    deadline = time.monotonic() + 120
    while not any(row['step'] >= 20 for row in metrics.rows(folder)):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (step,) = steps_in(folder / 'checkpoints')
    assert 20 <= step < 4000 and f'saved after step {step}' in said[0][0]


def test_two_processes_train_as_one_and_their_checkpoint_is_restored_by_one(make, finished, tmp_path):
    folder = tmp_path / 'two'
    both = start_two(make, folder)
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for key, loss in losses(finished[0]).items():
        assert losses(folder)[key] == pytest.approx(loss, abs=1e-5), key
    assert 'finished 8 steps' in said[0][0] and 'finished' not in said[1][0]  # process 0 speaks, the other is silent
    _, ours = read_part(folder / 'checkpoints', 'params')
    _, theirs = read_part(finished[0] / 'checkpoints', 'params')
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-3, err_msg=name)
    assert train.run(make(), folder, say=lambda _: None) == 'finished'  # one process takes the directory over
