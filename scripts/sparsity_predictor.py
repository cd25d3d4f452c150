"""What a predictor knows on held-out text, beside what needs no predictor at all.

    python scripts/sparsity_predictor.py --workdir=out/sparsity_stories --rows=32 --out=out/predictor.json

Of heads and neurons, means over examples with standard errors over rows (examples of one row are not independent):
rho, Spearman's of a layer's units; rho_flat, of all layers' at once; recall and mass of the share kept.
    predictor   on the example's own context            shuffled   on another example's
    mean        of the scores of so many training rows  random     by chance            oracle     the scores themselves
A predictor that looks at its input falls to the mean vector, or below it, when inputs are shuffled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.formats.tensors import flatten, params_hash
from harness import data, models
from harness.launch import common
from sparsity import measures
from sparsity.config import PARTS
from sparsity.predictor import predict


def main(argv: list[str]) -> None:
    if argv[1:] or not WORKDIR.value:
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--workdir is needed')
    folder, step = models.split(WORKDIR.value)
    task, params, _ = models.read_run(folder, step)
    if not hasattr(task, 'predictor'):
        raise RequestError(f'{WORKDIR.value} is no run of configs/sparsity_predictor.py')
    config = ml_collections.ConfigDict(models.read_config(folder)['config']).data
    tokenizer = data.make_tokenizer(config)
    train, held_out = (data.open_rows(config, split, tokenizer) for split in (config.split, config.eval_split))
    if task.cached:  # what the run kept is read again
        digest = params_hash({f'base/{path}': np.asarray(a) for path, a in flatten(params['base']).items()})
        train, held_out = (data.cached(rows, task.features, params['base'], digest, task.feature_name,
                                       config.batch_size) for rows in (train, held_out))
    params = jax.device_put(params)
    mean = mean_of(task, params['base'], train, min(ROWS.value * MEAN_ROWS.value, len(train)), BATCH.value)
    table = measure(task, params, held_out, min(ROWS.value, len(held_out)), mean, BATCH.value)
    for part in PARTS:
        print(part)
        for who, row in table[part].items():
            said = (f'{name} {value:.3f} +- {error:.3f}' for name, (value, error) in row.items())
            print(f'  {who:<10}', '  '.join(said))
    if OUT.value:
        common.write_json(Path(OUT.value), {'workdir': WORKDIR.value, 'criterion': task.criterion,
                                            'predictor': task.predictor.to_dict(), 'parts': table})


def batches(task: Any, base: dict, rows: Any, count: int, size: int):
    """Features of `size` rows at a time, and which rows are no repeats."""
    run = jax.jit(task.features)
    for first in range(0, count, size):
        numbers = np.arange(first, first + size)
        batch = rows.batch(np.minimum(numbers, count - 1))
        kept = {name: np.asarray(batch[name], np.float32) for name in ('context', 'known', *PARTS) if name in batch}
        yield kept or run(base, batch), numbers < count


def mean_of(task: Any, base: dict, rows: Any, count: int, size: int) -> dict[str, np.ndarray]:
    """{'heads': [L, H'], 'neurons': [L, NB]} over the spans of the first `count` rows."""
    total, weight = {part: 0.0 for part in PARTS}, 0.0
    for made, real in batches(task, base, rows, count, size):
        known = np.asarray(made['known']) * real[:, None]
        weight += known.sum()
        for part in PARTS:
            total[part] = total[part] + np.einsum('bc,bcln->ln', known, np.asarray(made[part], np.float64))
    return {part: np.asarray(total[part] / max(weight, 1e-9), np.float32) for part in PARTS}


def measure(task: Any, params: dict, rows: Any, count: int, mean: dict[str, np.ndarray], size: int) -> dict[str, Any]:
    """By part, who and measure: (mean, standard error over rows)."""
    @jax.jit
    def of_batch(params: dict, made: dict, mean: dict, rng: jax.Array) -> dict:
        context = made['context']
        rows, spans = context.shape[:2]
        others = jnp.roll(context, 1, 0) if rows > 1 else jnp.roll(context, spans // 2, 1)
        says = lambda x: predict(task.cfg, task.predictor, params['sparsity'], x)
        own, shuffled = says(context), says(others)
        found = {}
        for part in PARTS:
            truth = made[part].astype(jnp.float32)
            guesses = {'predictor': own[part], 'shuffled': shuffled[part],
                       'mean': jnp.broadcast_to(mean[part], truth.shape),
                       'random': jax.random.uniform(rng, truth.shape), 'oracle': truth}
            flat = lambda a: a.reshape(-1, *a.shape[2:])
            known = made['known']
            k = task.predictor.kept(task.cfg, part)
            found[part] = {who: {name: (a.reshape(rows, spans) * known).sum(1) / jnp.maximum(known.sum(1), 1e-9)
                                 for name, a in measures.of_part(flat(truth), flat(guess), k).items()}
                           for who, guess in guesses.items()}
        return found

    parts, keep = [], []
    for i, (made, real) in enumerate(batches(task, params['base'], rows, count, size)):
        parts.append(jax.tree.map(np.asarray, of_batch(params, made, mean, jax.random.key(i))))
        keep.append(real & (np.asarray(made['known']).sum(1) > 0))
    keep = np.concatenate(keep)

    def summary(*values: np.ndarray) -> tuple[float, float]:
        a = np.concatenate(values)[keep]
        return float(a.mean()), float(a.std(ddof=1) / len(a)**0.5) if len(a) > 1 else float('nan')
    return jax.tree.map(summary, *parts)


if __name__ == '__main__':  # flags belong to a process: a test that imports this file must not get them
    WORKDIR = common.string_flag('workdir', None, 'A run of configs/sparsity_predictor.py, with or without @STEP.')
    ROWS = common.integer_flag('rows', 32, 'Held-out rows; as many of training for the mean, times --mean_rows.')
    MEAN_ROWS = common.integer_flag('mean_rows', 2, 'Training rows for the mean vector, for each held-out row.')
    BATCH = common.integer_flag('batch', 4, 'Rows at a time.')
    OUT = common.string_flag('out', '', '.json file to write.')
    common.run(main)
