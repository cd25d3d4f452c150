"""Quality at equal shares, and at equal bytes read, of all ways to say what is left out: rows, a table, a plot.

    python scripts/sparsity_eval.py --config=relufy --model=out/relu_stories --out=out/sparsity_stories \\
        --predictors ours=out/predictor_stories dejavu_style=out/predictor_stories_layers
    python scripts/sparsity_eval.py --tiny --out=out/sparsity_tiny              # a random model, a minute

The protocol is causal: the first --prompt tokens of a window are read dense, the next --steps are decoded one at a time
with the text given, masks from what came before; the loss is that of the decoded tokens alone (harness/stepwise.py).
Windows come from the held-out rows of --config's data: the first --calibrate give means and thresholds, the next --rows
are measured. `share` is what is KEPT. Heads alone ('heads'), neurons alone ('neurons') and 'both' are apart.

    NAME         a run of sparsity/predictor_task.py. A unified one reads the first layer and runs as it would be used;
                 one that reads every layer (per_layer, dejavu) is given what a dense model has there, which none has in
                 time: an upper bound for it, causal all the same
    static       the calibration's mean score        griffin   statistics of the prompt
    random       by chance                           oracle    the true score of each token (plainact): it has seen the
    cats, teal   thresholds on values                          losses; oracle_l2: the true size, no loss
    dense        everything kept

Each at every --shares ('share'), and where choosing costs bytes once more at the largest share at which a token reads
no more than a choice that is free at that one ('bytes'). The ways are in scripts/sparsity_ways.py. Bytes are those of
one step at the middle of the decoded part: layers, head, keys and values, and what chooses. Differences to dense are
paired by window; standard errors are over windows.
--tasks adds questions (harness/evaluate.py) under the same protocol. rows.jsonl has one line a point and is continued
where it stops; statistics.json, table.md and sparsity.png are made of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.config import ModelConfig
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded
from harness import evaluate, models, stepwise
from harness.scoring import Scorer
from scripts.sparsity_ways import BY_VALUE, FREE, PLAIN, Trained, Way, Work, bytes_of, make, recorded, share_at
from scripts.sweep import append, held_out, read_rows, settings_of, write
from sparsity import predictor, relufy
from sparsity.predictor import PredictorConfig
from sparsity.target import SparseTarget

SHARES = (0.5, 0.3, 0.1)  # and 1.0, which is the dense model whoever chooses
ASKED = ('methods', 'parts', 'shares', 'by', 'tasks')  # which points: a later run may ask for more
PART_NAMES = ('heads', 'neurons', 'both')


@dataclasses.dataclass(frozen=True)
class Point:
    """One line. share: asked for. by: 'share', or 'bytes' where the share that is kept follows from them."""

    method: str
    part: str
    share: float
    by: str = 'share'
    task: str = ''

    @property
    def key(self) -> str:
        return f'{self.method}/{self.part}/{self.by}{self.share:g}' + f'/{self.task}' * bool(self.task)


# --- a point ----------------------------------------------------------------------------------------------------------


def points_of(methods: Sequence[str], parts: Sequence[str], shares: Sequence[float], tasks: Sequence[str],
              by: Sequence[str]) -> list[Point]:
    """Dense first; for its loss the others are held against."""
    found = [Point('dense', 'both', 1.0)]
    for method in methods:
        for part in parts:
            if not takes(method, part):
                continue
            found += [Point(method, part, share, how) for share in shares if share < 1 for how in by
                      if how == 'share' or method not in FREE]
    asked = [point for point in found if point.by == 'share']
    return found + [dataclasses.replace(point, task=task) for point in asked for task in tasks]


def takes(method: str, part: str) -> bool:
    """CATS knows neurons only, and TEAL the inputs of all products at once."""
    return part == 'neurons' if method == 'cats' else part == 'both' if method == 'teal' else True


def measure(work: Work, point: Point, dense_nll: np.ndarray | None, scorer: Scorer | None, limit: int | None
            ) -> dict[str, Any] | None:
    """One line of rows.jsonl, None for a point that cannot be: bytes too few, or a task a recorded score knows not."""
    share = point.share
    if point.by == 'bytes':
        share = share_at(work, point.method, point.part, bytes_of(work, 'random', point.part, point.share))
    way = None if share is None else make(work, point.method, point.part, share)
    if way is None or (point.task and way.record):
        return None
    found = {'key': point.key, **dataclasses.asdict(point), 'kept': share,
             'bytes': bytes_of(work, point.method, point.part, share),
             'dense_bytes': bytes_of(work, 'dense', 'both', 1.0)}
    if point.task:
        return found | evaluate.measure(stepwise.of(scorer, way.target, way.params), [point.task], limit)[point.task]
    nll, read = nll_of(work, way)
    if point.method in BY_VALUE:
        found['bytes'] = read  # values say how much they need
    found |= {'windows': len(nll), 'nll_by_window': nll.tolist(),
              'perplexity': float(np.exp(nll.mean())), 'perplexity_stderr': float(np.exp(nll.mean()) * stderr(nll))}
    if dense_nll is None:
        return found
    apart = nll - dense_nll
    return found | {'ratio': float(np.exp(apart.mean())), 'ratio_stderr': float(np.exp(apart.mean()) * stderr(apart))}


def nll_of(work: Work, way: Way) -> tuple[np.ndarray, float | None]:
    """Mean nats a decoded token of each window [rows], and the bytes a token that the target counted."""
    record = recorded(work, *way.record) if way.record else None
    nll, read = [], []
    for first in range(0, len(work.text), work.batch):
        rows = np.arange(first, first + work.batch) % len(work.text)  # one shape; what is there twice is cut
        mine = None if record is None else jax.tree.map(lambda a, rows=rows: a[rows], record)
        cache, logprobs = rows_apart(way.target, way.params, mine, work.text[rows], work.prompt, work.steps)
        nll.append(-np.asarray(logprobs, np.float64).mean(-1))
        if isinstance(way.target, SparseTarget):
            cache = jax.device_get(cache)
            read += [way.target.statistics(jax.tree.map(lambda a, i=i: a[i], cache))['bytes'] for i in range(len(rows))]
    return np.concatenate(nll)[:len(work.text)], float(np.mean(read)) if read else None


@functools.partial(jax.jit, static_argnames=('target', 'prompt', 'steps'))
def rows_apart(target: Any, params: dict, record: dict | None, tokens: jax.Array, prompt: int, steps: int
               ) -> tuple[Any, jax.Array]:
    """Each row as a batch of its own, so that none reads what another asked for: caches, log-probabilities [B, steps].
    """
    def one(row: jax.Array, record: dict | None) -> tuple[Any, jax.Array]:
        mine = params if record is None else params | {'recorded': jax.tree.map(lambda a: a[None], record)}
        cache, logprobs, _ = stepwise.forced(target, mine, row[None], jnp.array([prompt + 1]), prompt, steps)
        layers = cache.layers.replace(kv=()) if isinstance(target, SparseTarget) else ()
        return cache.replace(layers=layers), logprobs[0]
    return jax.vmap(one)(tokens, record)


def stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float('nan')


# --- what is written --------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Perplexity and, where asked for, questions."""
    found = {row['key']: row for row in rows}
    dense = found['dense/both/share1']
    lines = [f'Dense: perplexity {dense["perplexity"]:.3f} ± {dense["perplexity_stderr"]:.3f} over '
             f'{dense["windows"]} windows, {dense["bytes"] / 1e6:.1f} MB a token.', '',
             '| method | part | asked | kept | bytes, dense = 1 | perplexity | against dense |', '|---' * 7 + '|']
    for row in rows:
        if not row['task'] and row is not dense:
            lines.append(f'| {row["method"]} | {row["part"]} | {row["by"]} {row["share"]:g} | {row["kept"]:.3g} | '
                         f'{row["bytes"] / row["dense_bytes"]:.3f} | {row["perplexity"]:.3f} ± '
                         f'{row["perplexity_stderr"]:.3f} | {row["ratio"]:.4f} ± {row["ratio_stderr"]:.4f} |')
    tasks = [row for row in rows if row['task']]
    if tasks:
        lines += ['', '| method | part | kept | task | accuracy | by length | n |', '|---' * 7 + '|']
    for row in tasks:
        norm = f'{row["acc_norm"]:.3f} ± {row["acc_norm_stderr"]:.3f}' if 'acc_norm' in row else ''
        lines.append(f'| {row["method"]} | {row["part"]} | {row["kept"]:.3g} | {row["task"]} | {row["acc"]:.3f} ± '
                     f'{row["acc_stderr"]:.3f} | {norm} | {row["n"]} |')
    return '\n'.join(lines) + '\n'


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = [row for row in rows if not row['task'] and 'ratio' in row]
    parts = [part for part in PART_NAMES if any(row['part'] == part for row in rows)]
    figure, axes = pyplot.subplots(len(parts), 2, figsize=(12, 4.2 * len(parts)), squeeze=False)
    for line, part in zip(axes, parts, strict=True):
        for axis, x, label in ((line[0], lambda r: r['kept'], 'share kept'),
                               (line[1], lambda r: r['bytes'] / r['dense_bytes'], 'bytes a token, dense = 1')):
            for name in dict.fromkeys(row['method'] for row in rows):
                mine = sorted((row for row in rows if (row['method'], row['part']) == (name, part)), key=x)
                if mine:
                    axis.errorbar([x(r) for r in mine], [r['ratio'] for r in mine], [r['ratio_stderr'] for r in mine],
                                  marker='o', markersize=3, label=name, capsize=2)
            axis.set_xlabel(label)
            axis.set_ylabel(f'perplexity, dense = 1 ({part})')
            axis.set_yscale('log')
            axis.grid(alpha=0.3)
        line[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- the run ----------------------------------------------------------------------------------------------------------


def predictor_of(name: str, source: str, cfg: ModelConfig, base_hash: str) -> Trained:
    """Errors: RequestError where the run trains no predictor, or one of another base."""
    task, params, _ = models.read_run(*models.split(source))
    if not isinstance(getattr(task, 'predictor', None), PredictorConfig):
        raise RequestError(f'{source} trains no predictor')
    found = models.formats.params_hash(jax.tree.map(np.asarray, params['base']))
    if task.cfg != cfg or found != base_hash:
        raise RequestError(f'{source}: trained on a base with parameters {found}, the model has {base_hash}')
    return Trained(task.predictor, params['sparsity'])


def real(args: argparse.Namespace) -> tuple[Work, Loaded]:
    loaded = models.load(args.model)
    if loaded.decodes is not None:
        raise RequestError(f'{args.model} is more than a plain model')
    sources = dict(spec.split('=', 1) for spec in args.predictors)
    trained = {name: predictor_of(name, source, loaded.config, loaded.base_hash) for name, source in sources.items()}
    rows = held_out(args.config, args.calibrate + args.rows)
    return work_of(args, loaded.config, loaded.params, rows, trained), loaded


def tiny(args: argparse.Namespace) -> tuple[Work, None]:
    """A random model with ReLU, random predictors of two kinds, random tokens."""
    from backbone.model import init_params
    from configs import training

    cfg = ModelConfig.from_dict(training.llama(vocab=97, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48,
                                               max_seq_len=64))
    cfg = relufy.config(cfg)
    base = jax.jit(lambda key: jax.tree.map(lambda a: 1.5 * a, init_params(cfg, key)))(jax.random.key(0))
    shapes = {'ours': PredictorConfig(width_heads=4, width_neurons=4, block=4),
              'dejavu_style': PredictorConfig('per_layer', width_heads=4, width_neurons=4, block=4)}
    trained = {name: Trained(p, predictor.init_params(cfg, p, jax.random.key(1))) for name, p in shapes.items()}
    tokens = np.random.default_rng(0).integers(0, 97, (args.calibrate + args.rows, 32))
    return work_of(args, cfg, base, tokens, trained), None


def work_of(args: argparse.Namespace, cfg: ModelConfig, base: dict, rows: np.ndarray, trained: dict[str, Trained]
            ) -> Work:
    """Errors: RequestError where the rows are too short, or a predictor's name is taken."""
    rows, size = np.asarray(rows, np.int32), args.prompt + args.steps + 1
    if rows.shape[1] < size:
        raise RequestError(f'rows have {rows.shape[1]} tokens, --prompt + --steps + 1 are needed')
    if taken := sorted(set(trained) & {*PLAIN, 'dense'}):
        raise RequestError(f'--predictors: {taken[0]} is a name of its own')
    settings = {'refresh': args.refresh, 'dense_first': 1, 'dense_last': args.dense_last, 'ranking': args.ranking}
    return Work(cfg, jax.device_put(jax.tree.map(jnp.asarray, base)), rows[args.calibrate:, :size],
                rows[:args.calibrate], args.prompt, settings, (args.head_unit, args.block), trained,
                min(args.batch, args.rows), args.allocate)


def main(args: argparse.Namespace) -> list[dict]:
    """Errors: RequestError, also where --out belongs to other settings."""
    out = Path(args.out)
    settings = settings_of(argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ASKED}))
    work, loaded = tiny(args) if args.tiny else real(args)
    write(out / 'settings.json', json.dumps(settings, indent=1) + '\n')
    zeros = relufy.natural_sparsity(work.cfg, work.base, work.calibration)
    write(out / 'statistics.json', json.dumps({'activation': work.cfg.mlp.activation,
                                               'zeros_by_layer': np.asarray(zeros).tolist()}, indent=1) + '\n')
    scorer = Scorer(loaded.config, {'base': work.base}, loaded.tokenizer, args.batch) if args.tasks else None

    found = read_rows(out / 'rows.jsonl')
    done = {row['key'] for row in found}
    methods = [*work.trained, *(name for name in args.methods if name not in work.trained)]
    for point in points_of(methods, args.parts, args.shares, args.tasks, args.by):
        if point.key in done:
            continue
        dense = next((np.array(row['nll_by_window']) for row in found if row['key'] == 'dense/both/share1'), None)
        row = measure(work, point, dense, scorer, args.limit)
        if row is None:
            print(f'{point.key}: left out', flush=True)
            continue
        found.append(append(out / 'rows.jsonl', row))
        said = f'accuracy {row["acc"]:.3f}' if point.task else f'perplexity {row["perplexity"]:.3f}'
        print(f'{point.key}: {said}, kept {row["kept"]:.3g}, bytes {row["bytes"] / row["dense_bytes"]:.3f}', flush=True)
    write(out / 'table.md', table(found))
    plot(found, out / 'sparsity.png')
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--tiny', action='store_true', help='a random model, small sizes')
    parser.add_argument('--config', default='relufy', help='module of configs/ whose held-out data is used')
    parser.add_argument('--model', default='out/relu_stories')
    parser.add_argument('--predictors', nargs='*', default=[], help='NAME=run directory')
    parser.add_argument('--methods', nargs='*', default=list(PLAIN), choices=PLAIN, help='beside the predictors')
    parser.add_argument('--parts', nargs='+', default=['heads', 'both'], choices=PART_NAMES)
    parser.add_argument('--shares', nargs='+', type=float, default=list(SHARES), help='kept')
    parser.add_argument('--by', nargs='+', default=['share', 'bytes'], choices=('share', 'bytes'))
    parser.add_argument('--head_unit', default='kv_group', choices=('head', 'kv_group'), help='without a predictor')
    parser.add_argument('--block', type=int, default=1, help='neurons a block, without a predictor')
    parser.add_argument('--refresh', type=int, default=1, help='tokens that a mask is used for')
    parser.add_argument('--ranking', default='local', choices=('local', 'global', 'hybrid'))
    parser.add_argument('--allocate', action='store_true', help='units by layer as ranking all layers keeps them')
    parser.add_argument('--dense_last', type=int, default=0)
    parser.add_argument('--calibrate', type=int, default=16, help='rows')
    parser.add_argument('--rows', type=int, default=32)
    parser.add_argument('--batch', type=int, default=8, help='rows decoded at a time')
    parser.add_argument('--prompt', type=int, default=64, help='tokens read dense')
    parser.add_argument('--steps', type=int, default=128, help='tokens decoded')
    parser.add_argument('--tasks', nargs='*', default=[], help='of headway-evaluate, multiple choice')
    parser.add_argument('--limit', type=int, default=100, help='questions')
    args = parser.parse_args(argv)
    if args.allocate and (args.ranking != 'local' or 'bytes' in args.by):
        parser.error('--allocate: with --ranking=local and --by share')
    if args.tiny:
        args.calibrate, args.rows, args.batch, args.prompt, args.steps, args.block = 2, 3, 2, 8, 12, 4
    return args


if __name__ == '__main__':
    main(parse())
