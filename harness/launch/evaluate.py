"""Quality of a model, as a table and as JSON.

    headway-evaluate --model=smollm2-135m --tasks=ppl:enwik8,lambada,piqa --limit=100 --out=out/evaluate.json
"""

from __future__ import annotations

import time
from pathlib import Path

from backbone.errors import RequestError
from harness import evaluate as evaluation
from harness import provenance
from harness.launch import common

MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key, .gguf file, checkpoint, run, zoo name.')
TASKS = common.list_flag('tasks', ['ppl:enwik8', 'lambada', 'piqa'],
                         'ppl:enwik8, ppl:stdlib, ppl:gutenberg, ppl:FILE, lambada, piqa, arc_easy, arc_challenge, '
                         'hellaswag, gsm8k.')
LIMIT = common.integer_flag('limit', 100, 'Questions or windows a task; 0 takes all.')
BATCH_SIZE = common.integer_flag('batch_size', 16, 'Rows a call, less where memory asks for it.')
OUT = common.string_flag('out', None, 'Where to write the results as JSON.')


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    from harness import models, scoring  # after the flags are known to be good: reading files pulls in much

    evaluation.check_tasks(TASKS.value)
    loaded = models.load(MODEL.value)
    started = time.perf_counter()
    tasks = evaluation.measure(scoring.Scorer.of(loaded, BATCH_SIZE.value), TASKS.value, LIMIT.value or None)
    for name, measures in tasks.items():
        for measure, value in measures.items():
            if f'{measure}_stderr' in measures:
                print(f'{name:20} {measure:15} {value:9.4f} ± {measures[f"{measure}_stderr"]:.4f}  '
                      f'(n={measures["n"]})')
    if OUT.value:
        config = {'model': MODEL.value, 'tasks': TASKS.value, 'limit': LIMIT.value, 'batch_size': BATCH_SIZE.value}
        common.write_json(Path(OUT.value), {
            'schema': evaluation.SCHEMA, **provenance.collect(config), 'seed': 0,
            'model': {'name': loaded.name, 'base_hash': loaded.base_hash, 'config': loaded.config.to_dict()},
            'tasks': tasks, 'wall_s': time.perf_counter() - started})


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
