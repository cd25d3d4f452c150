"""A run that is killed for real, again and again, ends with the same bits as one that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backbone.errors import FingerprintMismatch, RequestError
from configs import base_enwik8
from harness import train
from harness.checkpoint import WRITING, read_part, steps_in
from harness.metrics import rows

ROOT = Path(__file__).parents[2]
SAVE_EVERY = 5
PATIENCE = 240  # seconds; a step takes milliseconds
# Everything a checkpoint must carry: two moments a leaf, an average, microbatches, a schedule that leads to the end.
CHANGES = {'log_every': 1, 'ema_decay': 0.9, 'data.seq_len': 32, 'data.batch_size': 4,
           'optimizer.accumulate': 2, 'optimizer.warmup_steps': 10, 'eval.every': 1, 'eval.batches': 1,
           'checkpoint.every': SAVE_EVERY, 'checkpoint.max_to_keep': 2}
SHORT = {'num_steps': 60, 'samples.prompts': '()'}
LONG = {'num_steps': 400, 'samples.every': 20, 'samples.max_new_tokens': 4}
CLOCKED = {'tokens_per_s', 'mfu'}


class Run:
    """The command a user gives, with a small text, in a working directory of its own."""

    def __init__(self, shared: Path, name: str, changes: dict):
        self.workdir, self.log, self.steps = shared / name, shared / f'{name}.log', changes['num_steps']
        flags = CHANGES | changes | {'data.manual_dir': shared / 'text', 'data.data_dir': shared / 'data'}
        self.command = [sys.executable, '-m', 'harness.launch.train', '--config=configs/base_enwik8.py:tiny',
                        f'--workdir={self.workdir}', *(f'--config.{key}={value}' for key, value in flags.items())]
        self.environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR':
                                         str(shared / 'xla')}

    def start(self) -> subprocess.Popen:
        with self.log.open('a') as sink:
            return subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=sink, stderr=sink)

    def finish(self) -> None:
        code = self.start().wait(PATIENCE)
        assert code == 0 and (self.workdir / 'finished').exists(), self.said()

    def said(self) -> str:
        return self.log.read_text()[-3000:]

    def last_row(self) -> int:
        return max((row['step'] for row in rows(self.workdir)), default=0)

    def saving(self) -> bool:
        folder = self.workdir / 'checkpoints'
        return folder.exists() and any(WRITING in name for name in os.listdir(folder))

    def wait(self, process: subprocess.Popen, reached) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def result(self) -> tuple[list, dict]:
        """(rows without what a clock said, every array of the last checkpoint as bytes)."""
        found = [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows(self.workdir)]
        return found, self.state(self.steps)

    def samples(self) -> str:
        path = self.workdir / 'samples.jsonl'
        return path.read_text() if path.exists() else ''

    def state(self, step: int) -> dict:
        parts = {part: read_part(self.workdir / 'checkpoints', part, step)[1] for part in ('params', 'ema', 'rest')}
        return {(part, name): (leaf.dtype, leaf.shape, leaf.tobytes())
                for part, leaves in parts.items() for name, leaf in leaves.items()}


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """The text, what is prepared from it, and the compiled programs: one for all runs."""
    folder = tmp_path_factory.mktemp('resume')
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdefghij', k=draw.randint(2, 7))) for _ in range(100)]
    (folder / 'text').mkdir()
    (folder / 'text' / 'enwik8').write_text('\n'.join('  <page>\n' + ' '.join(draw.choices(words, k=120))
                                                      for _ in range(60)))
    return folder


@pytest.fixture(scope='module')
def uninterrupted(shared):
    run = Run(shared, 'uninterrupted', SHORT)
    run.finish()
    return run


def strike(run: Run, how: str, target: int, draw: random.Random) -> None:
    """One life of the process, ended when it is past step `target`; `start`: at any moment before that."""
    target = max(target, run.last_row() + 1)  # what an earlier life wrote does not count
    process = run.start()
    try:
        if how == 'start':
            time.sleep(draw.uniform(0.2, 6))
        else:
            run.wait(process, lambda: run.last_row() >= target and (how != 'save' or run.saving()))
            time.sleep(draw.uniform(0, 0.1))
        if how in ('SIGTERM', 'SIGINT'):
            assert process.poll() is None, run.said()
            process.send_signal(getattr(signal, how))
            assert process.wait(30) == 0, run.said()
            assert steps_in(run.workdir / 'checkpoints')[-1] == run.last_row() < run.steps
        else:
            if how == 'grace too short':
                process.send_signal(signal.SIGTERM)
                time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            code = process.wait(30)  # a graceful end may have been quicker
            assert code == -signal.SIGKILL or code == 0 and how == 'grace too short', run.said()
    finally:
        process.kill()
        process.wait()
    assert not (run.workdir / 'finished').exists()


def check_same_as(run: Run, uninterrupted: Run) -> None:
    run.finish()
    (found, state), (expected, expected_state) = run.result(), uninterrupted.result()
    assert [(row['kind'], row['step']) for row in found] == [(row['kind'], row['step']) for row in expected]
    assert found == expected and state == expected_state
    assert run.samples() == uninterrupted.samples()
    assert not run.saving() and steps_in(run.workdir / 'checkpoints') == [run.steps - SAVE_EVERY, run.steps]


def test_the_comparison_would_see_a_difference(uninterrupted):
    (found, state), steps = uninterrupted.result(), uninterrupted.steps
    assert [row['step'] for row in found if row['kind'] == 'train'] == list(range(1, steps + 1))
    assert len({row['loss'] for row in found if row['kind'] == 'train'}) > 0.9 * steps
    before = uninterrupted.state(steps - SAVE_EVERY)
    still = {name for part, name in before if state[part, name] == before[part, name]}
    assert state.keys() == before.keys() and still == {'rng', 'bad_steps'}


@pytest.mark.parametrize('blows', [
    (('save', 12), ('SIGINT', 30)),
    pytest.param((('step', 7), ('save', 14), ('SIGTERM', 25), ('SIGINT', 35)), marks=pytest.mark.slow)],
    ids=['twice', 'four times'])
def test_killed(shared, uninterrupted, blows):
    draw, run = random.Random(3), Run(shared, f'killed-{len(blows)}', SHORT)
    for how, target in blows:
        strike(run, how, target, draw)
    check_same_as(run, uninterrupted)


def test_a_directory_is_claimed_once(tmp_path):
    config = base_enwik8.get_config('tiny')
    (tmp_path / '.half.json').write_text('{"form')  # killed while it was claimed the first time
    train.claim(tmp_path, config, leader=True)
    train.claim(tmp_path, config, leader=True)
    config.seed = 1
    with pytest.raises(FingerprintMismatch, match='seed 0 -> 1'):
        train.claim(tmp_path, config, leader=True)
    (tmp_path / 'config.json').rename(tmp_path / 'thesis.txt')
    with pytest.raises(RequestError, match='holds other files'):
        train.claim(tmp_path, config, leader=True)


@pytest.mark.slow
def test_soak(shared):
    """48 kills: in the middle of steps, saves, starts and graceful ends."""
    uninterrupted = Run(shared, 'long', LONG)
    uninterrupted.finish()
    assert uninterrupted.samples().count('\n') == uninterrupted.steps // 20
    for seed in range(2):
        draw, run = random.Random(seed), Run(shared, f'soak-{seed}', LONG)
        ways = ['step', 'save', 'save', 'SIGTERM', 'SIGINT', 'grace too short'] * 3 + ['start'] * 6
        draw.shuffle(ways)
        for how, target in zip(ways, sorted(draw.sample(range(1, 300), len(ways))), strict=True):
            strike(run, how, target, draw)
        check_same_as(run, uninterrupted)
