"""Preparation happens once, whole or not at all, and damage is found."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from backbone import tokenizer as tokenizer_lib
from backbone.errors import DataError
from harness import data
from harness.data import builders, datasets, once
from harness.data.rows import Source
from tests.harness.data.conftest import ROOT

BYTES = tokenizer_lib.of_bytes()


def _gated(folder: Path, files):
    """Says in the folder above that it began, then waits there for leave to go on."""
    def examples():
        yield {'id': 'first', 'text': b'before '}
        with (folder.parent / 'log').open('a') as log:
            log.write('began\n')
        while not (folder.parent / 'go').exists():
            time.sleep(0.01)
        yield {'id': 'second', 'text': b'and after'}
    return {'train': examples}


GATED = datasets.Dataset('gated', '1.0.0', ('train',), {'id': 'text', 'text': 'text'}, 'any file',
                         lambda folder: sorted(folder.glob('*')), _gated, datasets.plain_text)
PREPARE = ('import json, sys; from harness import data; part = json.loads(sys.argv[1]);'
           'print(len(data.open_rows(part, "train", data.make_tokenizer(part))))')


@pytest.fixture
def gated(config, tmp_path):
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'a').write_text('a')
    return config('tests.harness.data.test_once.GATED', tmp_path / 'files', seq_len=4)


def start(part, tmp_path, times: int):
    """Another process that prepares `part`, once it has begun."""
    process = subprocess.Popen([sys.executable, '-c', PREPARE, json.dumps(part)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (log := tmp_path / 'log').exists() or log.read_text().count('began') < times:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def text_of(rows) -> bytes:
    """The inputs, row after row, with | for the end of a document."""
    return b''.join(b'|' if token == 256 else bytes([token]) for i in range(len(rows))
                    for token in rows[i]['tokens'][rows[i]['segments'] > 0].tolist())


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob('*') if '.partial-' in path.name]


def test_killed_in_the_middle_and_started_again(gated, tmp_path, capfd):
    process = start(gated, tmp_path, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert left_over(tmp_path / 'data')  # it was in the middle
    (tmp_path / 'go').touch()
    rows = data.open_rows(gated, 'train', BYTES)
    assert text_of(rows) == b'before |and after|'
    assert not left_over(tmp_path / 'data')


def test_two_processes_prepare_it_once(gated, tmp_path):
    process = start(gated, tmp_path, 1)
    found = []
    second = threading.Thread(target=lambda: found.append(data.open_rows(gated, 'train', BYTES)))
    second.start()
    second.join(0.5)
    assert second.is_alive()  # it waits for the other
    (tmp_path / 'go').touch()
    out, _ = process.communicate(timeout=60)
    second.join(60)
    assert int(out) == len(found[0])
    assert (tmp_path / 'log').read_text() == 'began\n'


@pytest.fixture
def part(config, wiki_dir):
    return config('enwik8', wiki_dir)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_corrupt_row_is_named_and_the_others_are_read(part):
    rows = data.open_rows(part, 'train', BYTES)
    path = rows.folder / 'rows-00000.array_record'
    flip(path, path.read_bytes().index(rows[7]['tokens'].astype('<u2').tobytes()) + 3)
    damaged = data.open_rows(part, 'train', BYTES)  # the size is right, so nothing is seen yet
    for read in (lambda: damaged[7], lambda: damaged.batch([3, 7, 1]), lambda: list(
            data.eval_batches(damaged, batch_size=4, count=0))):
        with pytest.raises(DataError, match=r'rows-00000\.array_record: record 7 is damaged .*delete .*made again'):
            read()
    with data.batches(damaged, batch_size=len(damaged), seed=0) as stream, pytest.raises(
            DataError, match=r'^\S+rows-00000\.array_record: record 7 '):
        next(stream)
    assert np.array_equal(damaged[8]['tokens'], rows[8]['tokens'])


def test_a_corrupt_document_is_named(part, monkeypatch):
    """Out of several files: the reader is told the file, and the place in it."""
    monkeypatch.setattr(builders, 'EXAMPLES_PER_FILE', 10)
    folder = Source.of(part).prepared()
    assert len(list(builders.examples(folder, 'train'))) > 30
    path = sorted(folder.glob('*train*'))[2]
    flip(path, 900)
    with pytest.raises(DataError, match=rf'{path.name}: record \d is damaged'):
        list(builders.examples(folder, 'train'))


@pytest.mark.parametrize('spoil', ['cut', 'lost', 'manifest'])
@pytest.mark.parametrize('what', ['rows', 'prepared'])
def test_damaged_folders_are_made_again(part, what, spoil, capfd):
    rows = data.open_rows(part, 'train', BYTES)
    before = text_of(rows)
    folder = rows.folder if what == 'rows' else Source.of(part).prepared()
    path = next(folder.glob('*.array_record*')) if spoil != 'manifest' else folder / once.MANIFEST
    if spoil == 'lost':
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    capfd.readouterr()
    if what == 'prepared':
        Source.of(part).prepared()
        again = data.open_rows(part | {'seq_len': 32}, 'train', BYTES)
        assert text_of(again) == before
    else:
        assert text_of(data.open_rows(part, 'train', BYTES)) == before
    said = capfd.readouterr().err
    assert f'{folder} is damaged (' in said and 'making it again' in said
    assert not left_over(folder.parent)


def test_another_text_is_another_folder(part, wiki_dir):
    first = data.open_rows(part, 'train', BYTES)
    fingerprints = {first.fingerprint}
    for change in ({'seq_len': 8}, {'data_dir': part['data_dir'] + '2'}):
        fingerprints.add(data.open_rows(part | change, 'train', BYTES).fingerprint)
    assert len(fingerprints) == 2  # where it is kept does not matter
    fingerprints.add(data.open_rows(part, 'test', BYTES).fingerprint)
    (wiki_dir / 'enwik8').write_bytes((wiki_dir / 'enwik8').read_bytes().replace(b'words', b'swords'))
    changed = data.open_rows(part, 'train', BYTES)
    assert changed.fingerprint not in fingerprints and b'swords' in text_of(changed)


def test_a_disk_that_refuses(part, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(once, '_seal', full)
    with pytest.raises(DataError, match='disk full while writing'):
        data.open_rows(part, 'train', BYTES)
    monkeypatch.undo()
    assert not left_over(Path(part['data_dir'])) and len(data.open_rows(part, 'train', BYTES))


def test_an_empty_split(config, tmp_path):
    (tmp_path / 'books').mkdir()
    (tmp_path / 'books' / 'one.txt').write_text('only one book')
    part = config('gutenberg', tmp_path / 'books')
    assert len(data.open_rows(part, 'train', BYTES)) == 1
    with pytest.raises(DataError, match=r"split 'validation' is empty; there are train \(1\)"):
        data.open_rows(part, 'validation', BYTES)
    (tmp_path / 'books' / 'one.txt').write_text('')
    with pytest.raises(DataError, match='holds no text for gutenberg'):
        data.open_rows(part, 'train', BYTES)
