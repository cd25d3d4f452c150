"""Which attentions of a model can be left out while it drafts for itself: every search, on real prompts.

    python scripts/rad_search.py --model=smollm2-135m --out=out/rad_search                # k = 7, 15 and free
    python scripts/rad_search.py --model=smollm2-135m --out=out/rad_search --calibrate    # costs by the clock first
    python scripts/rad_search.py --tiny --out=/tmp/tiny                                   # a random model, a minute

Acceptance is counted exactly on the greedy continuations of --count prompts (rad/acceptance.py); tau follows from it
and from what a step costs (rad/diagnose.py): by the weights that are read unless --costs names a file or --calibrate
times the steps, which costs.json keeps. tau is that of the fastest draft length up to --block. What a search is told
is tau where k is free; at fixed k it is that of drafts of --block tokens, so that all positions count.
--held_out other prompts judge what was found; nothing is chosen by them.

table.jsonl has one line a set, in the order of evaluation, and is continued where it stops (tpe_K.sqlite, too); so are
the files below where a later call looks for other k or by other methods. searches.json: of each method and k the set
found, its tau, acceptance, and how many sets it asked for, all as if it had been alone; but tpe starts from the sets
that leave_one_out, greedy and evenly found, and output_kl first runs one pass a sublayer. chosen.json: the best set of
each k. --measure=5 decodes with those, timed, in turns with plain decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import layout, model
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded, params_hash
from harness import decode, models, provenance, steps
from harness.baselines import Autoregressive
from harness.prompts import questions, random_prompts
from rad import acceptance, diagnose, search
from rad.diagnose import Costs
from rad.skip import SkipConfig, SkipDrafter
from rad.table import Table, run
from scripts.sweep import write

STARTS = ('leave_one_out', 'greedy', 'evenly')  # what tpe tries first, where it was run


@dataclasses.dataclass
class Work:
    """What all searches share. searched: a continuation; count, judge: f(skip) of `acceptance.counter`, of it and of
    the one held out."""

    cfg: ModelConfig
    target: Any
    params: dict
    searched: acceptance.Continuation
    prompts: list[list[int]]  # held out
    count: Any
    judge: Any
    costs: Costs
    table: Table
    harm: dict[bool, list[float]] = dataclasses.field(default_factory=dict)

    def evaluate(self, skip: SkipConfig) -> dict[str, Any]:
        return said(*self.count(skip))

    def tau(self, skip: SkipConfig, row: dict[str, Any]) -> tuple[float, int]:
        """tau, and the draft length it is of."""
        return diagnose.best_tau(self.costs, self.cfg.num_layers, skip, row['counts'])

    def score(self, free: bool) -> Any:
        """What a search is told of a set."""
        if free:
            return lambda skip, row: self.tau(skip, row)[0]
        return lambda skip, row: diagnose.model_tau(self.costs, self.cfg.num_layers, skip, row['counts'],
                                                    len(row['counts']) - 1)


def said(counts: list[int], rounds: list[int]) -> dict[str, Any]:
    """A row: `counts` are all starts by drafts kept, `rounds` those that decoding comes by."""
    block = len(counts) - 1
    return {'counts': counts, 'rounds': rounds, 'acceptance': acceptance.rate(counts),
            'by_position': acceptance.by_position(counts), 'tokens_a_round': acceptance.tokens_a_round(counts, block),
            'tokens_a_round_decoding': acceptance.tokens_a_round(rounds, block)}


def prepare(args: argparse.Namespace) -> Work:
    loaded = tiny_model() if args.tiny else models.load(args.model)
    if loaded.decodes is not None:
        raise RequestError(f'{loaded.name} is more than a plain model: attention is left out of plain ones')
    total = args.count + args.held_out
    if args.tiny:
        prompts = random_prompts(total, loaded.config.vocab_size, min_tokens=4, max_tokens=12, seed=args.seed)
    else:
        prompts = questions(args.prompts, total, loaded.tokenizer, max_tokens=args.max_tokens)
    order = np.random.default_rng(args.seed).permutation(total)
    ids = [list(prompts[i].ids) for i in order]
    if len({tuple(row) for row in ids}) < total:
        raise RequestError(f'{args.prompts}: a prompt is there twice, and would be searched on and held out')
    target, params = models.make_target(loaded, args.dtype), {'base': layout.pack(loaded.params, args.dtype)}
    header = {'model': loaded.base_hash or params_hash(loaded.params), 'name': loaded.name}
    header |= {name: getattr(args, name) for name in ('block', 'size', 'count', 'held_out', 'dtype', 'seed', 'prompts',
                                                      'max_tokens')}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / 'table.jsonl', header)  # refuses before anything is run
    searched, held = (acceptance.continuation(target, params, rows, args.size)
                      for rows in (ids[:args.count], ids[args.count:]))
    cfg, base = loaded.config, params['base']
    count, judge = (acceptance.counter(cfg, base, [part], args.block) for part in (searched, held))
    return Work(cfg, target, params, searched, ids[args.count:], count, judge,
                costs_of(args, cfg, target, params), table)


def costs_of(args: argparse.Namespace, cfg: ModelConfig, target: Any, params: dict) -> Costs:
    """--costs, else what costs.json keeps, else by the clock (--calibrate), else by weights. Kept in costs.json."""
    kept = Path(args.costs) if args.costs else Path(args.out) / 'costs.json'
    if kept.exists() and not args.calibrate:
        return Costs.from_dict(json.loads(kept.read_text()))
    if args.costs:
        raise RequestError(f'--costs: {kept} is not there')
    costs = calibrate(cfg, target, params, args.block) if args.calibrate else Costs.of_weights(cfg, args.block)
    write(kept, json.dumps(costs.to_dict(), indent=2))
    return costs


def calibrate(cfg: ModelConfig, target: Any, params: dict, block: int, turns: int = 7) -> Costs:
    """By the clock, batch 1, 64 tokens cached: medians of `turns` turns in which every piece is timed once."""
    every = tuple(range(cfg.num_layers))
    cache = target.init_cache(1, min(128, cfg.max_seq_len), block)
    cache = cache.replace(pos=cache.pos + min(64, cfg.max_seq_len - block - 1))
    sets = (SkipConfig(), SkipConfig(every), SkipConfig(every, every))
    timers = [steps.draft_timer(SkipDrafter(cfg, skip, 1), params, cache, ()) for skip in sets]
    timers += [steps.forward_timer(target, params, cache, np.ones((1, size), np.int32)) for size in range(1, block + 2)]
    times = np.median([[timer() for timer in timers] for _ in range(turns)], axis=0).tolist()
    return Costs.of_times(cfg.num_layers, *times[:3], times[3:])


def harm_of(work: Work, space: search.Space) -> list[float]:
    """KL at the output that each sublayer alone brings."""
    if space.mlp not in work.harm:
        run = jax.jit(functools.partial(diagnose.output_kl, work.cfg))
        flags = [space.skip([i]).flags(work.cfg.num_layers) for i in range(space.size)]
        work.harm[space.mlp] = [float(run(work.params['base'], work.searched, skip)) for skip in flags]
    return work.harm[space.mlp]


def search_all(args: argparse.Namespace, work: Work) -> list[dict[str, Any]]:
    """One row a method and k, those of earlier calls in the same folder among them."""
    path = Path(args.out) / 'searches.json'
    rows = json.loads(path.read_text())['searches'] if path.exists() else []
    for k in args.k:
        space = search.Space(work.cfg.num_layers, k, args.mlp)
        found = {row['method']: SkipConfig.of(work.cfg, **row['set']) for row in rows if row['k'] == named(k)}
        for method in args.methods:
            harm = harm_of(work, space) if method == 'output_kl' else None
            first = [found[name] for name in STARTS if name in found]
            made = search.make(method, space, trials=args.trials, seed=args.seed, width=args.width, harm=harm,
                               first=first, storage=Path(args.out) / f'tpe_{named(k)}.sqlite')
            run(made, work.evaluate, work.score(k is None), work.table, {'asked': [method, named(k)]})
            skip, score = made.best
            found[method] = skip
            row = row_of(work, skip) | {'method': method, 'k': named(k), 'score': score,
                                        'evaluations': made.evaluations, 'trace': [told for _, told in made.seen]}
            print(line(row), flush=True)
            rows = [old for old in rows if (old['method'], old['k']) != (method, named(k))] + [row]
            write(path, json.dumps(provenance.collect(vars(args)) | {'costs': work.costs.to_dict(), 'searches': rows},
                                   indent=1))
    return rows


def row_of(work: Work, skip: SkipConfig) -> dict[str, Any]:
    """What is known of a set, and the same of prompts that nothing was chosen by."""
    # A sampler's own file may outlive rows of the table.
    here = work.table.find(skip) or work.table.add(skip, work.evaluate(skip))
    there = said(*work.judge(skip))
    rows = [row | dict(zip(('tau', 'block'), work.tau(skip, row), strict=True)) for row in (here, there)]
    return rows[0] | {'held_out': rows[1]}


def named(k: int | None) -> str:
    return 'free' if k is None else str(k)


def line(row: dict[str, Any]) -> str:
    off = row['set']
    skipped = ' '.join(map(str, off['attention'])) + (' | mlp ' + ' '.join(map(str, off['mlp']))) * bool(off['mlp'])
    return (f'{row["method"]:14} k {row["k"]:>4}  accepted {row["acceptance"]:.3f}  tau {row["tau"]:.4f} '
            f'(drafts {row["block"]})  held out {row["held_out"]["acceptance"]:.3f} {row["held_out"]["tau"]:.4f}  '
            f'{row["evaluations"]:4} sets  {skipped}')


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{k: the row of the highest score}: of the prompts that were searched on."""
    best = {}
    for row in rows:
        if row['k'] not in best or row['score'] > best[row['k']]['score']:
            best[row['k']] = row
    kept = ('method', 'set', 'score', 'tau', 'block', 'acceptance', 'evaluations', 'held_out')
    return {k: {name: row[name] for name in kept} for k, row in best.items()}


def measure(args: argparse.Namespace, work: Work, chosen: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second with the chosen sets, static, on the held-out prompts one by one; {name: as measured_tau}."""
    drafters = {'plain': Autoregressive()}
    for k, row in chosen.items():
        skip = SkipConfig.of(work.cfg, **row['set'])
        drafters[k] = SkipDrafter(work.cfg, skip, row['block'])

    def timed(name: str) -> tuple[int, float]:
        made = [decode.generate(work.target, drafters[name], work.params, [prompt], max_new_tokens=args.size)
                for prompt in work.prompts]
        return sum(out.num_tokens - 1 for out in made), sum(out.decode_s for out in made)
    return diagnose.measured_tau(timed, list(drafters), args.measure)


def tiny_model() -> Loaded:
    cfg = ModelConfig('llama', 97, 32, 4, 96, AttentionConfig(4, 2, 8), MlpConfig(48))
    params = jax.tree.map(lambda a: np.asarray(1.5 * a), model.init_params(cfg, jax.random.key(0)))
    return Loaded(cfg, params, None, 'random', '')


def main(args: argparse.Namespace) -> dict[str, Any]:
    work = prepare(args)
    chosen = choose(search_all(args, work))
    if args.measure:
        for name, row in measure(args, work, chosen).items():
            chosen.setdefault(name, {})['measured'] = row
            print(f'{name:6} {row["tau"]:.1f} tokens/s, {row["speedup"]:.3f} of plain', flush=True)
    write(Path(args.out) / 'chosen.json', json.dumps(chosen, indent=1))
    return chosen


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(',')
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--out', default='out/rad_search')
    parser.add_argument('--k', type=words, default=['7', '15', 'free'], help='how many, and/or free')
    parser.add_argument('--methods', type=words, default=['leave_one_out', 'evenly', 'last', 'random', 'output_kl',
                                                          'greedy', 'tpe'])
    parser.add_argument('--mlp', action='store_true', help='MLPs may be left out, too (Draft & Verify)')
    parser.add_argument('--block', type=int, default=4, help='drafts a round, at most')
    parser.add_argument('--prompts', default='mt_bench')
    parser.add_argument('--count', type=int, default=12, help='prompts that are searched on')
    parser.add_argument('--held_out', type=int, default=24)
    parser.add_argument('--max_tokens', type=int, default=96, help='of a prompt')
    parser.add_argument('--size', type=int, default=48, help='tokens of a continuation')
    parser.add_argument('--dtype', default='float32', choices=('bfloat16', 'float32'))
    parser.add_argument('--trials', type=int, default=60, help='of random and tpe')
    parser.add_argument('--width', type=int, default=8, help='greedy tries so many for each place; 0: all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--costs', help='a costs.json of another run')
    parser.add_argument('--calibrate', action='store_true', help='time the steps: on a quiet machine')
    parser.add_argument('--measure', type=int, default=0, help='repeats (at least 3) of timed decoding; 0: none')
    parser.add_argument('--tiny', action='store_true', help='a random model of 4 layers')
    args = parser.parse_args(argv)
    if args.tiny:
        args.count, args.held_out, args.size, args.trials, args.block = 2, 2, 12, 6, 3
        args.k = ['2', 'free'] if args.k == parser.get_default('k') else args.k
    for name, known in (('methods', search.METHODS), ('k', None)):
        values = getattr(args, name)
        if bad := [v for v in values if not (v in known if known else v == 'free' or v.isdigit())]:
            parser.error(f'--{name}: unknown {bad[0]!r}')
    args.k = [None if k == 'free' else int(k) for k in args.k]
    return args


if __name__ == '__main__':
    main(parse())
