"""Multiple choice by likelihood: piqa, arc_easy, arc_challenge, hellaswag, with lm-eval's prompts.

acc takes the choice with the highest total log-probability, acc_norm the one with the highest per character.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from backbone import catalogue
from harness.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Question:
    """The choices follow the context after one space; gold is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


def piqa(row: dict[str, Any]) -> Question:
    return Question(f'Question: {row["goal"]}\nAnswer:', (row['sol1'], row['sol2']), int(row['label']))


def arc(row: dict[str, Any]) -> Question:
    return Question(f'Question: {row["question"]}\nAnswer:', tuple(row['choices']['text']),
                    row['choices']['label'].index(row['answerKey']))


def hellaswag(row: dict[str, Any]) -> Question:
    context = row['ctx_a'] + ' ' + row['ctx_b'].capitalize()
    return Question(_clean(row['activity_label'] + ': ' + context), tuple(map(_clean, row['endings'])),
                    int(row['label']))


def _clean(text: str) -> str:
    """WikiHow's marks out of HellaSwag, as lm-eval does."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


QUESTIONS: dict[str, Callable[[dict[str, Any]], Question]] = {
    'piqa': piqa, 'arc_easy': arc, 'arc_challenge': arc, 'hellaswag': hellaswag}


def load(name: str, limit: int | None) -> list[Question]:
    """The first `limit` questions of the validation set. Errors: FetchError."""
    import pyarrow  # comes with tensorflow-datasets; only these tasks read arrow

    with pyarrow.memory_map(str(catalogue.fetch(name))) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        return [QUESTIONS[name](row) for row in table.slice(0, limit).to_pylist()]


def run(scorer: Scorer, name: str, limit: int | None) -> dict[str, Any]:
    """{acc, acc_stderr, acc_norm, acc_norm_stderr, n}."""
    return measure(scorer, load(name, limit), name)


def measure(scorer: Scorer, questions: list[Question], name: str) -> dict[str, Any]:
    rows = [scorer.pair(question.context, ' ' + choice) for question in questions for choice in question.choices]
    totals = iter(score.total for score in scorer.score(rows, name))
    right, right_norm = [], []
    for question in questions:
        logprobs = np.array([next(totals) for _ in question.choices])
        right.append(int(logprobs.argmax()) == question.gold)
        per_character = logprobs / np.array([max(len(choice), 1) for choice in question.choices])
        right_norm.append(int(per_character.argmax()) == question.gold)
    return share('acc', right) | share('acc_norm', right_norm) | {'n': len(questions)}


def share(name: str, hits: list[bool]) -> dict[str, float]:
    """{name: mean, name_stderr: standard error of the mean}."""
    mean, n = float(np.mean(hits)), len(hits)
    return {name: mean, f'{name}_stderr': math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan}
