"""The side-by-side run: every method decodes the same prompts in one process, by turns, and the result says what paid.

A config names the methods by dotted path; nothing here knows one. The course of a run:

    every row decodes every prompt once         outputs, compilation, and a warm-up
    every output against plain decoding's       identical rate; each first difference checked for a near-tie
    `repeats` times, in rotated order           floor, decode, T(k), draft, verification: all see the same machine
    rows, verdicts                              harness/results.py is the shape

The plain rows are those whose drafter has block 0 and whose target is exact. A speed-up is the median over repeats of
the ratio to the fastest plain row of the same dtype and batch *in the same repeat*. A row may decode another model, of
the same tokenizer: its output is held against plain decoding of that model, its speed against the compared one's.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from backbone.errors import ConfigError
from harness import artefacts, drafters, provenance, roofline, steps, subjects
from harness.bandwidth import Meter
from harness.bench import Bench, Work, first_run, generate, state_after_prefill, timed_run
from harness.components import build
from harness.prompts import Prompt, questions, random_prompts
from harness.results import SCHEMA, CurvePoint, Floor, Results, Spread
from harness.rows import make_row, notes
from harness.subjects import Subject

DTYPES = ('float32', 'bfloat16')
PLAIN = 'backbone.model.PlainTarget'  # of a row that names no target: then what decodes its model
STEPWISE = 'harness.baselines.Autoregressive'


def run(config: Any, *, progress: bool = True) -> Results:
    """Runs the comparison `config` describes (configs/compare.py lists every key). Nothing is written.

    Errors: ConfigError names an unknown model, method path, dtype or a batch without a plain row.
    """
    started = time.perf_counter()
    check(config)
    models = subjects.load(config)
    cfg, tokenizer = models[''].loaded.config, models[''].loaded.tokenizer
    prompts = load_prompts(config, cfg.vocab_size, tokenizer)
    work = Work(prompts, tuple(tokenizer.eos_ids) if tokenizer is not None else (), config.max_new_tokens, config.seed)
    benches = make_benches(config, models, len(prompts))
    weight_bytes = {d: int(roofline.step_cost(cfg, dtype=d).weight_bytes) for d in config.dtypes}

    ahead = 2 * len(benches) + len(config.dtypes) * len(config.curve) + 1 + config.repeats * sum(
        b.timed for b in benches)
    with tqdm(total=ahead, disable=not progress, bar_format='{l_bar}{bar}| {elapsed} {desc}') as bar:
        def tick(text):
            bar.set_description_str(text)
            bar.update()
        together([(f'compiled {b.name}', functools.partial(first_run, b, work)) for b in benches], tick)
        plain_out = {name: plain_outputs([b for b in benches if b.model == name], work) for name in models}
        curve = curve_points(config, benches, work, tick)
        together([(f'compiled the parts of {b.name}', functools.partial(prepare_steps, b, work, config, curve))
                  for b in benches], tick)
        meter = Meter(weight_bytes, min_buffer_bytes=config.floor_buffer_bytes)
        tick('measured the bandwidth')
        floors, parts = measure(config, benches, work, meter, curve, tick)

    floor = {d: Floor(meter.source, meter.note, meter.threads, weight_bytes[d], spread := Spread.of(floors[d]),
                      meter.floor_ms(d, spread.median)) for d in config.dtypes}
    ties = {name: subject.ties for name, subject in models.items()}
    rows = [make_row(config, bench, benches, plain_out[bench.model], floor, parts, ties[bench.model], prompts,
                     models[bench.model].quality) for bench in benches]
    shared = provenance.collect(config)
    spreads = {key: Spread.of([1e3 * t for t in point.times]) for key, point in curve.items()}
    points = [CurvePoint(d, k, point.context, spreads[d, k], spreads[d, k].median / spreads[d, 1].median)
              for (d, k), point in curve.items()]
    return Results(
        schema=SCHEMA, command=shared['command'], config=config.to_dict(), versions=shared['versions'],
        device=shared['device'], git=shared['git'], rows=rows, floor=floor, curve=points,
        model=models[''].describe() | {'others': {n: s.describe() for n, s in models.items() if n}},
        prompts=[{'name': p.name, 'tokens': len(p.ids), 'plain_output': plain_out[''].get(i, [])}
                 for i, p in enumerate(prompts)],
        notes=notes(config, meter, rows), seed=config.seed, wall_s=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------
# What the config asks for


def check(config: Any) -> None:
    """Errors: ConfigError for values no run can start from."""
    for name in ('repeats', 'max_new_tokens'):
        if config[name] < 1:
            raise ConfigError(f'{name} must be at least 1, got {config[name]}')
    unknown = [d for d in config.dtypes if d not in DTYPES]
    if unknown or not config.dtypes:
        raise ConfigError(f'dtypes: {unknown or "none given"}, known are {", ".join(DTYPES)}')
    if not config.methods:
        raise ConfigError('methods: none given')
    if 1 not in config.curve:
        raise ConfigError('curve must contain 1: every point is a ratio to it')
    task = config.get('quality', {}).get('task', '')
    if task and not task.startswith('ppl:'):
        raise ConfigError(f'quality.task: {task!r} is not ppl:TEXT')
    for name, spec in config.methods.items():
        if spec.mode not in ('lossless', 'approximate'):
            raise ConfigError(f'methods.{name}.mode: unknown {spec.mode!r}')


def load_prompts(config: Any, vocab_size: int, tokenizer: Any) -> list[Prompt]:
    p = config.prompts
    limits = {'min_tokens': p.min_tokens, 'max_tokens': p.max_tokens}
    if p.source == 'random':
        return random_prompts(p.count, vocab_size, seed=config.seed, **limits)
    if tokenizer is None:
        raise ConfigError(f'prompts.source {p.source!r} needs a model with a tokenizer; a random one takes random')
    return questions(p.source, p.count, tokenizer, **limits)


def make_benches(config: Any, models: dict[str, Subject], num_prompts: int) -> list[Bench]:
    """Rows to run: timed at batch_sizes in every dtype, then identity only at identity_batch_sizes in float32."""
    plan = [(d, b, True) for b in config.batch_sizes for d in config.dtypes]
    plan += [('float32', b, False) for b in config.identity_batch_sizes if 'float32' in config.dtypes]
    benches = []
    for dtype, batch, timed in plan:
        if batch > num_prompts:
            raise ConfigError(f'batch size {batch} needs as many prompts, prompts.count is {num_prompts}')
        groups = [list(range(i, i + batch)) for i in range(0, num_prompts - batch + 1, batch)][:config.max_groups]
        row_start = len(benches)
        for name, spec in config.methods.items():
            subject = models[spec.get('model', '')]
            loaded, params = subject.loaded, dict(subject.params[dtype])
            given = {'cfg': loaded.config, 'stacked': False, 'cache_dtype': config.cache_dtypes[dtype]}
            found = spec.get('artefact') and spec.drafter != 'artefact' and artefacts.find_target(
                spec.artefact, loaded.base_hash, given['cache_dtype'], spec.target_kwargs)
            if found:
                target = found[0]
            elif spec.target == PLAIN:
                target = subjects.target_of(subject, spec, given['cache_dtype'])
            else:
                target = build(spec.target, spec.target_kwargs, given, f'methods.{name}.target')
            if spec.get('artefact') and not found:
                drafter, ready = artefacts.find(spec.artefact, loaded.config, loaded.base_hash, spec.kwargs)
                params |= ready(params['base'], dtype)
            else:
                drafter = build(spec.drafter or STEPWISE, spec.kwargs, given, f'methods.{name}.drafter')
                drafters.check(drafter, loaded)
            params |= found[1](params['base'], dtype) if found else {}
            if spec.params:
                params |= build(spec.params, {}, {'cfg': loaded.config, 'base': params['base'], 'dtype': dtype},
                                f'methods.{name}.params')
            benches.append(Bench(name, spec, dtype, batch, timed, target, drafter, params, groups,
                                 spec.get('model', '')))
        # A ConfigDict sorts its keys; the baseline goes first.
        benches[row_start:] = sorted(benches[row_start:], key=lambda b: not b.plain)
    for dtype, batch, _ in plan:
        if not any(b.plain for b in benches if (b.dtype, b.batch) == (dtype, batch)):
            raise ConfigError('methods: no plain row (a drafter of block 0 on an exact target) to compare with')
    stepwise = {b.model for b in benches if b.stepwise}
    for bench in benches:
        if bench.model not in stepwise:
            raise ConfigError(f'methods.{bench.method}: no row decodes {bench.model} plainly, to hold this one against')
    return benches


# ---------------------------------------------------------------------------------------------------------------
# Decoding and timing


def together(jobs: list[tuple[str, Callable[[], None]]], tick: Callable[[str], None]) -> None:
    """Runs jobs that mostly compile, two at a time: one compilation does not fill two cores. The first runs alone, so
    that whatever is built once a process is there for the rest. Nothing that is timed for a result may run here."""
    name, job = jobs[0]
    job()
    tick(name)
    with futures.ThreadPoolExecutor(2) as pool:
        waiting = {pool.submit(job): name for name, job in jobs[1:]}
        try:
            for done in futures.as_completed(waiting):
                done.result()
                tick(waiting[done])
        finally:
            pool.shutdown(cancel_futures=True)


def plain_outputs(benches: list[Bench], work: Work) -> dict[int, list[int]]:
    """Plain output at batch 1 by prompt, in float32 where that is run: what every float32 row of the benches' model is
    held against."""
    plain = min((b for b in benches if b.stepwise), key=lambda b: (b.dtype != 'float32', b.batch))
    found = dict(plain.outputs)
    for i in sorted({i for b in benches for i in b.outputs} - set(found)):
        found[i] = generate(plain, work, [i]).tokens[0]
    return found


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the curve T(k) while it is being measured."""

    target: Any
    context: int
    timer: steps.Timer
    times: list[float] = dataclasses.field(default_factory=list)


def curve_points(config: Any, benches: list[Bench], work: Work, tick: Callable[[str], None]) -> dict:
    """{(dtype, k): Point}: a forward of k tokens behind a prompt, on the plain target at batch 1."""
    found, jobs = {}, []
    for dtype in config.dtypes:
        bench = next((b for b in benches if b.plain and b.dtype == dtype and b.batch == 1), None)
        if bench is None:
            continue
        cache = state_after_prefill(bench, work).cache
        context = int(cache.pos[0])

        def add(dtype, k, bench, cache, context):
            tokens = jnp.resize(cache.tokens[:, :context + 1], (1, k))
            timer = steps.forward_timer(bench.target, bench.params, cache, tokens)
            found[dtype, k] = Point(bench.target, context, timer)

        room = cache.tokens.shape[1] - 1 - context
        for k in (k for k in sorted(set(config.curve)) if k <= room):
            jobs.append((f'compiled a forward of {k} tokens in {dtype}',
                         functools.partial(add, dtype, k, bench, cache, context)))
    if jobs:
        together(jobs, tick)
    return dict(sorted(found.items(), key=lambda item: (config.dtypes.index(item[0][0]), item[0][1])))


def prepare_steps(bench: Bench, work: Work, config: Any, curve: dict) -> None:
    """Counts the bytes of a round, and where the row is timed makes the timers of its draft and its verification."""
    if bench.by_host:
        return
    state = state_after_prefill(bench, work)
    drafter, target = bench.drafter, bench.target
    bench.bytes_per_round = sum(steps.round_bytes(target, drafter, bench.params, state.cache, state.drafter))
    bench.kv_bytes_per_token, bench.kv_bytes_formula = steps.kv_bytes(target, state.cache)
    if not (bench.timed and config.time_parts):
        return
    cache, resume = state.cache, None
    tokens = cache.pending[:, None]
    if drafter.block:
        bench.timers['draft'] = steps.draft_timer(drafter, bench.params, cache, state.drafter)
        cache, _, draft = steps.copy(bench.timers['draft'].carry)
        tokens, resume = jnp.concatenate([tokens, draft.tokens], axis=1), draft.resume
    point = None if bench.model else curve.get((bench.dtype, drafter.block + 1))
    if point and point.target == target and bench.batch == 1 and resume is None and not drafter.needs:
        bench.timers['verify'] = point.timer
    else:
        bench.timers['verify'] = steps.forward_timer(target, bench.params, cache, tokens, resume, drafter.needs)


def measure(config: Any, benches: list[Bench], work: Work, meter: Meter, curve: dict,
            tick: Callable[[str], None]) -> tuple[dict, dict]:
    """The interleaved repeats. Fills benches and curve with their times; returns the floors {dtype: [bytes/s]} and the
    times of each row's parts {id(bench): {part: [s]}}."""
    floors: dict[str, list[float]] = {d: [] for d in config.dtypes}
    parts = {id(b): {part: [] for part in b.timers} for b in benches}
    timed = [b for b in benches if b.timed]
    for repeat in range(config.repeats):
        sample = functools.cache(lambda timer: timer())  # a row may share its timer with the curve
        order = timed[repeat % len(timed):] + timed[:repeat % len(timed)]
        for bench in order:
            floor = [meter.measure(bench.dtype).bytes_per_s for _ in range(2)]
            timed_run(bench, work)
            floor += [meter.measure(bench.dtype).bytes_per_s for _ in range(2)]
            floors[bench.dtype] += floor
            bench.floor_s.append(meter.weight_bytes[bench.dtype] / statistics.median(floor))
            for part, timer in bench.timers.items():
                parts[id(bench)][part].append(sample(timer))
            tick(f'repeat {repeat + 1} of {config.repeats}: {bench.name}')
        for point in curve.values():
            point.times.append(sample(point.timer))
    return floors, parts
