"""The record of a run: rows keyed by step, whole after any kill, never doubled after resuming."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from backbone.errors import SaveError
from harness.metrics import Metrics, Progress, cut, plot, rows

ROOT = Path(__file__).parents[2]


def written(folder, steps, start=0, **more):
    metrics = Metrics(folder, start)
    for step in steps:
        metrics.write(step, {'loss': 5 / step, **more})
    metrics.close()


def strict(line):
    def refuse(name):
        raise ValueError(f'{name} is not JSON')
    return json.loads(line, parse_constant=refuse)


def test_rows(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {'loss': np.float32(0.5), 'norm': math.nan, 'rate': math.inf, 'n': np.int32(3)})
    metrics.write(1, {'loss': 0.25}, kind='eval')
    metrics.write(2, {'why': 'signal', 'steps': [1, 2]}, kind='event')
    metrics.close()
    found = [strict(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert found == rows(tmp_path) == [
        {'step': 1, 'kind': 'train', 'loss': 0.5, 'norm': None, 'rate': None, 'n': 3},
        {'step': 1, 'kind': 'eval', 'loss': 0.25}, {'step': 2, 'kind': 'event', 'why': 'signal', 'steps': [1, 2]}]


@pytest.mark.parametrize('tail', [b'', b'{"step": 9, "ki', b'{"step": 3}', b'\0' * 40, b'\0\xff\n[1]\n{"loss": 1}\n'],
                         ids=['whole', 'torn', 'no newline', 'zeros', 'not rows'])
def test_rows_past_the_restored_step_and_torn_ones_are_cut(tmp_path, tail):
    written(tmp_path, range(1, 10))
    path = tmp_path / 'metrics.jsonl'
    first = path.read_bytes()
    with path.open('ab') as sink:
        sink.write(tail)
    written(tmp_path, range(6, 12), start=5)
    assert [row['step'] for row in rows(tmp_path)] == list(range(1, 12))
    assert path.read_bytes().startswith(first[:first.index(b'{"step": 6')])  # what is kept is kept to the byte
    written(tmp_path, [], start=0)
    assert path.read_bytes() == b'' and list(tmp_path.glob('.metrics*')) == []


def test_nothing_is_rewritten_where_nothing_is_cut(tmp_path):
    written(tmp_path, range(1, 5))
    before = (tmp_path / 'metrics.jsonl').stat()
    cut(tmp_path / 'metrics.jsonl', 4)
    after = (tmp_path / 'metrics.jsonl').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_only_one_process_writes(tmp_path, capfd):
    metrics, progress = Metrics(tmp_path, 0, enabled=False), Progress(5, 0, enabled=False)
    metrics.write(1, {'loss': 1.0})
    progress.update(1, loss=1.0)
    metrics.flush()
    metrics.close()
    progress.close()
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr().err == ''


WRITER = '''
import sys
from harness.metrics import Metrics, rows
start = max((row['step'] for row in rows(sys.argv[1])), default=0)
metrics = Metrics(sys.argv[1], start)
for step in range(start + 1, 10 ** 9):
    metrics.write(step, {'loss': 1 / step, 'text': 'x' * 3000})
'''


def test_killed_while_writing(tmp_path):
    last = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, '-c', WRITER, str(tmp_path)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while len(rows(tmp_path)) < last + 200 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        steps = [row['step'] for row in rows(tmp_path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last + 200
        last = len(steps)


def events(folder):
    """What TensorBoard shows: {tag: {step: value}}, after every file's own purge."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted((folder / 'tensorboard').iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = struct.unpack_from('<Q', content, at)[0]
            event = Event.FromString(content[at + 12:at + 12 + size])
            at += size + 16
            if event.session_log.status == SessionLog.START:
                shown = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_tensorboard_shows_each_step_once(tmp_path):
    written(tmp_path, range(1, 10), odd=math.nan, past=1.0)
    assert set(events(tmp_path)['train/loss']) == set(range(1, 10))
    metrics = Metrics(tmp_path, 5)
    metrics.write(6, {'loss': 0.125})
    metrics.write(6, {'loss': 0.25}, kind='eval')
    metrics.flush()  # before a checkpoint; a kill after it loses nothing
    shown = events(tmp_path)
    assert list(shown['train/loss']) == [1, 2, 3, 4, 5, 6] and shown['train/loss'][6] == 0.125
    assert shown['eval/loss'] == {6: 0.25} and 6 not in shown['train/past'] and 'train/odd' not in shown
    metrics.close()


def test_a_full_disk(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {'loss': 1.0})
    size = (tmp_path / 'metrics.jsonl').stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        with pytest.raises(SaveError, match=r'cannot write .*metrics.jsonl: No space left'):
            metrics.write(2, {'loss': 1.0})  # ten bytes of it fit
        with pytest.raises(SaveError, match=r'cannot write .*metrics.jsonl: File too large'):
            metrics.write(3, {'loss': 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.path.getsize(tmp_path / 'metrics.jsonl') == size + 10
    written(tmp_path, [2, 3], start=1)
    assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3]
    with pytest.raises(SaveError, match='nowhere'):
        Metrics(tmp_path / 'nowhere', 0)


def test_the_loss_curve(tmp_path):
    pictures = [plot(tmp_path).read_bytes()]
    written(tmp_path, range(1, 30))
    pictures.append(plot(tmp_path).read_bytes())
    metrics = Metrics(tmp_path, 29)
    metrics.write(29, {'nll': 0.5}, kind='eval')
    metrics.write(30, {'loss': math.nan})
    metrics.close()
    pictures.append(plot(tmp_path).read_bytes())
    assert all(picture.startswith(b'\x89PNG') for picture in pictures) and len(set(pictures)) == 3


def test_the_progress_bar_says_what_matters(capfd):
    progress = Progress(400, 100)
    progress.update(200, loss=1.23456, tokens_per_s=54321.0, mfu=0.4321)
    progress.close()
    said = capfd.readouterr().err
    assert all(part in said for part in ('200/400', 'loss 1.2346', '54,321 tokens/s', 'MFU 43%'))


def test_importing_it_is_cheap():
    heavy = subprocess.run([sys.executable, '-c', "import harness.metrics, sys; print(*{'jax', 'matplotlib', "
                            "'tensorboardX', 'tqdm', 'numpy'} & set(sys.modules))"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split()
    assert heavy == []
