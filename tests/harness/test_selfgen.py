"""Answers in bulk: the same rows however often the run is killed, once each, in forms that can be read back."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from backbone import formats, tokenizer
from backbone.errors import FingerprintMismatch, RequestError
from backbone.formats import Loaded
from backbone.model import PlainTarget
from backbone.sampling import Sampling
from harness import partial, prompts, selfgen
from harness.baselines import Autoregressive
from harness.data import datasets
from harness.generation import Session
from tests.conftest import lively, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ['one', 'two and two', 'three', 'one', 'a prompt of the next bucket', 'five', 'and another one, as long', 'six']
PLAN = selfgen.Plan('jsonl', samples_per_prompt=2, max_new_tokens=12, sampling=Sampling(1.0), seed=3, batch_size=4)
BATCHES = 4  # five short prompts and two long ones, twice each


@pytest.fixture(scope='module')
def model():
    cfg = tiny_config(vocab=257, layers=2)
    return cfg, jax.tree.map(np.asarray, lively(cfg))


@pytest.fixture(scope='module')
def session(model):
    cfg, params = model
    return Session(PlainTarget(cfg), {'base': params}, Autoregressive(), tokenizer.of_bytes(), name='tiny',
                   base_hash=formats.params_hash(params))


def run(session, out, plan=PLAN, texts=TEXTS, **changes):
    plan = dataclasses.replace(plan, **changes)
    return selfgen.run(session, texts, out, plan, report=[].append, progress=False)


@pytest.fixture(scope='module')
def whole(session, tmp_path_factory):
    """An output made in one go: (text, summary)."""
    out = tmp_path_factory.mktemp('whole') / 'answers.jsonl'
    summary = run(session, out)
    return out.read_text(), summary


def test_rows(whole, session):
    rows = [json.loads(line) for line in whole[0].splitlines()]
    assert [(row['index'], row['sample']) for row in rows] == [(i, s) for i in (0, 1, 2, 4, 5, 6, 7) for s in (0, 1)]
    assert [row['prompt'] for row in rows[::2]] == list(dict.fromkeys(TEXTS))
    assert (whole[1].rows, whole[1].same_prompts, whole[1].same_answers) == (14, 1, 0)
    for row in rows:
        assert row['prompt_tokens'] == list(row['prompt'].encode())
        assert row['finished'] == (row['tokens'][-1] == 256) and (row['finished'] or len(row['tokens']) == 12)
        assert row['text'] == bytes(i for i in row['tokens'] if i < 256).decode(errors='replace')
    assert whole[1].unfinished == sum(not row['finished'] for row in rows)


class Killed(BaseException):
    pass


def kill_after(monkeypatch, count: int, made: list):
    """The process ends when batch number `count` is computed and not yet written."""
    real = selfgen.answer

    def answer(session, jobs, *rest):
        if len(made) >= count:
            raise Killed
        made.append([job.key for job in jobs])
        return real(session, jobs, *rest)
    monkeypatch.setattr(selfgen, 'answer', answer)


def test_killed_anywhere_and_started_again(session, whole, tmp_path, monkeypatch):
    """Killed in every batch, in the last rename and after it: each batch is made once, to the bytes of one go."""
    out, made = tmp_path / 'answers.jsonl', []
    for count in range(BATCHES):
        kill_after(monkeypatch, count, made)
        with pytest.raises(Killed):
            run(session, out)
        monkeypatch.undo()
        assert not out.exists()
    kill_after(monkeypatch, 99, made)
    monkeypatch.setattr(partial.os, 'replace', lambda a, b, real=os.replace: (
        real(a, b) if Path(b) != out else (_ for _ in ()).throw(Killed)))
    with pytest.raises(Killed):
        run(session, out)
    monkeypatch.undo()
    kill_after(monkeypatch, 0, [])
    monkeypatch.setattr(partial.shutil, 'rmtree', lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(session, out)
    monkeypatch.undo()
    assert out.read_text() == whole[0] and (tmp_path / 'answers.jsonl.partial').exists()
    kill_after(monkeypatch, 0, [])
    assert run(session, out).rows == 14  # complete: nothing is made
    assert len(made) == BATCHES and len({key for keys in made for key in keys}) == sum(map(len, made)) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ['answers.jsonl', 'answers.jsonl.selfgen.json']


def test_another_batch_size_gives_the_same_rows(session, whole, tmp_path, monkeypatch):
    """Also when it changes between two starts. Another seed does not: that the rows agree is no accident."""
    kill_after(monkeypatch, 2, [])
    with pytest.raises(Killed):
        run(session, tmp_path / 'a')
    monkeypatch.undo()
    run(session, tmp_path / 'a', batch_size=3)
    assert (tmp_path / 'a').read_text() == whole[0]
    run(session, tmp_path / 'b', seed=4)
    rows = [[json.loads(line)['tokens'] for line in text.splitlines()] for text in
            (whole[0], (tmp_path / 'b').read_text())]
    assert sum(a == b for a, b in zip(*rows, strict=True)) <= 1


def test_other_settings_are_refused_by_name(session, tmp_path, monkeypatch):
    out = tmp_path / 'answers'
    for finished in (False, True):
        kill_after(monkeypatch, 99 if finished else 1, [])
        if finished:
            run(session, out)
        else:
            with pytest.raises(Killed):
                run(session, out)
        before = sorted(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
        for changes, named in (({'seed': 4}, 'seed 3 -> 4'), ({'sampling': Sampling(0.5)}, 'temperature 1.0 -> 0.5'),
                               ({'max_new_tokens': 13}, 'max_new_tokens 12 -> 13'), ({'form': 'tfds'}, 'format'),
                               ({'texts': TEXTS[:-1]}, 'prompts')):
            with pytest.raises(FingerprintMismatch, match=named):
                run(session, out, **changes)
        with pytest.raises(FingerprintMismatch, match='base_hash'):
            run(dataclasses.replace(session, base_hash='other'), out)
        assert sorted(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()) == before
        monkeypatch.undo()
    (tmp_path / 'foreign').write_text('mine')
    with pytest.raises(RequestError, match='was not made by this command'):
        run(session, tmp_path / 'foreign')
    assert (tmp_path / 'foreign').read_text() == 'mine'


def test_repeated_answers_are_left_out(session, tmp_path):
    """top_k 1 draws the same answer every time."""
    summary = run(session, tmp_path / 'x', sampling=Sampling(1.0, top_k=1), texts=TEXTS[:2])
    rows = [json.loads(line) for line in (tmp_path / 'x').read_text().splitlines()]
    assert (summary.rows, summary.same_answers) == (2, 2) and [row['sample'] for row in rows] == [0, 0]


def test_tfds(session, whole, tmp_path):
    """Read by TFDS without TensorFlow, and by the training data as the very ids that were sampled."""
    out = tmp_path / 'answers'
    run(session, out, form='tfds')
    source = tfds.builder_from_directory(out).as_data_source(selfgen.SPLIT)
    assert 'tensorflow' not in sys.modules
    for found, line in zip(source, whole[0].splitlines(), strict=True):
        want = json.loads(line)
        assert {k: v.decode() if isinstance(v, bytes) else np.asarray(v).tolist() for k, v in found.items()} == want
        assert found['tokens'].dtype == found['prompt_tokens'].dtype == np.int32
    record = json.loads((out / 'selfgen.json').read_text())
    assert record['seed'] == 3 and record['model']['base_hash'] == session.base_hash
    assert record['counts']['rows'] == 14 and record['versions']['jax'] == jax.__version__
    assert record['settings']['temperature'] == 1.0 and record['git'] and record['command']

    written = datasets.get('selfgen')
    examples = [example for read in written.read(*written.folder(out)).values() for example in read()]
    pieces = [written.pieces(example, session.tokenizer) for example in examples]
    assert sorted(piece[1].content.tolist() for piece in pieces) == sorted(
        json.loads(line)['tokens'] for line in whole[0].splitlines())


def test_damaged_parts_are_made_again(session, whole, tmp_path, monkeypatch):
    out, told = tmp_path / 'answers', []
    kill_after(monkeypatch, 3, [])
    with pytest.raises(Killed):
        run(session, out)
    monkeypatch.undo()
    part = tmp_path / 'answers.partial' / '00001.json'
    part.write_text(part.read_text()[:-9])
    selfgen.run(session, TEXTS, out, PLAN, report=told.append, progress=False)
    assert any('00001.json is damaged' in line for line in told)
    assert out.read_text() == whole[0]


def test_a_full_disk_loses_nothing(session, whole, tmp_path, monkeypatch):
    out, real, calls = tmp_path / 'answers', os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 5:  # file and folder of the settings, of the first part, and then the second part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(partial.os, 'fsync', fsync)
    with pytest.raises(RequestError, match='cannot write .*No space left'):
        run(session, out)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / 'answers.partial').glob('*.json')) == [
        '00000.json', 'selfgen.json']
    run(session, out)
    assert out.read_text() == whole[0]


def test_one_process_at_a_time(tmp_path):
    with partial.Partial(tmp_path / 'x', {}, print), pytest.raises(RequestError, match='by another process'):
        partial.Partial(tmp_path / 'x', {}, print).__enter__()
    with partial.Partial(tmp_path / 'x', {}, print) as again:
        assert again.rows == []


def test_prompts(tmp_path):
    lines = tmp_path / 'x.jsonl'
    lines.write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n')
    assert prompts.texts(str(lines)) == ['a\nb', 'c']
    for content, named in (('{"prompt": "a"}\n{"text": "b"}\n', 'line 2 has no text'),
                           ('{"prompt"', 'line 1 is not JSON'), ('{"prompt": " "}\n', 'line 1 is empty'),
                           ('', 'no prompt')):
        lines.write_text(content)
        with pytest.raises(RequestError, match=named):
            prompts.texts(str(lines))
    assert prompts.texts('catalogue:mt_bench')[0].startswith('Compose an engaging travel blog')
    assert len(prompts.texts('catalogue:gsm8k')) == 7473
    heads = prompts.texts('catalogue:stdlib')
    assert any(text.startswith('def heapify(x):\n    """Transform list into a heap') for text in heads)
    with pytest.raises(RequestError, match='catalogue:enwik8: no prompts'):
        prompts.texts('catalogue:enwik8')


def test_bad_requests(session, tmp_path):
    for changes, named in (({'samples_per_prompt': 0}, 'samples_per_prompt'), ({'batch_size': 0}, 'batch_size'),
                           ({'form': 'csv'}, 'csv'), ({'sampling': Sampling(0.0)}, 'temperature 0'),
                           ({'max_new_tokens': 0}, 'max_new_tokens')):
        with pytest.raises(RequestError, match=named):
            dataclasses.replace(PLAN, **changes)
    with pytest.raises(RequestError, match='prompt number 2 of 2: 200 tokens'):
        run(session, tmp_path / 'x', texts=['a', 'b' * 200])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RequestError, match='--out needs --batch_file'):
        selfgen.check_flags(PLAN, None, 'x')
    with pytest.raises(RequestError, match='need --out'):
        selfgen.check_flags(PLAN, 'x', None)


def test_kill_9(model, tmp_path):
    """A real process, really killed when its first part is there; the same command ends what it began."""
    cfg, params = model
    formats.save(Loaded(cfg, params, tokenizer.of_bytes(), 'tiny', ''), tmp_path / 'model', 'headway')
    (tmp_path / 'p.txt').write_text('\n'.join(f'prompt number {i}' for i in range(40)) + '\n')
    out = tmp_path / 'answers'
    command = [sys.executable, '-m', 'harness.launch.generate', f'--model={tmp_path / "model"}', '--format=tfds',
               f'--batch_file={tmp_path / "p.txt"}', f'--out={out}', '--max_new_tokens=40', '--temperature=1',
               '--batch_size=1']
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'answers.partial' / '00000.json').exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = len(list((tmp_path / 'answers.partial').glob('0*.json')))
    assert not out.exists() and 1 <= kept < 40
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '40 rows' in done.stderr and 'tokens/s' in done.stderr
    source = tfds.builder_from_directory(out).as_data_source(selfgen.SPLIT)
    assert [int(row['index']) for row in source] == list(range(40))
    assert not (tmp_path / 'answers.partial').exists()
