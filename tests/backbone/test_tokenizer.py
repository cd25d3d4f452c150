import json
import struct
from pathlib import Path

import pytest

from backbone import catalogue, tokenizer, vocabulary
from backbone.errors import FetchError, TokenizerError
from backbone.formats.gguf_header import read_header

GOLDEN = Path(__file__).parent.parent / 'golden'


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f'tokenizer_{name}.json').read_text())


def llama2c_file(pieces: list[tuple[bytes, float]]) -> bytes:
    return struct.pack('<i', 8) + b''.join(struct.pack('<fi', score, len(piece)) + piece for piece, score in pieces)


@pytest.fixture(scope='module')
def smollm2():
    try:
        path = catalogue.fetch('smollm2-135m')
    except FetchError as error:
        pytest.skip(f'smollm2-135m: {error}')
    return tokenizer.from_gguf_metadata(read_header(path).metadata)


@pytest.fixture(scope='module')
def tiny():
    """Byte-level BPE over all 256 bytes, a few merges, two control tokens."""
    alphabet = sorted(vocabulary._alphabet(), key=vocabulary._alphabet().get)
    tokens = ['<s>', '<e>', *alphabet, 'ab', 'abc', '\u0120a']
    return tokenizer.from_gguf_metadata({
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.merges': ['a b', 'ab c', '\u0120 a'],
        'tokenizer.ggml.token_type': [vocabulary.CONTROL] * 2 + [vocabulary.NORMAL] * (len(tokens) - 2),
        'tokenizer.ggml.bos_token_id': 0, 'tokenizer.ggml.eos_token_id': 1})


@pytest.fixture(scope='module')
def pieces():
    """A SentencePiece vocabulary in which the raw bytes come first and share spellings with later pieces."""
    words = [b' ', b'a', b'b', b'c', b'\xc3\xa9', b' a', b'bc', b' ab', b' abc', b'ab']
    return ([(b'<unk>', 0.0), (b'\n<s>\n', 0.0), (b'\n</s>\n', 0.0)] + [(chr(i).encode(), 0.0) for i in range(256)]
            + [(word, -float(i)) for i, word in enumerate(words)])


def test_smollm2_ids_are_those_of_transformers(smollm2):
    data = golden('smollm2')
    assert len(data['cases']) > 80
    for text, ids in data['cases']:
        assert smollm2.encode(text) == ids, text
    assert smollm2.chat([{'role': 'user', 'content': 'What is 2+2?'}]) == data['chat']
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, (2,))


def test_smollm2_default_system_prompt(smollm2):
    text = smollm2.render([{'role': 'user', 'content': 'hi'}])
    assert text.startswith('<|im_start|>system\nYou are a helpful AI assistant named SmolLM')
    assert text.endswith('<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n')
    own = smollm2.render([{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'hi'}])
    assert own.startswith('<|im_start|>system\nBe brief.<|im_end|>')


def test_smollm2_round_trips(smollm2, tmp_path):
    texts = [text for text, _ in golden('smollm2')['cases']]
    assert [smollm2.decode(smollm2.encode(text)) for text in texts] == texts
    smollm2.save(tmp_path)
    again = tokenizer.from_hf_directory(tmp_path)
    assert [again.encode(text) for text in texts] == [smollm2.encode(text) for text in texts]
    assert (again.bos_id, again.eos_ids, again.add_bos) == (1, (2,), False)
    assert again.chat([{'role': 'user', 'content': 'hi'}]) == smollm2.chat([{'role': 'user', 'content': 'hi'}])
    back = tokenizer.from_gguf_metadata(again.gguf_metadata())
    assert [back.encode(text) for text in texts] == [smollm2.encode(text) for text in texts]
    assert again.gguf_metadata()['tokenizer.ggml.pre'] == 'smollm'


def test_saved_files_load_in_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers (extra [oracle]) is not installed')
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in golden('smollm2')['cases']:
        assert theirs.encode(text) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert theirs.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False, add_generation_prompt=True
                                      ) == smollm2.render([{'role': 'user', 'content': 'hi'}])


@pytest.mark.parametrize('name,pre', [('qwen2', 'qwen2'), ('gpt2', 'gpt-2')])
def test_pre_tokenisers_agree_with_transformers(name, pre):
    data = golden(name)
    types = [vocabulary.CONTROL] + [vocabulary.NORMAL] * (len(data['tokens']) - 1)
    ours = tokenizer.from_gguf_metadata({
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre, 'tokenizer.ggml.tokens': data['tokens'],
        'tokenizer.ggml.merges': data['merges'], 'tokenizer.ggml.token_type': types})
    for text, ids in data['cases']:
        assert ours.encode(text) == ids, text
    # The comparison must be able to fail: another pre-tokeniser gives other ids.
    other = tokenizer.from_gguf_metadata({
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'qwen2' if pre == 'gpt-2' else 'gpt-2',
        'tokenizer.ggml.tokens': data['tokens'], 'tokenizer.ggml.merges': data['merges'],
        'tokenizer.ggml.token_type': types})
    assert any(other.encode(text) != ids for text, ids in data['cases'])


def test_decoding_keeps_bytes(tiny):
    ids = [2 + byte for byte in b'a\xff\xfe\xe6\x97']
    assert tiny.decode_bytes(ids) == b'a\xff\xfe\xe6\x97'
    assert tiny.decode(ids) == 'a\ufffd\ufffd\ufffd'
    assert tiny.decode([0, *tiny.encode('abc'), 1]) == '<s>abc<e>'
    assert tiny.decode([0, *tiny.encode('abc'), 1], skip_special=True) == 'abc'


def test_stream_never_splits_a_character(tiny):
    text = 'aé日🙂z'
    ids = tiny.encode(text)
    assert len(ids) == len(text.encode())
    stream = tokenizer.Stream(tiny)
    parts = [stream.push(i) for i in ids]
    assert [part for part in parts if part] == list(text)
    assert stream.flush() == ''
    stream.push(2 + 0xE6)
    assert stream.flush() == '\ufffd'


def test_stream_goes_on_after_invalid_bytes(tiny):
    stream = tokenizer.Stream(tiny)
    assert ''.join(stream.push(2 + byte) for byte in b'\xe6\xffok\x80!') + stream.flush() == '\ufffd\ufffdok\ufffd!'


def test_lone_surrogate_is_refused(tiny):
    with pytest.raises(TokenizerError, match='not valid Unicode at character 2'):
        tiny.encode(b'ab\xff'.decode('utf-8', errors='surrogateescape'))


def test_ids_outside_the_vocabulary(tiny):
    for bad in (-1, tiny.vocab_size):
        with pytest.raises(TokenizerError, match=f'token id {bad} is outside the vocabulary of {tiny.vocab_size}'):
            tiny.decode([bad])


def test_tokenizer_of_another_model(tiny):
    tiny.check_model(tiny.vocab_size)
    tiny.check_model(tiny.vocab_size + 271)  # Qwen2.5 pads by that much
    for rows in (tiny.vocab_size - 1, 49152):
        with pytest.raises(TokenizerError, match=f'{tiny.vocab_size} tokens and the model {rows}'):
            tiny.check_model(rows)


def test_no_chat_template(tiny):
    with pytest.raises(TokenizerError, match='no chat template'):
        tiny.chat([{'role': 'user', 'content': 'hi'}])


def test_chat_template_runs_in_a_sandbox(tiny):
    import dataclasses
    evil = dataclasses.replace(tiny, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TokenizerError, match='refuses'):
        evil.render([])
    picky = dataclasses.replace(tiny, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match='roles must alternate'):
        picky.render([])


def reference_llama2c(pieces, text):
    """The encoder of llama2.c's run.c, word for word: characters, then the best-scoring neighbouring pair."""
    ids = {}
    for i in range(259, len(pieces)):
        ids[pieces[i][0].decode()] = i
    tokens = [ids[' ']] if text else []
    for char in text:
        tokens += [ids[char]] if char in ids else [byte + 3 for byte in char.encode()]
    while True:
        best = None
        for k in range(len(tokens) - 1):
            union = (pieces[tokens[k]][0] + pieces[tokens[k + 1]][0]).decode()
            raw = tokens[k] < 259 or tokens[k + 1] < 259
            if not raw and union in ids and (best is None or pieces[ids[union]][1] > best[0]):
                best = pieces[ids[union]][1], k, ids[union]
        if best is None:
            return [1, *tokens]
        tokens[best[1]:best[1] + 2] = [best[2]]


def test_llama2c_raw_bytes_do_not_hide_pieces(pieces):
    ours = tokenizer.from_llama2c(llama2c_file(pieces))
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.add_bos) == (len(pieces), 1, (2,), True)
    for text in ('a', 'abc', 'ab c abcab', 'aéz', '  a', 'Z\n', ''):
        assert ours.encode(text) == reference_llama2c(pieces, text), text
        assert ours.decode(ours.encode(text), skip_special=True) == text
    # 'a' is piece 260, not the raw byte 3 + 97.
    assert ours.encode('ba')[-1] == 260
    assert ours.encode('Z')[-1] == 3 + ord('Z')


def test_llama2c_to_hf_and_gguf(pieces, tmp_path):
    ours = tokenizer.from_llama2c(llama2c_file(pieces))
    ours.save(tmp_path)
    for again in (tokenizer.from_hf_directory(tmp_path), tokenizer.from_gguf_metadata(ours.gguf_metadata())):
        assert again.encode('ab c abcab Zé') == ours.encode('ab c abcab Zé')
        assert (again.bos_id, again.eos_ids, again.add_bos) == (1, (2,), True)


def test_stories_tokenizer_equals_llama2c():
    try:
        folder = catalogue.fetch('stories-15m')
    except FetchError as error:
        pytest.skip(f'stories-15m: {error}')
    data = (folder / 'tokenizer.bin').read_bytes()
    pieces, offset = [], 4
    while offset < len(data):
        score, length = struct.unpack_from('<fi', data, offset)
        pieces.append((data[offset + 8:offset + 8 + length], score))
        offset += 8 + length
    ours = tokenizer.from_llama2c(data)
    for text in ('Once upon a time, there was a little girl named Lily.', 'He said: "No!"\nThen\n\nhe   left 12 times',
                 'naïve 日本 🙂 \t x'):
        assert ours.encode(text) == reference_llama2c(pieces, text), text


@pytest.mark.parametrize('cut', [1, 6, 9])
def test_truncated_llama2c(pieces, cut):
    with pytest.raises(TokenizerError, match='tokenizer.bin'):
        tokenizer.from_llama2c(llama2c_file(pieces)[:-cut])


def test_llama2c_too_short():
    with pytest.raises(TokenizerError, match='holds 1 pieces'):
        tokenizer.from_llama2c(llama2c_file([(b'a', 0.0)]))


@pytest.mark.parametrize('change,message', [
    ({'tokenizer.ggml.model': 'rwkv'}, "'rwkv' is not read here"),
    ({'tokenizer.ggml.pre': 'tekken'}, "'tekken' is not known"),
    ({'tokenizer.ggml.token_type': [1]}, '5 tokens and 1 token types'),
    ({'tokenizer.ggml.eos_token_id': 5}, 'eos_token_id 5 is outside'),
    ({'tokenizer.ggml.merges': ['a q']}, 'merges do not fit'),
    ({'tokenizer.ggml.merges': ['a']}, 'merges do not fit'),
    ({'tokenizer.ggml.tokens': ['a', 'b', 'a', 'c', 'd']}, "'a' twice"),
])
def test_damaged_gguf_metadata(change, message):
    good = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.merges': ['a b'],
            'tokenizer.ggml.tokens': ['a', 'b', 'ab', 'c', 'd'], 'tokenizer.ggml.token_type': [1] * 5}
    tokenizer.from_gguf_metadata(good)
    with pytest.raises(TokenizerError, match=message):
        tokenizer.from_gguf_metadata(good | change)


def test_missing_gguf_key():
    with pytest.raises(TokenizerError, match='lack tokenizer.ggml.tokens'):
        tokenizer.from_gguf_metadata({'tokenizer.ggml.model': 'gpt2'})


def test_gpt2_pair_of_files_as_opt_has_them(tmp_path):
    data = golden('gpt2')
    (tmp_path / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(data['tokens'])}))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(data['merges']) + '\n')
    special = {'content': '<|endoftext|>', '__type': 'AddedToken'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
        {'bos_token': special, 'eos_token': special, 'add_bos_token': True}))
    ours = tokenizer.from_hf_directory(tmp_path)
    assert ours.add_bos and ours.eos_ids == (0,)
    for text, ids in data['cases']:
        assert ours.encode(text, add_special=False) == ids, text
        assert ours.encode(text) == [0, *ids]


@pytest.mark.parametrize('name,text', [('tokenizer.json', '{"model": '), ('tokenizer_config.json', '{')])
def test_damaged_hf_files(tiny, tmp_path, name, text):
    tiny.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=f'{name} is damaged'):
        tokenizer.from_hf_directory(tmp_path)


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match='neither tokenizer.json nor vocab.json'):
        tokenizer.from_hf_directory(tmp_path)


def test_several_eos_ids_survive(tiny, tmp_path):
    tiny.save(tmp_path)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    del config['eos_token_ids']
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [1, 0]}')
    (tmp_path / 'chat_template.jinja').write_text('{{ messages[0].content }}')
    again = tokenizer.from_hf_directory(tmp_path)
    assert again.eos_ids == (1, 0)
    assert again.chat([{'role': 'user', 'content': 'ab'}]) == tiny.encode('ab')
