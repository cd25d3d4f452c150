"""The questions decoding is measured on, as token ids."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from backbone import catalogue
from backbone.errors import ConfigError

SETS = ('mt_bench', 'vicuna')


@dataclasses.dataclass(frozen=True)
class Prompt:
    name: str
    ids: tuple[int, ...]


def questions(source: str, count: int, tokenizer, *, min_tokens: int = 1, max_tokens: int = 1 << 30) -> list[Prompt]:
    """First turns of `count` questions through the chat template, spread evenly over the set.

    Only questions whose prompt has min_tokens..max_tokens ids count: a bucket of like lengths compiles once.
    Errors: ConfigError for an unknown set or where too few questions fit.
    """
    if source not in SETS:
        raise ConfigError(f'prompts.source: unknown {source!r}, one of {", ".join(SETS)}, random')
    lines = catalogue.fetch(source).read_text(encoding='utf-8').splitlines()
    fitting = []
    for number, line in enumerate(filter(str.strip, lines)):
        question = json.loads(line)
        ids = tokenizer.chat([{'role': 'user', 'content': question['turns'][0]}])
        if min_tokens <= len(ids) <= max_tokens:
            fitting.append(Prompt(f'{source}/{question.get("question_id", number)}', tuple(map(int, ids))))
    if not 1 <= count <= len(fitting):
        raise ConfigError(f'prompts.count is {count}, but {source} has {len(fitting)} questions of '
                          f'{min_tokens}..{max_tokens} tokens')
    return [fitting[i * len(fitting) // count] for i in range(count)]


def random_prompts(count: int, vocab_size: int, *, min_tokens: int, max_tokens: int, seed: int) -> list[Prompt]:
    """Random ids with repeats inside, for random models: uneven lengths, and something for a lookup to find."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        size = int(rng.integers(min_tokens, max_tokens + 1))
        phrase = rng.integers(3, vocab_size, max(size // 2, 1))
        found.append(Prompt(f'random/{i}', tuple(np.resize(phrase, size).tolist())))
    return found
