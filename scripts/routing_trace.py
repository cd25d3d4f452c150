"""Records what a mixture's routers chose on held-out text, and what every predictor of a run said of it.

    python scripts/routing_trace.py --workdir=out/prefetch_stories --out=out/stories_trace.npz

Prints the share of the chosen experts that each predictor names, by how many layers ahead (m2r2/recall.py), and writes
the trace that m2r2/expert_sim.py reads (m2r2/expert_traces.py).
"""

import sys
from pathlib import Path

import ml_collections

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from harness import data, models
from harness.launch import common

WORKDIR = common.string_flag('workdir', None, 'A run of configs/prefetch.py, with or without @STEP.')
ROWS = common.integer_flag('rows', 8, 'Rows of held-out text.')
COUNT = common.integer_flag('count', 0, 'Predictions kept of each layer; 0: twice the experts of a token.')
OUT = common.string_flag('out', '', '.npz file to write.')


def main(argv: list[str]) -> None:
    if argv[1:] or not WORKDIR.value:
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--workdir is needed')
    from m2r2 import expert_traces, recall, routing_trace
    from m2r2.prefetch_task import PrefetchTask

    folder, step = models.split(WORKDIR.value)
    task, params, _ = models.read_run(folder, step)
    if not isinstance(task, PrefetchTask):
        raise RequestError(f'{WORKDIR.value} is no run of configs/prefetch.py')
    config = ml_collections.ConfigDict(models.read_config(folder)['config'])
    rows = data.open_rows(config.data, config.data.eval_split, data.make_tokenizer(config.data))
    moe = task.cfg.moe
    count = COUNT.value or min(2 * moe.experts_per_token, moe.num_experts)
    if not 1 <= ROWS.value <= len(rows) or not 1 <= count <= moe.num_experts:
        raise RequestError(f'--rows must be in 1..{len(rows)} and --count at most {moe.num_experts}')
    batch = rows.batch(range(ROWS.value))
    ids, made = routing_trace.record(task.cfg, task.shape, params, batch['tokens'], count, segments=batch['segments'])
    budgets = tuple(n for n in task.budgets.values() if n <= count)
    print(f'{len(ids)} tokens, {moe.experts_per_token} of {moe.num_experts} experts; recall by lead at {budgets}')
    known = {name: expert_traces.recorded(ids, array) for name, array in made.items()}
    for name, table in recall.table(ids, known, budgets).items():
        print(f'{name:<12}', '   '.join(' '.join(f'{value:.3f}' for value in row) for row in table))
    if OUT.value:
        expert_traces.save(OUT.value, ids, moe.num_experts, made)
        print(f'wrote {OUT.value}')


if __name__ == '__main__':
    common.run(main)
