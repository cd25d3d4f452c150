"""Prompts: the questions decoding is measured on, as token ids, and the texts a model continues in bulk."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backbone import catalogue
from backbone.errors import ConfigError, RequestError

SETS = ('mt_bench', 'vicuna', 'humaneval')

# Of catalogue:NAME: where the entry's JSON lines are, and the prompt in one of them.
_LINES: dict[str, tuple[str, Callable[[dict], str]]] = {
    'mt_bench': ('', lambda row: row['turns'][0]),
    'vicuna': ('', lambda row: row['turns'][0]),
    'gsm8k': ('train.jsonl', lambda row: row['question']),
    'humaneval': ('', lambda row: row['prompt']),
}
CATALOGUE = (*_LINES, 'stdlib', 'sharegpt')
SHAREGPT_CHARACTERS = 240  # of a first message that is taken as a prompt


def texts(source: str) -> list[str]:
    """Prompts from a text file (one a line), a .jsonl file ({"prompt": ...}), or catalogue:NAME, NAME of CATALOGUE.

    catalogue:stdlib: the head of every documented function of the running Python's standard library.
    catalogue:sharegpt: the short first messages of its conversations (SHAREGPT_CHARACTERS).
    Errors: RequestError names a file that cannot be read or is empty, and the line of a bad or empty prompt;
    FetchError.
    """
    scheme, _, name = source.partition(':')
    if scheme == 'catalogue':
        if name not in CATALOGUE:
            raise RequestError(f'{source}: no prompts under this name, only {", ".join(CATALOGUE)}')
        path = catalogue.fetch(name)
        if name == 'stdlib':
            return list(_function_heads(path))
        if name == 'sharegpt':
            return list(_first_messages(path))
        where, pick = _LINES[name]
        return [pick(json.loads(line)) for line in _read(path / where if where else path) if line.strip()]
    lines = _read(Path(source))
    found = [_prompt_of(line, source, n) for n, line in enumerate(lines, 1)] if source.endswith('.jsonl') else lines
    if not found:
        raise RequestError(f'{source} holds no prompt')
    for number, text in enumerate(found, 1):
        if not text.strip():
            raise RequestError(f'{source} line {number} is empty')
    return found


def _read(path: Path) -> list[str]:
    try:
        # Only ends of lines end a prompt: splitlines() also breaks at form feeds and the like.
        return path.read_text(encoding='utf-8').removesuffix('\n').split('\n') if path.stat().st_size else []
    except OSError as error:
        raise RequestError(f'cannot read {path}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise RequestError(f'{path} is not UTF-8 (byte {error.start})') from error


def _prompt_of(line: str, source: str, number: int) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise RequestError(f'{source} line {number} is not JSON: {error}') from error
    if not isinstance(row, dict) or not isinstance(row.get('prompt'), str):
        raise RequestError(f'{source} line {number} has no text under "prompt"')
    return row['prompt']


def _function_heads(folder: Path) -> Iterator[str]:
    """Signature and docstring of each top-level function, in the order of the files' names."""
    for path in sorted(folder.glob('*.py')):
        source = path.read_text(encoding='utf-8')
        lines = source.split('\n')  # the lines that ast counts
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                yield '\n'.join(lines[node.lineno - 1:node.body[0].end_lineno]) + '\n'


def _first_messages(path: Path) -> Iterator[str]:
    """What people opened conversations with. The file is a JSON list that was cut short: read as far as it goes."""
    text, decoder = path.read_text(encoding='utf-8'), json.JSONDecoder()
    at = text.index('[') + 1
    while True:
        at += len(text[at:at + 80]) - len(text[at:at + 80].lstrip(' \r\n\t,'))
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        # A long conversation is several rows, ID_0, ID_1, ...: only the first begins with a first message.
        if row['id'].endswith('_0') and row['conversations'] and row['conversations'][0]['from'] == 'human':
            message = row['conversations'][0]['value'].strip()
            if message and len(message) <= SHAREGPT_CHARACTERS:
                yield message


@dataclasses.dataclass(frozen=True)
class Prompt:
    name: str
    ids: tuple[int, ...]


def questions(source: str, count: int, tokenizer, *, min_tokens: int = 1, max_tokens: int = 1 << 30) -> list[Prompt]:
    """First turns of `count` questions through the chat template, spread evenly over the set.

    humaneval: heads of functions, to be continued as they are, without a template; so is what `texts` takes.
    Only questions whose prompt has min_tokens..max_tokens ids count: a bucket of like lengths compiles once.
    Errors: ConfigError for an unknown set or where too few questions fit; those of `texts`.
    """
    fitting = [prompt for prompt in _given(source, tokenizer) if min_tokens <= len(prompt.ids) <= max_tokens]
    if not 1 <= count <= len(fitting):
        raise ConfigError(f'prompts.count is {count}, but {source} has {len(fitting)} questions of '
                          f'{min_tokens}..{max_tokens} tokens')
    return [fitting[i * len(fitting) // count] for i in range(count)]


def _given(source: str, tokenizer) -> Iterator[Prompt]:
    if source not in SETS:
        if not (source.startswith('catalogue:') or Path(source).is_file()):
            raise ConfigError(f'prompts.source: unknown {source!r}, one of {", ".join(SETS)}, random, catalogue:NAME, '
                              'or a file')
        for number, text in enumerate(texts(source), 1):
            yield Prompt(f'{Path(source).name}/{number}', tuple(map(int, tokenizer.encode(text))))
        return
    lines = catalogue.fetch(source).read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(filter(str.strip, lines)):
        question = json.loads(line)
        code = source == 'humaneval'
        ids = (tokenizer.encode(question['prompt']) if code else
               tokenizer.chat([{'role': 'user', 'content': question['turns'][0]}]))
        yield Prompt(question.get('task_id') if code else f'{source}/{question.get("question_id", number)}',
                     tuple(map(int, ids)))


def random_prompts(count: int, vocab_size: int, *, min_tokens: int, max_tokens: int, seed: int) -> list[Prompt]:
    """Random ids with repeats inside, for random models: uneven lengths, and something for a lookup to find."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        size = int(rng.integers(min_tokens, max_tokens + 1))
        phrase = rng.integers(3, vocab_size, max(size // 2, 1))
        found.append(Prompt(f'random/{i}', tuple(np.resize(phrase, size).tolist())))
    return found
