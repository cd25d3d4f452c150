"""Whose words a loss is taken of."""

import json

import numpy as np
import pytest

from backbone import tokenizer as tokenizer_lib
from backbone import vocabulary
from backbone.errors import ConfigError, DataError
from harness import data
from harness.data import builders, conversations, datasets
from harness.data.rows import Source
from tests.harness.data.conftest import write_jsonl

CHATS = [{'messages': [{'role': 'user', 'content': f'What is {i} + {i}?'},
                       {'role': 'assistant', 'content': f'It is {2 * i}.'},
                       {'role': 'user', 'content': 'Sure?'},
                       {'role': 'assistant', 'content': 'Quite <|im_end|> sure.' if i == 1 else 'Yes!'}]}
         for i in range(40)]


def weighed(rows, tokenizer) -> bytes:
    """The targets that count, as text, row after row."""
    return b''.join(tokenizer.decode_bytes(row['targets'][row['weights'] > 0]) for row in map(rows.__getitem__,
                                                                                            range(len(rows))))


@pytest.fixture
def chats(tmp_path):
    write_jsonl(tmp_path / 'chats' / 'train.jsonl', CHATS[2:])
    return tmp_path / 'chats'


def test_only_answers_count_with_a_chat_template(config, chats, smollm2):
    part = config('chats', chats, seq_len=32)
    answers = data.open_rows(part, 'train', smollm2)
    expected = ''.join(f'{message["content"]}<|im_end|>' for chat in CHATS[2:] for message in chat['messages']
                       if message['role'] == 'assistant').encode()
    assert weighed(answers, smollm2) == expected
    # Negative control: with the loss on everything the prompts count too, over the same tokens.
    everything = data.open_rows(part | {'loss_on': 'all'}, 'train', smollm2)
    assert weighed(everything, smollm2) != expected
    assert b'What is 5 + 5?' in weighed(everything, smollm2) and b'What is' not in weighed(answers, smollm2)
    assert all((everything[i]['tokens'] == answers[i]['tokens']).all() for i in range(len(answers)))
    assert everything.fingerprint != answers.fingerprint


def test_the_tokens_of_a_chat_are_those_of_its_template(chats, smollm2):
    """Encoded in pieces, but the ids of the whole, and of the prompt a model is given."""
    messages = CHATS[5]['messages']
    example = conversations._chat({'messages': messages}, 'here')
    pieces = conversations.chat_pieces(example, smollm2)
    ids = [smollm2.encode(piece.content.decode(), add_special=False) for piece in pieces]
    assert sum(ids, []) == smollm2.chat(messages, add_generation_prompt=False)
    assert ids[0] == smollm2.chat(messages[:1])
    assert [piece.answer for piece in pieces] == [False, True, False, True]


def test_only_answers_count_without_a_chat_template(config, chats):
    tokenizer = tokenizer_lib.of_bytes()
    rows = data.open_rows(config('chats', chats, seq_len=64), 'train', tokenizer)
    expected = b''.join(message['content'].encode() + b'\n\n' + b'<|endoftext|>' * last
                        for chat in CHATS[2:] for last, message in ((0, chat['messages'][1]), (1, chat['messages'][3])))
    assert weighed(rows, tokenizer) == expected


def test_mixed_files_are_split_by_prompt(config, tmp_path):
    write_jsonl(tmp_path / 'mixed' / 'all.jsonl', CHATS + CHATS[:20])
    folder = Source.of(config('chats', tmp_path / 'mixed')).prepared()
    prompts = {split: {example['contents'][0] for example in builders.examples(folder, split)}
               for split in builders.splits(folder)}
    assert [len(prompts[split]) for split in ('train', 'validation', 'test')] == [36, 2, 2]
    assert not prompts['train'] & (prompts['validation'] | prompts['test'])


@pytest.mark.parametrize('row,message', [
    ({'messages': []}, 'row 1: no "messages"'),
    ({'messages': [{'role': 'user'}]}, 'row 1: a message must have "role" and "content"'),
    ({'text': 'a'}, 'row 1: no "messages"'),
])
def test_bad_chats_are_named(config, tmp_path, row, message):
    write_jsonl(tmp_path / 'chats' / 'train.jsonl', [row])
    with pytest.raises(DataError, match=message):
        Source.of(config('chats', tmp_path / 'chats')).prepared()


def test_a_template_that_refuses_is_named(smollm2):
    import dataclasses
    strict = dataclasses.replace(smollm2, chat_template='{{ raise_exception("no system here") }}')
    with pytest.raises(DataError, match='row 7: .*no system here'):
        conversations.chat_pieces(conversations._chat(CHATS[0], 'row 7'), strict)
    fickle = dataclasses.replace(smollm2, chat_template='{{ messages | length }}{{ messages[-1].content }}')
    with pytest.raises(DataError, match='row 7: the chat template changes what came before'):
        conversations.chat_pieces(conversations._chat(CHATS[0], 'row 7'), fickle)


def test_gsm8k(config, tmp_path):
    rows = [{'question': f'What is {i}?', 'answer': f'{i}\n#### {i}'} for i in range(3)]
    write_jsonl(tmp_path / 'gsm8k' / 'train.jsonl', rows)
    write_jsonl(tmp_path / 'gsm8k' / 'test.jsonl', rows[:1])
    tokenizer = tokenizer_lib.of_bytes()
    part = config('gsm8k', tmp_path / 'gsm8k', seq_len=64)
    assert weighed(data.open_rows(part, 'train', tokenizer), tokenizer) == b''.join(
        f' {row["answer"]}<|endoftext|>'.encode() for row in rows)
    everything = data.open_rows(part | {'loss_on': 'all'}, 'test', tokenizer)
    assert weighed(everything, tokenizer) == b'uestion: What is 0?\nAnswer: 0\n#### 0<|endoftext|>'
    with pytest.raises(DataError, match="gsm8k has no split 'validation', it has train, test"):
        data.open_rows(part, 'validation', tokenizer)
    with pytest.raises(ConfigError, match="data.loss_on: 'some' is not one of all, answer"):
        data.open_rows(part | {'loss_on': 'some'}, 'test', tokenizer)


def written(tokenizer, count=30) -> list[dict]:
    rows = []
    for i in range(count):
        prompt, text = f'Count to {i}:', f' one, two, {i}.'
        # Not the ids that encoding the text again would give: what was sampled is what is trained on.
        split = [*tokenizer.encode(text[:3]), *tokenizer.encode(text[3:]), tokenizer.eos_ids[0]]
        rows.append({'prompt': prompt, 'text': text, 'tokens': split, 'prompt_tokens': tokenizer.encode(prompt)})
    return rows


def test_selfgen_keeps_the_ids_that_were_sampled(config, tmp_path, smollm2):
    rows = written(smollm2)
    write_jsonl(tmp_path / 'own' / 'train.jsonl', rows)
    found = data.open_rows(config('selfgen', tmp_path / 'own', seq_len=24), 'train', smollm2)
    ids = np.concatenate([row['targets'][row['weights'] > 0] for row in map(found.__getitem__, range(len(found)))])
    assert ids.tolist() == sum((row['tokens'] for row in rows), [])
    assert smollm2.encode(rows[0]['text']) + [2] != rows[0]['tokens']  # the ids do differ from the text's own


def test_selfgen_of_another_vocabulary_is_read_as_text(config, tmp_path, smollm2):
    """One with larger ids, and one whose ids would all be good, only of other bytes."""
    tokenizer = tokenizer_lib.of_bytes()
    backwards = tokenizer_lib.from_merges([*vocabulary.byte_tokens()[::-1], tokenizer_lib.END_OF_TEXT], [])
    for i, writer in enumerate((smollm2, backwards)):
        rows = written(writer)
        write_jsonl(tmp_path / f'own{i}' / 'train.jsonl', rows)
        found = data.open_rows(config('selfgen', tmp_path / f'own{i}', seq_len=24), 'train', tokenizer)
        assert weighed(found, tokenizer) == b''.join(row['text'].encode() + b'<|endoftext|>' for row in rows)


def test_an_answer_that_was_cut_does_not_teach_to_stop(config, tmp_path, smollm2):
    rows = written(smollm2, 6)
    for row in rows[:3]:
        row |= {'tokens': row['tokens'][:-1], 'finished': False}
    write_jsonl(tmp_path / 'own' / 'train.jsonl', rows)
    for tokenizer, end in ((smollm2, b'<|im_end|>'), (tokenizer_lib.of_bytes(), b'<|endoftext|>')):
        found = data.open_rows(config('selfgen', tmp_path / 'own', seq_len=24), 'train', tokenizer)
        assert weighed(found, tokenizer) == b''.join(row['text'].encode() + end * row.get('finished', True)
                                                     for row in rows)


def test_selfgen_from_a_tensorflow_datasets_directory(config, tmp_path, smollm2):
    """As `headway-generate --format=tfds` writes one: only `train`, so held-out rows are split off."""
    from harness import selfgen
    rows = [row | {'index': i, 'sample': 0, 'finished': True} for i, row in enumerate(written(smollm2))]
    selfgen.write_tfds(tmp_path / 'answers', rows, {'model': {'name': 'smollm2-135m'}})
    part = config('selfgen', tmp_path / 'answers', seq_len=24)
    parts = {split: data.open_rows(part, split, smollm2) for split in ('train', 'validation', 'test')}
    assert [rows.info['documents'] for rows in parts.values()] == [26, 2, 2]
    ids = np.concatenate([row['targets'][row['weights'] > 0] for rows in parts.values()
                          for row in map(rows.__getitem__, range(len(rows)))])
    assert sorted(ids.tolist()) == sorted(sum((row['tokens'] for row in rows), []))


def test_bad_ids_are_named(config, tmp_path):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'train.jsonl').write_text(json.dumps(
        {'prompt': 'a', 'text': 'b', 'tokens': [1, -5]}) + '\n')
    with pytest.raises(DataError, match='train.jsonl row 1: "tokens" must be a list of token ids'):
        Source.of(config('selfgen', tmp_path / 'own')).prepared()


OUT_OF_RANGE = datasets.Dataset(
    'broken', '1.0.0', ('train',), {'id': 'text', 'text': 'text'}, 'anything', lambda folder: sorted(folder.glob('*')),
    lambda folder, files: {'train': lambda: iter([{'id': 'doc 1', 'text': b'x'}])},
    lambda example, tokenizer: [datasets.Piece(np.array([5, 300]))])


def test_an_id_beyond_the_vocabulary_is_named(config, chats):
    """A dataset of one's own by dotted path, which gives ids of another vocabulary."""
    part = config('tests.harness.data.test_conversations.OUT_OF_RANGE', chats)
    with pytest.raises(DataError, match='doc 1: token id 300 is outside the vocabulary of 257'):
        data.open_rows(part, 'train', tokenizer_lib.of_bytes())
