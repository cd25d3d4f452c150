"""The tokenizers a config can name."""

import os
import subprocess
import sys

import numpy as np
import pytest

from backbone import tokenizer as tokenizer_lib
from backbone.errors import ConfigError, DataError, FormatError
from harness import data
from harness.data import vocabularies
from tests.harness.data.conftest import ROOT

RAW = bytes(range(256)) + 'grün <|endoftext|>日本'.encode() + b'\xff\xfe\x80'


def test_bytes_are_their_own_ids(tmp_path):
    made = data.make_tokenizer({'tokenizer': 'bytes'})
    assert (made.vocab_size, made.eos_ids, made.bos_id) == (257, (256,), None)
    assert made.encode_bytes(RAW).tolist() == list(RAW)  # also what spells the end of text
    assert made.decode_bytes(made.encode_bytes(RAW)) == RAW
    assert made.encode('grün') == list('grün'.encode()) and made.decode(made.encode('grün')) == 'grün'
    made.save(tmp_path)
    again = tokenizer_lib.from_hf_directory(tmp_path)
    assert again.encode_bytes(RAW).tolist() == list(RAW) and again.eos_ids == (256,)
    back = tokenizer_lib.from_gguf_metadata(made.gguf_metadata())
    assert back.encode('a€') == made.encode('a€') and back.eos_ids == (256,)


def test_only_a_vocabulary_of_bytes_takes_the_short_way(smollm2):
    assert smollm2.byte_ids is None
    assert smollm2.encode_bytes(b'An apple.').tolist() == smollm2.encode('An apple.')
    merging = tokenizer_lib.from_merges([*vocabularies.byte_ids_first(), 'th'], ['t h'])
    assert merging.byte_ids is None and merging.encode('th') == [257]


@pytest.fixture
def books(tmp_path):
    (tmp_path / 'books').mkdir()
    for i in range(6):
        text = f'the man and the other man went there {i}\n' * 30 + 'grün über\n' * 5
        (tmp_path / 'books' / f'{i}.txt').write_text(text, encoding='utf-8')
    return tmp_path / 'books'


def test_byte_pairs_are_trained_once_and_alike(config, books, capfd):
    part = config('gutenberg', books, tokenizer='bpe:280')
    made = data.make_tokenizer(part)
    assert (made.vocab_size, made.eos_ids) == (280, (256,))
    assert made.decode_bytes(made.encode('the grün \U0001f642')) == 'the grün \U0001f642'.encode()
    assert len(made.encode('the man')) < 5 and made.encode('\x00a') == [0, 97]  # merged; bytes are ids 0..255
    assert 'training a vocabulary' in capfd.readouterr().err
    assert data.make_tokenizer(part).backend.to_str() == made.backend.to_str()
    assert capfd.readouterr().err == ''  # from the cache
    fresh = data.make_tokenizer(part | {'data_dir': str(books.parent / 'other')})
    assert fresh.backend.to_str() == made.backend.to_str()
    rows = data.open_rows(part, 'train', made)
    assert rows.info['tokens'] < 0.6 * data.open_rows(part, 'train', tokenizer_lib.of_bytes()).info['tokens']


def test_training_does_not_depend_on_threads(books):
    """The same ids with one thread as with as many as this process has."""
    code = ('import sys, glob; from harness.data.vocabularies import train_bpe;'
            'print(train_bpe((open(p, "rb").read() for p in sorted(glob.glob(sys.argv[1]))), 285).backend.to_str())')
    alone = subprocess.run([sys.executable, '-c', code, str(books / '*.txt')], capture_output=True, text=True,
                           env=os.environ | {'RAYON_NUM_THREADS': '1'}, check=True, cwd=ROOT)
    here = vocabularies.train_bpe((path.read_bytes() for path in sorted(books.glob('*.txt'))), 285)
    assert alone.stdout.strip() == here.backend.to_str()


def test_a_vocabulary_out_of_reach(config, books):
    for bad in ('bpe:100', 'bpe:', 'bpe:many'):
        with pytest.raises(ConfigError, match='should be bpe:N with N of at least 258'):
            data.make_tokenizer(config('gutenberg', books, tokenizer=bad))
    with pytest.raises(DataError, match='fewer than bpe:5000'):
        data.make_tokenizer(config('gutenberg', books, tokenizer='bpe:5000'))
    with pytest.raises(FormatError, match='no such file or directory, and not a model of the catalogue'):
        data.make_tokenizer(config('gutenberg', books, tokenizer='nothing'))


def test_a_model_names_its_tokenizer(smollm2, tmp_path):
    assert data.make_tokenizer({'tokenizer': 'smollm2-135m'}).encode('hello') == smollm2.encode('hello')
    smollm2.save(tmp_path / 'run' / 'tokenizer')  # as in the directory of a training run
    for path in (tmp_path / 'run', tmp_path / 'run' / 'tokenizer'):
        assert data.make_tokenizer({'tokenizer': str(path)}).encode('hello') == smollm2.encode('hello')


def test_the_bytes_of_targets(smollm2):
    """What bits per byte divide by: a text's tokens stand for all of it, marks for nothing."""
    sizes = data.target_bytes(smollm2)
    text = 'Ein grünes Haus, 日本.'
    assert sizes.shape == (smollm2.vocab_size,) and sizes[smollm2.encode(text)].sum() == len(text.encode())
    assert sizes[smollm2.encode('<|im_end|>')].sum() == 0
    assert np.array_equal(data.target_bytes(tokenizer_lib.of_bytes()), [1] * 256 + [0])


def test_running_text_spells_no_special_token(config, tmp_path, smollm2):
    """A book about chat templates ends where it ends."""
    (tmp_path / 'books').mkdir()
    (tmp_path / 'books' / 'one.txt').write_text('They write <|im_end|> there.')
    row = data.open_rows(config('gutenberg', tmp_path / 'books', seq_len=32), 'train', smollm2)[0]
    ids = [*row['tokens'][:1], *row['targets'][row['weights'] > 0]]
    assert [i for i in ids if i in smollm2.special_ids] == [2] and ids[-1] == 2
    assert smollm2.decode(ids) == 'They write <|im_end|> there.<|im_end|>'
    assert smollm2.encode('They write <|im_end|> there.').count(2) == 1  # which is how a template is read
