"""Quality against depth of early exit (m2r2/early_exit.py) and all its baselines, on a real model: rows, table, plot.

    python scripts/m2r2_tradeoff.py --config=m2r2_smollm2:exits --model=smollm2-135m --out=out/m2r2_tradeoff \\
        --methods fast=out/m2r2_smollm2_gates exit=out/m2r2_smollm2_deed_gates
    python scripts/m2r2_tradeoff.py --tiny --out=out/m2r2_tradeoff_tiny         # a random model, under a minute

A method is NAME=SOURCE: the directory of a run that trains gates or accelerators, or a folder of the zoo with
accelerators, and gates if it has them. Beside them stand 'none' (the untrained logit lens; with margin and copy_h as in
Schuster et al., 2022, arXiv 2207.07061) and falling schedules (as in Del Corro et al., 2023, arXiv 2307.02628; see
EarlyExitTarget). Held-out rows come from the data of --config. Their first --calibrate rows set thresholds
(m2r2/calibrate.py): quantiles of the scores for the sweep, and those with a bound on the risk for --targets; the next
--rows are measured:

    perplexity   of --steps tokens after --prompt tokens of text, one token at a time, the text given
    on text      share of those where the plain model's choice is chosen: what --targets bound, for exact states
    agreement    share of the plain model's own greedy tokens that are chosen, given the same tokens before
    divergence   first token at which free generation leaves the plain one's (--steps: none), mean over prompts
    layers       mean exit layer; equivalent: with fast stream, tests and unused unembeddings, in layers of the base
    ms           a token of free generation at batch 1, interleaved with plain decoding: median and quartiles of
                 --repeats prompts; 0: nothing is generated freely, no divergence and no times (a machine in use)

rows.jsonl has one line a point and is continued where it stops; statistics.json has speeds, alignment, calibration;
table.md and tradeoff.png are made of them at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import layout
from backbone.config import ModelConfig
from backbone.errors import RequestError
from backbone.model import PlainTarget, init_params
from harness import decode, models, stepwise
from harness.baselines import Autoregressive
from m2r2 import alignment, calibrate, exits, gate_task, gates, streams
from m2r2.config import M2R2Config
from m2r2.early_exit import EarlyExitTarget, falling_schedule
from m2r2.gates import GateConfig
from scripts.sweep import append, held_out, read_rows, settings_of, write

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the first exit's scores: shares of tokens that stay there
EVERY = 4  # one in so many positions chooses thresholds with a bound: neighbours are not independent
FILLS = ('defer', 'lerp', 'copy_h', 'copy_p', 'drop')


@dataclasses.dataclass
class Method:
    """m2r2: its accelerators, numpy arrays; gates: those that are trained, with parameters."""

    name: str
    m: M2R2Config
    m2r2: dict
    gates: dict[GateConfig, dict]


@dataclasses.dataclass
class Point:
    """One line of the table. thresholds: None beside a schedule."""

    key: str
    method: Method
    gate: GateConfig | None
    kv_fill: str
    thresholds: tuple[float, ...] | None = None
    schedule: tuple[int, ...] = ()
    note: str = ''


@dataclasses.dataclass
class Work:
    """What all points share. base: packed for decoding; text, greedy [rows, prompt + steps + 1]; plain: what the plain
    model has of each of them."""

    cfg: ModelConfig
    base: dict
    dtype: str
    prompt: int
    steps: int
    repeats: int
    text: np.ndarray
    greedy: np.ndarray
    plain: dict[str, Any]


# --- what is compared -------------------------------------------------------------------------------------------------


def method_of(name: str, source: str, cfg: ModelConfig, base_hash: str) -> Method:
    """Errors: RequestError where the source holds no accelerators, or of another base."""
    if models.is_workdir(models.split(source)[0]):
        task, params, _ = models.read_run(*models.split(source))
        if not hasattr(task, 'm2r2'):
            raise RequestError(f'{source} trains no accelerators')
        trained = {task.gate: params['m2r2_gates']} if hasattr(task, 'gate') else {}
        found = models.formats.params_hash(jax.tree.map(np.asarray, params['base']))
        method = Method(name, task.m2r2, params.get('m2r2', {}), trained)
    else:
        tree, card = gate_task.read_artefact(source)
        fields, early = gate_task.fields_of(card), card.get('early_exit')
        if fields is None:
            raise RequestError(f'{source}: the card does not say what accelerators these are')
        trained = {GateConfig.of(early['gate']): tree['m2r2_gates']} if early else {}
        mine = tree.get('m2r2', {}) if early else tree
        method, found = Method(name, M2R2Config.of(cfg, fields), mine, trained), card['base_hash']
    if found != base_hash:
        raise RequestError(f'{source}: trained on a base with parameters {found}, the model has {base_hash}')
    return method


def points_of(methods: list[Method], seen: dict[str, dict], fills: list[str], head: list[str], quantiles: list[float],
              targets: list[float], steps: int, schedules: int) -> list[Point]:
    """Every fill for the first gate of each method, 'defer' (untrained: 'copy_h') for the others; then schedules."""
    points = []
    for method in methods:
        kinds = [*method.gates, *map(GateConfig, head)]
        for i, gate in enumerate(kinds):
            scores, agrees = seen[method.name][f'score:{gate.kind}'], seen[method.name]['agreement']
            chosen = {f'q{q:g}': (float(np.quantile(scores[0], q)),) * len(scores) for q in quantiles}
            for target in targets:
                found = calibrate.per_exit(scores[:, ::EVERY], agrees[:, ::EVERY], method.m.exits, method.m.num_layers,
                                           target=target)
                chosen[f'target{target:g}'] = found.thresholds
            alone = 'copy_h' if method.m.stream == 'none' else 'defer'
            for fill in fills if i == 0 else [alone]:
                points += [Point(f'{method.name}/{gate.kind}/{fill}/{label}', method, gate, fill, thresholds)
                           for label, thresholds in chosen.items()]
        ends = (*method.m.exits, method.m.num_layers)
        falls = [(ends[-1], end) for end in ends[:-1]] + [(end, end) for end in ends[:-1]]
        for first, last in falls[:schedules]:
            points.append(Point(f'{method.name}/schedule/drop/{first}-{last}', method, None, 'drop',
                                schedule=falling_schedule(method.m, steps, first, last)))
    return points


# --- before the sweep: statistics and calibration ---------------------------------------------------------------------


def look(cfg: ModelConfig, method: Method, head: list[str], base: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of alignment.at_exits, positions of all rows: [J, n]."""
    trained = method.gates | {GateConfig(kind): {} for kind in head}
    mine = jax.device_put(method.m2r2)
    of = jax.jit(lambda base, mine, params, row: alignment.at_exits(
        cfg, method.m, base, mine, row[None], dict(zip(trained, params, strict=True))))
    found = [of(base, mine, list(trained.values()), row) for row in rows]
    return {name: np.concatenate([np.asarray(part[name])[:, 0] for part in found], axis=1) for name in found[0]}


def calibrated(method: Method, seen: dict[str, np.ndarray]) -> tuple[Method, dict[str, np.ndarray]]:
    """Trained gates so scaled that a score is a rate of agreement, fitted on the first half of the positions."""
    gates_of, seen = dict(method.gates), dict(seen)
    for gate, params in method.gates.items():
        scores, agrees, scaled = seen[f'score:{gate.kind}'], seen['agreement'], []
        half = scores.shape[1] // 2
        params = dict(params)
        for j in range(len(scores)):
            scale, bias = calibrate.fit_scale(scores[j, :half], agrees[j, :half])
            params[f'exit_{j + 1}'] = calibrate.fold(params[f'exit_{j + 1}'], scale, bias)
            scaled.append(calibrate.scaled(scores[j], scale, bias))
        gates_of[gate], seen[f'score:{gate.kind}'] = params, np.stack(scaled)
    seen = {name: value[:, value.shape[1] // 2:] for name, value in seen.items()}  # what nothing was fitted on
    return dataclasses.replace(method, gates=gates_of), seen


def summary(method: Method, seen: dict[str, np.ndarray], targets: list[float]) -> dict[str, Any]:
    """By exit: alignment; by gate: ranking, reliability, and thresholds with their bound."""
    by_exit = lambda name: [float(value) for value in seen[name].mean(1)]
    found: dict[str, Any] = {'exits': method.m.exits, 'stream': method.m.stream,
                             'rates': [method.m.rate(j) for j in range(len(method.m.exits))],
                             **{name: by_exit(name) for name in ('align', 'agreement', 'overlap')}, 'gates': {}}
    for name in seen:
        if name.startswith('score:'):
            scores, agrees = seen[name], seen['agreement']
            tables = [calibrate.reliability(*pair) for pair in zip(scores, agrees, strict=True)]
            limits = [calibrate.per_exit(scores[:, ::EVERY], agrees[:, ::EVERY], method.m.exits, method.m.num_layers,
                                         target=target).to_dict() for target in targets]
            found['gates'][name.removeprefix('score:')] = {
                'auc': [calibrate.auc(*pair) for pair in zip(scores, agrees, strict=True)],
                'reliability': [rows for rows, _ in tables], 'calibration_error': [error for _, error in tables],
                'calibrated': limits}
    return found


# --- a point ----------------------------------------------------------------------------------------------------------


def forced(target: Any, params: dict, tokens: np.ndarray, prompt: int) -> tuple[Any, float, np.ndarray]:
    """Rows [B, S], one token at a time after the first `prompt`: (cache, perplexity, choices [B, S - prompt - 1])."""
    starts, steps = np.full(len(tokens), prompt + 1), tokens.shape[1] - prompt - 1
    cache, logprobs, choices = stepwise.forced(target, params, tokens, starts, prompt, steps)
    return cache, float(np.exp(-np.mean(logprobs))), np.asarray(choices)


def generate(work: Work, target: Any, params: dict, row: int) -> tuple[list[int], float]:
    """(tokens, ms a token) of free generation from a prompt of the text, batch 1."""
    found = decode.generate(target, Autoregressive(), params, [work.text[row, :work.prompt].tolist()],
                            max_new_tokens=work.steps)
    return found.tokens[0], 1e3 / max(found.tokens_per_s, 1e-9)


def measure(work: Work, point: Point) -> dict[str, Any]:
    """One line of rows.jsonl."""
    method = point.method
    target = EarlyExitTarget(work.cfg, method.m, point.gate, () if point.schedule else (0.5,) * len(method.m.exits),
                             kv_fill=point.kv_fill, cache_dtype=work.dtype, stacked=False, schedule=point.schedule)
    params = {'base': work.base, 'm2r2': exits.pack(method.m, method.m2r2, work.base, jnp.dtype(work.dtype)),
              'm2r2_gates': jax.tree.map(jnp.asarray, method.gates.get(point.gate, {}))}
    if point.thresholds is not None:
        params['thresholds'] = jnp.asarray(point.thresholds)
    cache, perplexity, choices = forced(target, params, work.text, work.prompt)
    seen = target.statistics(cache)
    cache, _, own = forced(target, params, work.greedy, work.prompt)
    seen_own = target.statistics(cache)
    plain_target = PlainTarget(work.cfg, work.dtype, stacked=False)
    times, plain_times, diverged = [], [], []
    for i in range(-1, work.repeats) if work.repeats else ():  # the first compiles
        row = max(i, 0) % len(work.text)
        plain, plain_ms = generate(work, plain_target, {'base': work.base}, row)
        tokens, ms = generate(work, target, params, row)
        if i >= 0:
            times, plain_times = [*times, ms], [*plain_times, plain_ms]
            diverged.append(next((t for t, pair in enumerate(zip(tokens, plain, strict=True)) if len(set(pair)) > 1),
                                 work.steps))
    quartiles = lambda found: [float(q) for q in np.quantile(found, (0.5, 0.25, 0.75))] if found else None
    return {'key': point.key, 'method': method.name, 'stream': method.m.stream,
            'gate': point.gate.kind if point.gate else 'schedule', 'kv_fill': point.kv_fill,
            'thresholds': point.thresholds, 'schedule': point.schedule,
            'perplexity': perplexity, 'plain_perplexity': work.plain['perplexity'],
            'text_agreement': float(np.mean(choices == work.plain['choices'])),
            'agreement': float(np.mean(own == work.greedy[:, work.prompt + 1:])),
            'divergence': float(np.mean(diverged)) if diverged else None, 'layers': seen['mean_exit_layer'],
            'equivalent_layers': seen['equivalent_layers'], 'generation_layers': seen_own['mean_exit_layer'],
            'exits': seen['exits'], 'ms': quartiles(times), 'plain_ms': quartiles(plain_times)}


def prepare(cfg: ModelConfig, base: dict, dtype: str, prompt: int, steps: int, repeats: int, text: np.ndarray) -> Work:
    """base: packed. text [rows, prompt + steps + 1]."""
    target = PlainTarget(cfg, dtype, stacked=False)
    _, perplexity, choices = forced(target, {'base': base}, text, prompt)
    found = decode.generate(target, Autoregressive(), {'base': base}, text[:, :prompt].tolist(),
                            max_new_tokens=steps + 1)
    greedy = np.concatenate([text[:, :prompt], np.array(found.tokens, np.int32)], axis=1)
    return Work(cfg, base, dtype, prompt, steps, repeats, text, greedy,
                {'perplexity': perplexity, 'choices': choices})


# --- what is written --------------------------------------------------------------------------------------------------


def table(rows: list[dict], num_layers: int) -> str:
    lines = [f'Plain: {num_layers} layers, perplexity {rows[0]["plain_perplexity"]:.3f}.', '',
             '| method | gate | kv_fill | thresholds | perplexity | on text | agreement | divergence | layers | '
             'equivalent | ms (quartiles) | plain ms | speed-up |', '|---' * 13 + '|']
    for row in rows:
        setting = row['key'].rsplit('/', 1)[1]
        if row['thresholds']:
            setting += ': ' + ', '.join(f'{t:.3g}' for t in row['thresholds'])
        ms, plain = row['ms'], row['plain_ms']
        diverges, timed = '-', '- | - | -'
        if ms:
            diverges = f'{row["divergence"]:.1f}'
            timed = f'{ms[0]:.2f} ({ms[1]:.2f}-{ms[2]:.2f}) | {plain[0]:.2f} | {plain[0] / ms[0]:.2f}'
        lines.append(f'| {row["method"]} | {row["gate"]} | {row["kv_fill"]} | {setting} | {row["perplexity"]:.3f} | '
                     f'{row["text_agreement"]:.3f} | {row["agreement"]:.3f} | {diverges} | '
                     f'{row["layers"]:.2f} | {row["equivalent_layers"]:.2f} | {timed} |')
    return '\n'.join(lines) + '\n'


def axes_of(timed: bool) -> list[tuple[Callable[[dict], float], str, str]]:
    """(x, name of y, label of x) of each panel."""
    panels = [(lambda row: row['layers'], 'perplexity', 'mean exit layer'),
              (lambda row: row['equivalent_layers'], 'agreement', 'equivalent layers'),
              (lambda row: row['ms'][0] / row['plain_ms'][0], 'agreement', 'time a token, plain = 1')]
    return panels if timed else panels[:2]


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    timed = rows[0]['ms'] is not None
    figure, axes = pyplot.subplots(1, 2 + timed, figsize=(17 if timed else 12, 5))
    for name in dict.fromkeys(row['key'].rsplit('/', 1)[0] for row in rows):
        mine = [row for row in rows if row['key'].rsplit('/', 1)[0] == name]
        for axis, (x, y, _) in zip(axes, axes_of(timed), strict=True):
            ordered = sorted(mine, key=x)
            axis.plot([x(r) for r in ordered], [r[y] for r in ordered], marker='o', markersize=3, label=name,
                      linestyle='--' if 'schedule' in name else '-')
            axis.set_ylabel(y)
    for axis, (_, _, label) in zip(axes, axes_of(timed), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].axhline(rows[0]['plain_perplexity'], color='black', linewidth=0.8)
    axes[0].set_yscale('log')
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- the run ----------------------------------------------------------------------------------------------------------


def real(args: argparse.Namespace) -> tuple[ModelConfig, dict, list[Method], np.ndarray]:
    """(config, stacked base, methods, held-out rows [calibrate + rows, S])."""
    loaded = models.load(args.model)
    sources = dict(spec.split('=', 1) for spec in args.methods)
    methods = [method_of(name, source, loaded.config, loaded.base_hash) for name, source in sources.items()]
    return loaded.config, loaded.params, methods, held_out(args.config, args.calibrate + args.rows)


def tiny(args: argparse.Namespace) -> tuple[ModelConfig, dict, list[Method], np.ndarray]:
    """A random model with random accelerators and gates, random tokens."""
    from configs import training

    cfg = ModelConfig.from_dict(training.llama(vocab=97, hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48,
                                               max_seq_len=64))
    base = jax.jit(lambda key: jax.tree.map(lambda a: 1.5 * a, init_params(cfg, key)))(jax.random.key(0))
    m, gate = M2R2Config.of(cfg, {'exits': (1, 2), 'rank': 4}), GateConfig('arla_depth', 8)
    mine = streams.init_params(m, cfg, jax.random.key(1))
    mine['layers']['adapter']['b']['kernel'] = 0.1 * jax.random.normal(jax.random.key(2), (2, 4, 32))
    tokens = np.random.default_rng(0).integers(0, 97, (args.calibrate + args.rows, 32)).astype(np.int32)
    return cfg, base, [Method('fast', m, mine, {gate: gates.init_params(gate, m, jax.random.key(3))})], tokens


def main(args: argparse.Namespace) -> list[dict]:
    """Errors: RequestError, also where --out belongs to other settings."""
    out, settings = Path(args.out), settings_of(args)
    cfg, base, methods, rows = tiny(args) if args.tiny else real(args)
    if rows.shape[1] < args.prompt + args.steps + 1:
        raise RequestError(f'rows have {rows.shape[1]} tokens, --prompt + --steps + 1 are needed')
    write(out / 'settings.json', json.dumps(settings, indent=1) + '\n')
    base = jax.device_put(base)
    untrained = methods[0].m if methods else M2R2Config.of(cfg, {'exits': 2})
    methods.append(Method('none', dataclasses.replace(untrained, stream='none', qo_rank=0), {}, {}))

    speed = jax.jit(lambda base, row: alignment.velocity(cfg, base, row[None]))
    speeds = [speed(base, row) for row in rows[:min(8, args.calibrate)]]
    statistics = {'velocity': {name: np.mean([np.asarray(part[name]).mean((1, 2)) for part in speeds], 0).tolist()
                               for name in speeds[0]}, 'methods': {}}
    seen = {}
    for i, method in enumerate(methods):
        methods[i], seen[method.name] = calibrated(method, look(cfg, method, args.gates, base, rows[:args.calibrate]))
        statistics['methods'][method.name] = summary(methods[i], seen[method.name], args.targets)
    write(out / 'statistics.json', json.dumps(statistics, indent=1) + '\n')

    work = prepare(cfg, layout.pack(base, jnp.dtype(args.dtype)), args.dtype, args.prompt, args.steps, args.repeats,
                   rows[args.calibrate:, :args.prompt + args.steps + 1])
    found = read_rows(out / 'rows.jsonl')
    done = {row['key'] for row in found}
    for point in points_of(methods, seen, args.fills, args.gates, args.quantiles, args.targets, args.steps,
                           args.schedules):
        if point.key not in done:
            found.append(append(out / 'rows.jsonl', measure(work, point)))
            print(f'{point.key}: perplexity {found[-1]["perplexity"]:.3f}, agreement {found[-1]["agreement"]:.3f}, '
                  f'layers {found[-1]["layers"]:.2f}, ms {found[-1]["ms"]} (plain {found[-1]["plain_ms"]})', flush=True)
    write(out / 'table.md', table(found, cfg.num_layers))
    plot(found, out / 'tradeoff.png')
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--tiny', action='store_true', help='a random model, small sizes')
    parser.add_argument('--config', default='m2r2_smollm2:exits', help='module of configs/ whose held-out data is used')
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--methods', nargs='*', default=[], help='NAME=run directory or folder of the zoo')
    parser.add_argument('--gates', nargs='*', default=['margin'], choices=gates.HEAD, help='beside the trained ones')
    parser.add_argument('--fills', nargs='+', default=list(FILLS), choices=FILLS)
    parser.add_argument('--quantiles', nargs='*', type=float, default=list(QUANTILES))
    parser.add_argument('--targets', nargs='*', type=float, default=[0.9, 0.95], help='agreement to bound')
    parser.add_argument('--schedules', type=int, default=100, help='so many for each method, at most')
    parser.add_argument('--calibrate', type=int, default=64, help='rows')
    parser.add_argument('--rows', type=int, default=16)
    parser.add_argument('--prompt', type=int, default=32)
    parser.add_argument('--steps', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    args = parser.parse_args(argv)
    if args.tiny:
        args.gates, args.fills, args.quantiles, args.targets = ['margin'], ['copy_h'], [0.5], [0.5]
        args.calibrate, args.rows, args.prompt, args.steps, args.repeats, args.schedules = 8, 2, 6, 8, 2, 1
    return args


if __name__ == '__main__':
    main(parse())
