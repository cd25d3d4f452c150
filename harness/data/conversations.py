"""Datasets in which somebody answers: chats, GSM8K, and text that a model wrote itself.

What is an answer is known piece by piece, so that `data.loss_on='answer'` can weigh those tokens alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbone.errors import DataError, TokenizerError
from harness.data import jsonl
from harness.data.datasets import Dataset, Example, Piece, Splits, by_hash

_THREE = ('train', 'validation', 'test')
TFDS_FILE = 'dataset_info.json'


# Chats ----------------------------------------------------------------------------------------------------------------

def _chat(row: Mapping[str, Any], place: str) -> Example:
    messages = row.get('messages')
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{place}: no "messages"')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ('role', 'content')):
            raise DataError(f'{place}: a message must have "role" and "content", both text')
    return {'id': place, 'roles': [jsonl.to_bytes(m['role']) for m in messages],
            'contents': [jsonl.to_bytes(m['content']) for m in messages]}


def chat_pieces(example: Example, tokenizer) -> list[Piece]:
    """Prompts and answers by turns; what an assistant says is an answer, with whatever mark ends it.

    Rendered by the tokenizer's chat template. Where it has none, a message is 'role:\\n' and its content and an empty
    line. Errors: DataError for messages that the template refuses, or that it renders differently as more follow.
    """
    messages = [{'role': role.decode(), 'content': content.decode()}
                for role, content in zip(example['roles'], example['contents'], strict=True)]
    place = example['id'].decode() if isinstance(example['id'], bytes) else example['id']
    if tokenizer.chat_template is None:
        return [piece for message in messages for piece in (
            Piece(f'{message["role"]}:\n'.encode()),
            Piece(f'{message["content"]}\n\n'.encode(), message['role'] == 'assistant'))]
    pieces, done = [], ''

    def add(upto: str, answer: bool) -> None:
        nonlocal done
        if not upto.startswith(done):
            raise DataError(f'{place}: the chat template changes what came before when a message is added')
        if upto != done:
            pieces.append(Piece(upto[len(done):].encode(), answer, markup=True))
            done = upto

    try:
        for i, message in enumerate(messages):
            if message['role'] == 'assistant':
                add(tokenizer.render(messages[:i], add_generation_prompt=True) if i else '', False)
                add(tokenizer.render(messages[:i + 1], add_generation_prompt=False), True)
        add(tokenizer.render(messages, add_generation_prompt=False), False)
    except TokenizerError as error:
        raise DataError(f'{place}: {error}') from error
    return pieces


# GSM8K ----------------------------------------------------------------------------------------------------------------

def _problem(row: Mapping[str, Any], place: str) -> Example:
    if not all(isinstance(row.get(key), str) for key in ('question', 'answer')):
        raise DataError(f'{place}: no "question" and "answer"')
    return {'id': place, 'question': jsonl.to_bytes(row['question']), 'answer': jsonl.to_bytes(row['answer'])}


def problem_pieces(example: Example, tokenizer) -> list[Piece]:
    return [Piece(b'Question: ' + example['question'] + b'\nAnswer:'), Piece(b' ' + example['answer'], True)]


def _read_gsm8k(folder: Path, files: Sequence[Path]) -> Splits:
    def examples(path: Path) -> Iterator[Example]:
        for number, row in jsonl.rows(path):
            yield _problem(row, f'{path.name} line {number}')
    return {path.stem: lambda path=path: examples(path) for path in files}


# What a model wrote ---------------------------------------------------------------------------------------------------

def _written(row: Mapping[str, Any], place: str) -> Example:
    if not all(isinstance(row.get(key), str) for key in ('prompt', 'text')):
        raise DataError(f'{place}: no "prompt" and "text"')
    ids = {}
    for key in ('tokens', 'prompt_tokens'):
        value = row.get(key, [])
        if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < 2 ** 31 for i in value):
            raise DataError(f'{place}: "{key}" must be a list of token ids')
        ids[key] = np.array(value, np.int32)
    return {'id': place, 'prompt': jsonl.to_bytes(row['prompt']), 'text': jsonl.to_bytes(row['text']),
            'finished': bool(row.get('finished', True))} | ids


def written_pieces(example: Example, tokenizer) -> list[Piece]:
    """Prompt and answer, as the very ids that were sampled where they are this tokenizer's, else as text.

    They are this tokenizer's if they decode to the text. An answer that was cut short does not teach to stop there.
    """
    tokens, prompt = example['tokens'], example['prompt_tokens']
    if _decode_to(example['text'], tokens, tokenizer) and prompt.max(initial=0) < tokenizer.vocab_size:
        pieces = [Piece(prompt) if prompt.size else Piece(example['prompt']), Piece(tokens, True)]
    else:
        pieces = [Piece(example['prompt']), Piece(example['text'], True)]
    return pieces if example['finished'] else [*pieces, Piece(b'')]  # the end belongs to what comes last


def _decode_to(text: bytes, tokens: np.ndarray, tokenizer) -> bool:
    """With special tokens spelled out or not, and with or without the space some vocabularies begin a text with."""
    if not tokens.size or tokens.max() >= tokenizer.vocab_size:
        return False
    found = [tokenizer.decode_bytes(tokens, skip_special=skip).decode('utf-8', errors='replace') for skip in (0, 1)]
    return text.removeprefix(b' ') in [jsonl.to_bytes(one).removeprefix(b' ') for one in found]


def _tfds_rows(folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A split of a prepared `tensorflow-datasets` directory, as `headway-generate --format=tfds` writes it."""
    from harness.data import builders
    for number, example in enumerate(builders.examples(folder, split), 1):
        yield number, {k: v.decode('utf-8', errors='replace') if isinstance(v, bytes) else v.tolist()
                       for k, v in example.items() if isinstance(v, bytes | np.ndarray | np.generic)}


# Reading --------------------------------------------------------------------------------------------------------------

def _find(folder: Path) -> list[Path]:
    """*.jsonl, and what belongs to a prepared `tensorflow-datasets` directory."""
    prepared = [path for info in sorted(folder.rglob(TFDS_FILE))
                for path in [info, *sorted(info.parent.glob('*.array_record*'))]]
    return [*jsonl.find(folder, '*.jsonl'), *prepared]


def _read(parse: Callable[[Mapping[str, Any], str], Example], key: Callable[[Example], bytes]
          ) -> Callable[[Path, Sequence[Path]], Splits]:
    """Files named after a split are that split; the rows of all others are split by a hash of `key`."""
    def read(folder: Path, files: Sequence[Path]) -> Splits:
        parts = [part for path in files for part in _parts(path)]

        def parsed(only: str) -> Iterator[Example]:
            for path, split, rows in parts:
                if split == only:
                    for number, row in rows():
                        yield parse(row, f'{path.relative_to(folder).as_posix()} row {number}')

        mixed = by_hash([str(key(example)) for example in parsed('')])

        def examples(split: int) -> Iterator[Example]:
            yield from parsed(_THREE[split])
            yield from (example for example, where in zip(parsed(''), mixed, strict=True) if where == split)
        return {name: lambda split=i: examples(split) for i, name in enumerate(_THREE)}
    return read


def _parts(path: Path) -> list[tuple[Path, str, Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
    """(path, split or '' for mixed, reads its rows) of a file."""
    if path.name == TFDS_FILE:
        from harness.data import builders
        found = list(builders.splits(path.parent))
        return [(path.parent, split if len(found) > 1 else '', functools.partial(_tfds_rows, path.parent, split))
                for split in found]
    if '.jsonl' not in path.name:  # an array_record file of such a directory
        return []
    split = next((split for split in _THREE if path.name.startswith(split)), '')
    return [(path, split, functools.partial(jsonl.rows, path))]


DATASETS = (
    Dataset('chats', '1.0.0', _THREE, {'id': 'text', 'roles': 'texts', 'contents': 'texts'},
            'chats (*.jsonl with lines {"messages": [{"role": ..., "content": ...}, ...]}; also .gz, .zst)',
            lambda folder: jsonl.find(folder, '*.jsonl'),
            _read(_chat, lambda example: example['contents'][0]), chat_pieces, has_answers=True),
    Dataset('gsm8k', '1.0.0', ('train', 'test'), {'id': 'text', 'question': 'text', 'answer': 'text'},
            'train.jsonl and test.jsonl with lines {"question": ..., "answer": ...}',
            lambda folder: [path for path in (folder / 'train.jsonl', folder / 'test.jsonl') if path.is_file()],
            _read_gsm8k, problem_pieces, 'gsm8k', has_answers=True),
    Dataset('selfgen', '1.0.0', _THREE,
            {'id': 'text', 'prompt': 'text', 'text': 'text', 'tokens': 'ids', 'prompt_tokens': 'ids',
             'finished': 'flag'},
            'what headway-generate wrote: *.jsonl with lines {"prompt", "text", "tokens"}, or --format=tfds',
            _find, _read(_written, lambda example: example['prompt']), written_pieces, has_answers=True),
)
