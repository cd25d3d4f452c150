"""What an expert cache and its predictor are worth, by the simulator: ms a token against the share of experts cached.

    python scripts/expert_simulation.py --out out/expert_simulation                       # a synthetic trace
    python scripts/expert_simulation.py --trace out/moe/routing.npz --case olmoe-pcie4

Times come from bytes and stated bandwidths (configs/expert_hardware.py), or from --times: nothing is measured here. The
trace is a recorded one (m2r2/expert_traces.py says how it is kept), or a synthetic one of the model's shape, which no
model made. A recorded trace of another shape brings its own layers and experts; an expert's size stays the model's.
Writes one table and one plot a case; all four take a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import HeadwayError
from backbone.presets import PRESETS
from configs.expert_hardware import CASES
from m2r2 import expert_sim, expert_times, recall
from m2r2 import expert_traces as traces
from m2r2.eviction import EVICTIONS
from m2r2.expert_cache import CacheConfig

HEADER = ('cached', 'slots', 'eviction', 'predictor', 'hit', 'late', 'demand', 'MB a token', 'of it wasted',
          'stall, ms a token', 'ms a token', 'on demand / this')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--case', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--trace', type=Path, help='.npz; default: a synthetic one')
    parser.add_argument('--tokens', type=int, default=48, help='of a synthetic trace, or the first of a recorded one')
    parser.add_argument('--stay', type=float, default=0.3, help='synthetic: chance that an expert stays')
    parser.add_argument('--skew', type=float, default=0.5, help='synthetic: how uneven experts are')
    parser.add_argument('--recall', type=float, nargs='*', default=[0.6, 0.9], help='synthetic: made-up predictors')
    parser.add_argument('--shares', type=float, nargs='+', default=[0.12, 0.25, 0.5, 0.75], help='of all experts')
    parser.add_argument('--evictions', nargs='+', choices=list(EVICTIONS), default=list(EVICTIONS))
    parser.add_argument('--leads', type=int, default=2, help='layers looked ahead')
    parser.add_argument('--extra', type=int, help='predictions beside experts_per_token; default half as many')
    parser.add_argument('--times', type=float, nargs=3, metavar=('ATTENTION', 'EXPERTS', 'COPY'),
                        help='measured ms: a layer up to its router, its experts, one copy')
    parser.add_argument('--warmup', type=int, default=8, help='tokens that fill the cache and do not count')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('out/expert_simulation'))
    return parser.parse_args(argv)


def load(args, moe, layers: int):
    """(ids, num_experts, made by predictor name, what the trace is)."""
    if args.trace is None:
        experts, count = moe.num_experts, moe.experts_per_token
        ids = traces.synthetic(args.tokens, layers, experts, count, args.stay, args.skew, args.seed)
        what = f'synthetic trace (no model made it): stay {args.stay}, skew {args.skew}, seed {args.seed}'
        said = {}
    else:
        ids, experts, said = traces.load(args.trace)
        ids, count = ids[:args.tokens], ids.shape[2]
        said = {name: made[:args.tokens, :, :args.leads] for name, made in said.items()}
        what = f'trace {args.trace.name}'
    budget = min(count + (count // 2 if args.extra is None else args.extra), experts)
    made = {'none': None, 'random': traces.random(ids, experts, budget, args.leads, args.seed),
            'frequency': traces.frequency(ids, experts, budget, args.leads),
            'previous token': traces.previous(ids, experts, budget, args.leads)}
    if args.trace is None:
        made |= {f'made up, recall {r:g}': traces.noisy(ids, experts, budget, r, args.leads, args.seed)
                 for r in args.recall}
    return ids, experts, {**made, **said, 'oracle': traces.oracle(ids, args.leads)}, budget, what


def run(args, name: str) -> tuple[list[str], list[dict], dict[str, float]]:
    """(the lines of the report, a point of the plot each row, the two bounds in ms a token)."""
    case = dict(CASES[name])
    cfg = PRESETS[case.pop('model')]
    ids, experts, made, budget, what = load(args, cfg.moe, cfg.num_layers)
    wanted, layers = ids.shape[2], ids.shape[1]
    times = expert_times.times(cfg, **case, experts=wanted)
    if args.times:
        times = expert_sim.Times(*(ms / 1e3 for ms in args.times))
    size = int(expert_times.expert_scalars(cfg) * case['item_bytes'])

    def cache(slots, eviction='lru'):
        return CacheConfig(layers, experts, wanted, slots, eviction=eviction, expert_bytes=size)
    here = expert_sim.resident(ids, times, args.warmup)
    asked = expert_sim.simulate(ids, times, cache(wanted), keep=False, warmup=args.warmup)
    lines = [f'## {name}', '',
             f'{what}; {ids.shape[0]} tokens, the first {args.warmup} not counted, {layers} layers, {experts} experts, '
             f'{wanted} a token, {budget} predicted, up to {args.leads} layers ahead. '
             f'{"Given" if args.times else "From bytes and stated bandwidths"}: '
             f'{1e3 * times.attention:.4f} ms a layer up to its router, {1e3 * times.experts:.4f} its experts, '
             f'{1e3 * times.copy:.4f} a copy of {size / 1e6:.1f} MB. All resident: {here.ms_per_token:.3f} ms a token; '
             f'on demand, nothing kept: {asked.ms_per_token:.3f}.', '']
    lines += recall_table(ids, made, budget) + ['', *row(HEADER), '|---' * len(HEADER) + '|']
    points = []
    for share in args.shares:
        slots = max(round(share * layers * experts), wanted)
        for eviction in args.evictions:
            for predictor, array in made.items():
                got = expert_sim.simulate(ids, times, cache(slots, eviction), array, budget=budget, warmup=args.warmup)
                points.append(dict(share=slots / (layers * experts), eviction=eviction, predictor=predictor,
                                   ms=got.ms_per_token))
                lines += row((f'{slots / (layers * experts):.0%}', slots, eviction, predictor,
                              *(f'{n / got.requests:.3f}' for n in (got.hits, got.late, got.demand)),
                              f'{got.bytes_moved / got.tokens / 1e6:.1f}', f'{got.wasted_bytes / got.tokens / 1e6:.1f}',
                              f'{1e3 * got.stall / got.tokens:.3f}', f'{got.ms_per_token:.3f}',
                              f'{asked.total / got.total:.2f}'))
    return [*lines, ''], points, {'all resident': here.ms_per_token, 'on demand, nothing kept': asked.ms_per_token}


def row(cells) -> list[str]:
    return ['| ' + ' | '.join(map(str, cells)) + ' |']


def recall_table(ids, made: dict, budget: int) -> list[str]:
    known = {name: array for name, array in made.items() if array is not None}
    leads = max(array.shape[2] for array in known.values())
    lines = row((f'recall at {ids.shape[2]} / {budget}, by lead', *range(1, leads + 1))) + ['|---' * (leads + 1) + '|']
    for name, both in recall.table(ids, known, (ids.shape[2], budget)).items():
        cells = [f'{a:.3f} / {b:.3f}' for a, b in both.T]
        lines += row((name, *cells, *[''] * (leads - len(cells))))
    return lines


def plot(name: str, points: list[dict], bounds: dict[str, float], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    evictions = list(dict.fromkeys(p['eviction'] for p in points))
    figure, axes = pyplot.subplots(1, len(evictions), figsize=(5 * len(evictions), 4.5), sharey=True, squeeze=False)
    for axis, eviction in zip(axes[0], evictions, strict=True):
        for predictor in dict.fromkeys(p['predictor'] for p in points):
            mine = [p for p in points if (p['eviction'], p['predictor']) == (eviction, predictor)]
            axis.plot([100 * p['share'] for p in mine], [p['ms'] for p in mine], marker='o', markersize=3,
                      label=predictor)
        for (label, ms), style in zip(bounds.items(), (':', '--'), strict=True):
            axis.axhline(ms, color='black', linestyle=style, linewidth=1, label=label)
        axis.set(title=f'{name}, {eviction}', xlabel='% of all experts in slots')
    axes[0, 0].set(ylabel='ms a token (simulated)', yscale='log')
    axes[0, -1].legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130, bbox_inches='tight')
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in args.case:
        found, points, bounds = run(args, name)
        lines += found
        plot(name, points, bounds, args.out / f'{name}.png')
    (args.out / 'table.md').write_text('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    try:
        main()
    except HeadwayError as e:
        sys.exit(f'error: {e}')
