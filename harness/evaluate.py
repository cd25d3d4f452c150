"""Quality of a model: perplexity, multiple choice and greedy exact match, each with its standard error.

    results = measure(Scorer.of(models.load('smollm2-135m')), ['ppl:enwik8', 'lambada', 'piqa'], limit=100)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backbone.config import ModelConfig
from backbone.contract import Target
from backbone.errors import ConfigError, RequestError
from backbone.tokenizer import Tokenizer
from harness.scoring import Scorer
from harness.tasks import generation, multiple_choice, perplexity

SCHEMA = 'headway.evaluate/1'
TASKS = {name: multiple_choice for name in multiple_choice.QUESTIONS} | {'lambada': generation, 'gsm8k': generation}


def check_tasks(tasks: Sequence[str]) -> None:
    """Errors: ConfigError names the first unknown task."""
    for name in tasks:
        if name not in TASKS and not name.startswith('ppl:'):
            raise ConfigError(f'unknown task {name!r}; known: ppl:enwik8, ppl:stdlib, ppl:gutenberg, ppl:FILE, '
                              f'{", ".join(TASKS)}')
    if not tasks:
        raise ConfigError('no task given')


def evaluate(config: ModelConfig, params: Any, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None,
             batch_size: int = 16, *, target: Target | None = None, progress: bool = True) -> dict[str, dict[str, Any]]:
    """As `measure`, of parameters: the base tree; with a `target` (an approximate mode, say) the contract's
    {'base': ...} it takes. Errors: those of `measure`; RequestError (batch_size < 1), TokenizerError."""
    check(tasks, limit)
    return measure(Scorer(config, params if target is not None else {'base': params}, tokenizer, batch_size, target,
                          progress), tasks, limit)


def check(tasks: Sequence[str], limit: int | None) -> None:
    """Errors: ConfigError names the first unknown task; RequestError (limit < 1)."""
    check_tasks(tasks)
    if limit is not None and limit < 1:
        raise RequestError(f'limit must be at least 1, got {limit}')


def measure(scorer: Scorer, tasks: Sequence[str], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """{task: {measure: value, measure_stderr: value, n: items}}.

    limit: the first so many questions, or windows of text; None takes all (enwik8: hours on a CPU).
    Errors: ConfigError (unknown task), RequestError (limit < 1), FetchError.
    """
    check(tasks, limit)
    return {name: TASKS.get(name, perplexity).run(scorer, name, limit) for name in tasks}
