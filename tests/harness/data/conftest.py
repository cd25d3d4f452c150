"""Small datasets of the real formats, in a folder of the test's own."""

import json
from pathlib import Path

import pytest

from backbone import catalogue, tokenizer
from backbone.errors import FetchError
from backbone.formats.gguf_header import read_header

ROOT = Path(__file__).parents[3]  # where other processes start


@pytest.fixture
def config(tmp_path):
    """Makes the `data` part of a config, with a data_dir of the test's own."""
    def make(dataset, manual_dir=None, **changes):
        return {'dataset': dataset, 'tokenizer': 'bytes', 'seq_len': 16, 'data_dir': str(tmp_path / 'data'),
                'manual_dir': '' if manual_dir is None else str(manual_dir)} | changes
    return make


def wiki(pages: int = 40) -> bytes:
    """A small enwik8: a head, then pages, with letters of several bytes so that a split may cut one."""
    body = ''.join(f'  <page>\n    <title>Page {i}</title>\n    <text>{"ä日 " * (i % 7)}{i ** 3} words</text>\n'
                   '  </page>\n' for i in range(pages))
    return f'<mediawiki>\n{body}</mediawiki>\n'.encode()


@pytest.fixture
def wiki_dir(tmp_path):
    folder = tmp_path / 'wiki'
    folder.mkdir()
    (folder / 'enwik8').write_bytes(wiki())
    return folder


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='session')
def smollm2():
    try:
        path = catalogue.fetch('smollm2-135m')
    except FetchError as error:
        pytest.skip(f'smollm2-135m: {error}')
    return tokenizer.from_gguf_metadata(read_header(path).metadata)
