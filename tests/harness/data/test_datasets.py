"""What each dataset's files become, in splits and documents."""

import gzip
import json
import sys

import pyarrow
import pytest

from backbone import catalogue
from backbone.errors import ConfigError, DataError, FetchError
from harness.data import builders, datasets, jsonl
from harness.data.rows import Source
from tests.harness.data.conftest import wiki, write_jsonl


def texts(config) -> dict[str, list[bytes]]:
    """{split: texts} through the tensorflow-datasets builder."""
    source = Source.of(config)
    folder = source.prepared()
    return {split: [example['text'] for example in builders.examples(folder, split)]
            for split in builders.splits(folder)}


def test_enwik8_pages_join_to_the_file():
    """The whole file, byte for byte, cut at 90 and 95 million bytes."""
    try:
        path = catalogue.fetch('enwik8')
    except FetchError as error:
        pytest.skip(f'enwik8: {error}')
    dataset = datasets.get('enwik8')
    at, whole, pages = 0, path.read_bytes(), 0
    for split, read in dataset.read(path.parent, [path]).items():
        start = at
        for example in read():
            page = example['text']
            assert whole.startswith(page, at)
            pages += page.startswith(b'  <page>\n') and page.endswith(b'  </page>\n')
            at += len(page)
        assert at - start == {'train': 90_000_000, 'validation': 5_000_000, 'test': 5_000_000}[split]
    assert at == len(whole) == 100_000_000
    assert pages > 12_000  # and nearly every document is one page


def test_enwik8_through_the_builder(config, wiki_dir):
    found = texts(config('enwik8', wiki_dir))
    size = len(wiki())
    assert b''.join(found['train'] + found['validation'] + found['test']) == wiki()
    assert [sum(map(len, found[split])) for split in ('train', 'validation', 'test')] == [
        size * 90 // 100, size * 95 // 100 - size * 90 // 100, size - size * 95 // 100]
    assert all(text.startswith(b'  <page>') for text in found['train'][1:])


def test_the_builder_is_one_of_tensorflow_datasets(wiki_dir, tmp_path):
    import tensorflow_datasets as tfds
    made = builders.of(datasets.get('enwik8'))
    assert issubclass(made, tfds.core.GeneratorBasedBuilder) and made.name == 'enwik8'
    builder = made(data_dir=str(tmp_path / 'tfds'), file_format='array_record')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(wiki_dir)))
    assert builder.data_dir.endswith('enwik8/1.0.0')
    assert wiki().startswith(b''.join(example['text'] for example in builder.as_data_source('train')))
    assert 'tensorflow' not in sys.modules


def test_files_of_the_standard_library_fall_to_one_split_each():
    folder, files = datasets.get('stdlib').folder(None)
    assert not any('site-packages' in path.parts for path in files)
    splits = {split: [example['id'] for example in read()]
              for split, read in datasets.get('stdlib').read(folder, files).items()}
    names = [name for part in splits.values() for name in part]
    assert len(names) == len(set(names)) > 500
    assert 0.02 < len(splits['validation']) / len(names) < 0.09
    assert {'heapq.py', 'difflib.py'} <= set(splits['test'])  # what `ppl:stdlib` measures


def test_books(config, tmp_path):
    books = {f'book{i}.txt': f'Book {i}. '.encode() * 20 for i in range(10)}
    (tmp_path / 'books').mkdir()
    for name, text in (books | {'carroll-alice.txt': b'Alice'}).items():
        (tmp_path / 'books' / name).write_bytes(text)
    found = texts(config('gutenberg', tmp_path / 'books'))
    assert sorted(sum(found.values(), [])) == sorted([*books.values(), b'Alice'])
    assert b'Alice' in found['test'] and len(found['validation']) == 1


PILE = [{'text': f'Text {i} ünd\n', 'meta': {'pile_set_name': 'Pile-CC' if i % 2 else 'ArXiv'}} for i in range(150)]


def test_the_pile(config, tmp_path):
    """Packed with zstd in several frames, with gzip, and plain, as its shards are."""
    folder = tmp_path / 'pile'
    write_jsonl(folder / 'train' / '01.jsonl', PILE[100:])
    for part in (PILE[:50], PILE[50:100]):
        with (folder / 'train' / '00.jsonl.zst').open('ab') as file, pyarrow.output_stream(file, 'zstd') as packed:
            packed.write(''.join(json.dumps(row) + '\n' for row in part).encode())
    (folder / 'val.jsonl.gz').write_bytes(gzip.compress(json.dumps(PILE[0]).encode()))
    write_jsonl(folder / 'test.jsonl', PILE[1:3])
    found = texts(config('pile', folder))
    assert found == {'train': [row['text'].encode() for row in PILE], 'validation': [PILE[0]['text'].encode()],
                     'test': [row['text'].encode() for row in PILE[1:3]]}
    first = next(builders.examples(Source.of(config('pile', folder)).prepared(), 'train'))
    assert first == {'id': b'train/00.jsonl.zst line 1', 'text': b'Text 0 \xc3\xbcnd\n', 'subset': b'ArXiv'}


def test_c4(config, tmp_path):
    rows = [{'text': f'Page {i}', 'timestamp': '2019-04-25T12:57:54Z', 'url': f'https://example.org/{i}'}
            for i in range(6)]
    folder = tmp_path / 'c4'
    folder.mkdir()
    for name, part in {'c4-train.00000-of-01024': rows[:3], 'c4-train.00001-of-01024': rows[3:5],
                       'c4-validation.00000-of-00008': rows[5:]}.items():
        (folder / f'{name}.json.gz').write_bytes(gzip.compress(b''.join(json.dumps(r).encode() + b'\n' for r in part)))
    assert texts(config('c4', folder)) == {'train': [row['text'].encode() for row in rows[:5]],
                                           'validation': [rows[5]['text'].encode()]}
    last = next(builders.examples(Source.of(config('c4', folder)).prepared(), 'validation'))
    assert (last['url'], last['timestamp']) == (b'https://example.org/5', b'2019-04-25T12:57:54Z')


def test_examples_beyond_one_file(config, tmp_path, monkeypatch):
    """Many small files of records, in the order of the text."""
    monkeypatch.setattr(builders, 'EXAMPLES_PER_FILE', 70)
    monkeypatch.setattr(builders, '_WRITE', 16)
    write_jsonl(tmp_path / 'pile' / '00.jsonl', PILE)
    folder = Source.of(config('pile', tmp_path / 'pile')).prepared()
    assert len(list(folder.glob('*train*'))) > 1
    assert [example['text'] for example in builders.examples(folder, 'train')] == [r['text'].encode() for r in PILE]


@pytest.mark.parametrize('ending,spoil,message', [
    ('', lambda data: data + b'{"text": \n', 'line 151: no JSON'),
    ('', lambda data: data + b'["text"]\n', 'line 151: not a JSON object'),
    ('', lambda data: data + b'{"txt": "a"}\n', 'line 151: no "text"'),
    ('.gz', lambda data: data[:-20], r'00.jsonl.gz: damaged after line \d+'),
    ('.zst', lambda data: data[:-20], r'00.jsonl.zst: damaged after line \d+'),
    ('.zst', lambda data: b'not zstd', r'00.jsonl.zst: damaged after line 0'),
])
def test_damaged_files_are_named(config, tmp_path, ending, spoil, message):
    data = ''.join(json.dumps(row) + '\n' for row in PILE).encode()
    if ending:
        data = gzip.compress(data) if ending == '.gz' else pyarrow.compress(data, 'zstd', asbytes=True)
    (tmp_path / 'pile').mkdir()
    path = tmp_path / 'pile' / f'00.jsonl{ending}'
    path.write_bytes(data)
    assert len(list(jsonl.rows(path))) == 150
    path.write_bytes(spoil(data))
    with pytest.raises(DataError, match=message):
        texts(config('pile', tmp_path / 'pile'))
    assert all(left.name.endswith('.lock') for left in (tmp_path / 'data' / 'prepared').iterdir())  # nothing half-made


def test_where_files_should_be(config, tmp_path):
    with pytest.raises(DataError, match='nowhere is not a directory; it should hold the file enwik8'):
        Source.of(config('enwik8', tmp_path / 'nowhere'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='empty is empty; it should hold books'):
        Source.of(config('gutenberg', tmp_path / 'empty'))
    (tmp_path / 'empty' / 'readme.md').write_text('no data here')
    with pytest.raises(DataError, match='empty should hold chats'):
        Source.of(config('chats', tmp_path / 'empty'))
    with pytest.raises(DataError, match='pile cannot be fetched: set data.manual_dir to a directory with the shards'):
        Source.of(config('pile'))
    with pytest.raises(ConfigError, match="data.dataset: unknown 'enwik9', one of enwik8, stdlib, "):
        Source.of(config('enwik9'))
    with pytest.raises(DataError, match='data_dir .*typo/data does not exist, and neither does'):
        Source.of(config('stdlib', data_dir=str(tmp_path / 'typo' / 'data')))


def test_a_hash_splits_alike_whatever_the_order():
    keys = [f'prompt {i}' for i in range(200)]
    chosen = dict(zip(keys, datasets.by_hash(keys), strict=True))
    assert [sum(v == split for v in chosen.values()) for split in (0, 1, 2)] == [180, 10, 10]
    again = datasets.by_hash(keys[::-1] + keys[:50])
    assert [chosen[key] for key in keys[::-1] + keys[:50]] == list(again)  # an equal key falls to the same split
    assert set(datasets.by_hash(['a', 'b'])) == {0}
