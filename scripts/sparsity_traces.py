"""Keeps what a predictor learns from: contexts of layer 0 and the scores that belong to them (sparsity/traces.py).

    python scripts/sparsity_traces.py --config=configs/sparsity_predictor.py:stories --rows=64 --out=out/sparsity_traces

The same command after an interruption goes on. The folder is out/<split>-<hash>, of the base, the rows and what is
computed; its path is printed, and the mean scores over it are written beside (mean.npz: what a static mask is made of).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.formats.tensors import params_hash
from harness import data, train_step
from harness.data import once
from harness.launch import common
from sparsity import traces
from sparsity.config import PARTS


def main(argv: list[str]) -> None:
    if argv[1:] or CONFIG.value is None:
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--config is needed')
    config = common.read_config(CONFIG)
    task = train_step.build_task(config)
    if not hasattr(task, 'spans'):
        raise RequestError('--config is no run of configs/sparsity_predictor.py')
    split = SPLIT.value or config.data.split
    rows = data.open_rows(config.data, split, data.make_tokenizer(config.data))
    base = task.load().get('base') or task.init(jax.random.key(config.seed))['base']
    folder = store(task, base, rows, min(ROWS.value, len(rows)), Path(OUT.value), split, BATCH.value, PER_FILE.value,
                   DTYPE.value)
    np.savez(folder / 'mean.npz', **traces.Traces(folder).mean())
    print(folder)


def store(task: Any, base: dict, rows: Any, count: int, out: Path, split: str, batch: int, per_file: int,
          dtype: str = 'float16') -> Path:
    """The folder, with a trace for every span of the first `count` rows that means something. rows: with `batch` and
    `fingerprint` (harness/data/rows.py). Errors: those of traces.write; RequestError where no span does."""
    known = [np.asarray(task.spans(rows.batch([row])).known)[0] for row in range(count)]
    numbers = [(row, span) for row, spans in enumerate(known) for span in np.flatnonzero(spans).tolist()]
    if not numbers:
        raise RequestError(f'{count} rows of {split} hold no span to be traced')
    key = {'base': params_hash(jax.tree.map(np.asarray, base)), 'rows': rows.fingerprint, 'split': split,
           'first_rows': count, 'what': task.feature_name, 'batch': batch}
    run = jax.jit(task.features)

    def examples(first: int, last: int) -> Sequence[traces.Example]:
        wanted, found = numbers[first:last], {}
        needed = sorted({row for row, _ in wanted})
        for i in range(0, len(needed), batch):
            some = needed[i:i + batch]
            filled = some + [some[-1]] * (batch - len(some))  # one shape, one compilation
            made = jax.tree.map(np.asarray, run(base, rows.batch(filled)))
            found |= {row: {name: a[j] for name, a in made.items()} for j, row in enumerate(some)}
        return [{name: found[row][name][span] for name in ('context', *PARTS)} for row, span in wanted]

    shape = jax.eval_shape(task.features, base, rows.batch([0] * batch))
    layout = traces.Layout(*(tuple(shape[name].shape[2:]) for name in ('context', *PARTS)), dtype=dtype)
    folder = out / f'{split}-{once.digest(key | {"dtype": dtype})[:16]}'
    traces.write(folder, key, layout, len(numbers), per_file, examples)
    return folder


if __name__ == '__main__':  # flags belong to a process: a test that imports this file must not get them
    CONFIG = config_flags.DEFINE_config_file('config', None, 'A run of configs/sparsity_predictor.py.')
    SPLIT = common.string_flag('split', '', 'Split of the data; default: the one trained on.')
    ROWS = common.integer_flag('rows', 64, 'Rows of text.')
    BATCH = common.integer_flag('batch', 4, 'Rows at a time.')
    PER_FILE = common.integer_flag('per_file', 256, 'Examples a file: so many are lost at most when this is killed.')
    DTYPE = common.enum_flag('dtype', 'float16', ['float16', 'float32'], 'Of contexts and scores.')
    OUT = common.string_flag('out', 'out/sparsity_traces', 'Folder of folders.')
    common.run(main)
