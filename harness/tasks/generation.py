"""Greedy exact match: lambada (the last word) and gsm8k (few-shot arithmetic).

The last word of LAMBADA is scored, not generated: greedy decoding gives it exactly when each of its tokens is the
most likely one after those before it, and one pass sees that.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np

from backbone import catalogue
from harness.scoring import Scorer
from harness.tasks.multiple_choice import share

SHOTS = 5
MAX_NEW_TOKENS = 256


def run(scorer: Scorer, name: str, limit: int | None) -> dict[str, Any]:
    return {'lambada': lambada, 'gsm8k': gsm8k}[name](scorer, limit)


def lambada(scorer: Scorer, limit: int | None) -> dict[str, Any]:
    """{acc, acc_stderr, perplexity (of the last word), n}, in lm-eval's form of the task (lambada_openai)."""
    with catalogue.fetch('lambada').open(encoding='utf-8') as lines:
        rows = [json.loads(line)['doc'] for line in itertools.islice(lines, limit)]
    scores = scorer.score([scorer.pair(row['query'], ' ' + row['choices'][0]) for row in rows], 'lambada')
    return share('acc', [score.greedy for score in scores]) | {
        'perplexity': math.exp(-np.mean([score.total for score in scores])), 'n': len(rows)}


def gsm8k(scorer: Scorer, limit: int | None) -> dict[str, Any]:
    """{exact_match, exact_match_stderr, n}: the number after `####` (or the last number) equals the answer's.

    The first questions of the train split, with their worked answers, stand before each test question.
    """
    folder = catalogue.fetch('gsm8k')
    with (folder / 'train.jsonl').open(encoding='utf-8') as lines:
        shots = [json.loads(line) for line in itertools.islice(lines, SHOTS)]
    with (folder / 'test.jsonl').open(encoding='utf-8') as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, limit)]
    answers = scorer.generate([few_shot(shots, row['question']) for row in rows], max_new_tokens=MAX_NEW_TOKENS,
                              until=('\n\n', 'Question:'), name='gsm8k')
    hits = [final_number(answer) == final_number(row['answer']) for row, answer in zip(rows, answers, strict=True)]
    return share('exact_match', hits) | {'n': len(rows), 'shots': SHOTS}


def few_shot(shots: list[dict[str, str]], question: str) -> str:
    """lm-eval's layout of the task."""
    solved = ''.join(f'Question: {shot["question"]}\nAnswer: {shot["answer"]}\n\n' for shot in shots)
    return f'{solved}Question: {question}\nAnswer:'


def final_number(text: str) -> str | None:
    """The number after `####`, else the last number of the text, without `$`, commas or a final point."""
    marked = re.search(r'####\s*(-?[$\d.,]+)', text)
    numbers = [marked.group(1)] if marked else re.findall(r'-?\$?\d[\d.,]*', text)
    if not numbers:
        return None
    number = re.sub(r'[$,]', '', numbers[-1]).rstrip('.')
    return number.removesuffix('.00').removesuffix('.0')
