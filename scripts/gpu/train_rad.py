"""Hybrids of SmolLM2-135M: layers searched for or given, mixers distilled at length, judged, timed. One NVIDIA GPU.

    python scripts/gpu/train_rad.py --base=FILE.gguf --rows=rows.npz --held_out=held_out.npz --prompts=prompts.npz \\
        --long=long.npz --variants=k7/set,k7/evenly,k15/set,k15/set/mamba_in_llama --steps=8000 --out=$OUT
    python scripts/gpu/train_rad.py --tiny --out=/tmp/tiny                     # the same path on a CPU, seconds

rows, held_out, prompts, long: scripts/gpu/pack_text.py of configs/rad.py:k7 (rows with --config.data.seq_len=1024,
long with 8192, or whatever length they have). A variant is one of configs/rad.py; `set` is read from --sets, the
chosen.json of scripts/rad_search.py, and without it searched for here, by --search, on the prompts: as many evaluations
of exact acceptance (rad/acceptance.py) as that method takes. All variants see the same rows in the same order.

Writes train_rad.json, again after each part. Of each variant: its layers and how they came about; the loss by step,
tokens/s and MFU; the task's metrics on held-out rows; nll by position on --long, of hybrid and base; drafts kept,
greedy and sampled, of the hybrid and of the base that skips those attentions; parameters in pieces under 15 MB. Of all
together: tokens/s of drafting, in turns with plain decoding; ms of a decode step and bytes of the cache at --contexts.
MFU: model FLOPs of a step (rad/cost.py) over the published dense peak.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import train_tensorhead as shared
from absl import app, flags
from ml_collections import ConfigDict

from backbone import cache as caches
from backbone.mesh import make_mesh
from backbone.model import PlainTarget, hidden_states, unembed
from backbone.sampling import GREEDY, Sampling
from configs import rad as configs
from harness import peak, provenance, steps
from harness.train_step import narrow, plan
from rad import acceptance, distill, export, model, search, student
from rad.diagnose import Costs, best_tau
from rad.drafter import RadDrafter
from rad.skip import SkipConfig, SkipDrafter
from rad.target import HybridTarget

VARIANTS = flags.DEFINE_list('variants', ['k7/set', 'k15/set'], 'Of configs/rad.py, in this order.')
SETS = flags.DEFINE_string('sets', '', 'chosen.json of scripts/rad_search.py; without it `set` is searched for here.')
SEARCH = flags.DEFINE_string('search', 'leave_one_out', f'How: {", ".join(search.METHODS)}.')
LONG = flags.DEFINE_string('long', '', 'Packed rows to measure by position; default: those held out.')
CONTEXTS = flags.DEFINE_list('contexts', ['512', '4096', '8000'], 'Tokens cached where a decode step is timed.')
BLOCKS = flags.DEFINE_list('blocks', ['2', '4'], 'Drafts a round.')
REMAT = flags.DEFINE_string('remat', 'dots', 'Of training.')
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)


def configure(variant: str, chosen: dict) -> object:
    tiny = shared.TINY.value
    config = configs.get_config('/'.join(['tiny', *variant.split('/')[1:]]) if tiny else variant)
    kwargs = config.task.kwargs
    changes = {} if tiny else {'base': shared.BASE.value or kwargs.base, 'remat': REMAT.value}
    if of_a_search(variant) and str(kwargs.count) in chosen:
        changes['layers'] = tuple(chosen[str(kwargs.count)]['set']['attention'])
    config.task.kwargs = ConfigDict(kwargs.to_dict() | changes)
    config.num_steps = shared.STEPS.value or config.num_steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.num_steps // 4)
    return config


def of_a_search(variant: str) -> bool:
    return variant.split('/')[1:2] in ([], ['set'])


def read(path: str, otherwise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not path:
        return otherwise
    with np.load(path) as file:
        return {k: file[k] for k in file.files}


class Rows:
    """Rows in their packed order, batch after batch."""

    def __init__(self, rows: dict[str, np.ndarray], size: int):
        self.rows, self.size = {k: v for k, v in rows.items() if k != 'bytes'}, size

    def __len__(self) -> int:
        return len(self.rows['tokens'])

    def batch(self, number: int) -> dict[str, np.ndarray]:
        index = np.arange(number * self.size, (number + 1) * self.size) % len(self)
        return {k: v[index] for k, v in self.rows.items()}


def find_set(cfg, base: dict, prompts: list[list[int]], count: int, note: dict) -> dict:
    """{'set', ...} of --search at this count: judged by drafts kept on the base's own continuations."""
    size, block = (12, 3) if shared.TINY.value else (48, 4)
    cont = acceptance.continuation(PlainTarget(cfg), {'base': base}, prompts[:shared.BATCH.value], size)
    counter = acceptance.counter(cfg, base, [cont], block)
    costs, rows = Costs.of_weights(cfg, block), []
    made = search.make(SEARCH.value, search.Space(cfg.num_layers, count))
    while (skip := made.suggest()) is not None:
        counts, _ = counter(skip)
        tau = best_tau(costs, cfg.num_layers, skip, counts)[0]
        rows.append({'set': skip.to_dict(), 'counts': counts, 'tau': tau})
        made.observe(skip, tau)
    note[str(count)] = rows
    return {'set': made.best[0].to_dict(), 'tau': made.best[1], 'evaluations': made.evaluations, 'by': SEARCH.value}


def by_position(cfg, rcfg, params: dict, rows: dict[str, np.ndarray], dtype) -> dict[str, dict[str, float]]:
    """Nats a token by position in the row, of base and hybrid, one row at a time: {'256-512': {'base', 'hybrid'}}."""
    size = rows['tokens'].shape[1]
    chunk = 256 if size % 256 == 0 else 0

    @jax.jit
    def run(params, row):
        options = {'segments': row['segments'], 'positions': row['positions'], 'query_chunk': chunk}
        now = model.hidden_states(cfg, rcfg, params, row['tokens'], **options)
        before = hidden_states(cfg, params['base'], row['tokens'], **options)
        words = lambda h: unembed(cfg, params['base'], h)
        return distill.at_each(lambda a, b, t: distill.compare(words(a), words(b), t), (now, before, row['targets']),
                               chunk)

    params, edges = narrow(params, dtype), [edge for edge in EDGES if edge < size] + [size]
    sums = np.zeros((len(edges) - 1, 3))
    for i in range(len(rows['tokens'])):
        row = {k: rows[k][i:i + 1].astype(np.int32) for k in ('tokens', 'targets', 'segments', 'positions')}
        found, weights = run(params, row), rows['weights'][i]
        for part, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            inside = (row['positions'][0] >= first) & (row['positions'][0] < last) & (weights > 0)
            sums[part] += [np.asarray(found[name])[0][inside].sum() for name in ('teacher_nll', 'nll')] + [inside.sum()]
    return {f'{a}-{b}': {'base': n / max(c, 1), 'hybrid': h / max(c, 1), 'tokens': int(c)}
            for a, b, (n, h, c) in zip(edges, edges[1:], sums, strict=False)}


def decode_timer(target, params, context: int) -> tuple[steps.Timer, int]:
    """(of one token behind `context` others, its commit with it, bytes of the cache)."""
    cache = caches.ahead(target.init_cache(1, context + 64, 0), context)
    is_ssm = lambda a: isinstance(a, caches.SsmState)
    at = lambda layers: jax.tree.map(lambda a: a.replace(at=cache.pos) if is_ssm(a) else a, layers, is_leaf=is_ssm)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(trips, cache, params):
        def one(_, cache):
            output = target.forward(params, cache.pending[:, None], cache)
            after = caches.commit(output.cache, jnp.zeros_like(cache.pos), output.logits[:, 0].argmax(-1))
            back = after.replace(pos=cache.pos, layers=at(after.layers))
            return caches.write_tokens(back, after.pending[:, None])
        return jax.lax.fori_loop(0, trips, one, cache)

    start = steps.copy(cache.replace(layers=at(cache.layers)))  # donated, and `at` is `pos` in every layer
    return steps.Timer(lambda trips, cache: loop(trips, cache, params), start), size


def step_times(bench: shared.Bench, models: dict) -> list[dict]:
    """ms of one token at each context, base and hybrids in turns, and bytes of the cache a row."""
    found, cfg = [], bench.target.cfg
    for context in map(int, CONTEXTS.value):
        if context + 64 > cfg.max_seq_len:
            continue
        timers, sizes = {}, {}
        for name, (target, params) in {'plain': (bench.target, {'base': bench.base}), **models}.items():
            timers[name], sizes[name] = decode_timer(target, params, context)
        times = {name: [] for name in timers}
        for turn in range(shared.REPEATS.value):
            for name in np.roll(np.array(list(timers), object), turn):
                times[name].append(1e3 * timers[name]())
        found.append({'context': context, 'ms': times, 'cache_bytes': sizes,
                      'ratio': {name: float(np.median(np.array(times['plain']) / np.array(ms)))
                                for name, ms in times.items()}})
    return found


def drafting(bench: shared.Bench, task, mine: dict) -> tuple[dict, dict]:
    """({name: Method} by block, what each kept) of the hybrid and of the base that skips the same attentions."""
    methods, kept = {}, {}
    ready = export.drafting(task.rad, mine, bench.base, jnp.dtype(bench.dtype))
    for block in map(int, BLOCKS.value):
        drafters = {f'rad_{block}': RadDrafter(task.cfg, task.rad, block, bench.dtype),
                    f'skip_{block}': SkipDrafter(task.cfg, SkipConfig(task.rad.layers), block)}
        for name, drafter in drafters.items():
            params = {'base': bench.base, 'rad': ready}
            methods[name] = shared.Method(bench.target, drafter, params, bench.prompts, bench.stops)
            kept[name] = {'greedy': methods[name].accepted(GREEDY), 'sampled': methods[name].accepted(Sampling(1.0))}
    return methods, kept


def main(argv: list[str]) -> None:
    out = pathlib.Path(shared.OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    chosen = json.loads(pathlib.Path(SETS.value).read_text()) if SETS.value else {}
    report, bench, methods, models = {}, None, {}, {}
    for variant in VARIANTS.value:
        config = configure(variant, chosen)
        if bench is None:  # the base is the same for all
            probe = configure('/'.join([variant.split('/')[0], 'evenly']), {})
            with jax.set_mesh(make_mesh()):
                first = plan(probe, make_mesh())
                base = jax.tree.map(jnp.copy, first.tree(first.init())['base'])
            cfg, (published, source) = first.task.cfg, peak.peak_flops(probe.compute_dtype)
            packed_rows = shared.read_rows(shared.ROWS.value, first.task, probe)
            held = read(shared.HELD_OUT.value, packed_rows)
            long = read(LONG.value, held)
            prompts = shared.read_prompts(packed_rows)
            bench = shared.Bench(cfg, base, prompts, shared.stop_tokens(probe))
            report = {**provenance.collect(probe), 'peak_flops': {'value': published, 'source': source}, 'runs': {},
                      'text': shared.ROWS.value or 'random tokens: the losses say nothing', 'searched': {},
                      'held_out': shared.HELD_OUT.value or 'the same rows', 'rows': len(packed_rows['tokens'])}
        count = str(config.task.kwargs.count)
        if of_a_search(variant) and count not in chosen:
            begin = time.perf_counter()
            chosen[count] = find_set(cfg, base, prompts, int(count), report['searched'])
            chosen[count]['seconds'] = time.perf_counter() - begin
            (out / 'chosen.json').write_text(json.dumps(chosen, indent=1))
            config = configure(variant, chosen)
        size = packed_rows['tokens'].shape[1]
        config.data.seq_len = size
        name = variant.replace('/', '_')
        with jax.set_mesh(make_mesh()):
            made = plan(config, make_mesh())
            rows, tests = (Rows(r, config.data.batch_size) for r in (packed_rows, held))
            mine, found = shared.train(config, made, made.init(), rows, tests, published, 'rad')
        mine, task = jax.tree.map(jnp.asarray, mine), made.task
        found |= {'variant': variant, 'layers': task.rad.layers, 'trained': student.count(mine),
                  'base_parameters': student.count(base), 'files': shared.save(name, mine, out)}
        if not task.in_place:
            whole = student.whole(task.rad.layers, {'base': base, 'rad': mine})
            if task.train != 'all':
                found['by_position'] = by_position(cfg, task.rad, whole, long, jnp.dtype(config.compute_dtype))
            models[name] = HybridTarget(cfg, task.rad, bench.dtype), export.pack(
                {'base': base, 'rad': mine}, jnp.dtype(bench.dtype), cfg.to_dict(), task.rad.to_dict())
        if not task.in_place and not task.rad.parallel:
            own, found['drafts'] = drafting(bench, task, mine)
            methods |= {f'{name}:{kind}': method for kind, method in own.items()}
        report['runs'][name] = found
        shared.write_json(report, out / 'train_rad.json')
        print(name, json.dumps({k: v for k, v in found.items() if k not in ('step_ms', 'curve')}), flush=True)
    report['decoding'] = {'dtype': bench.dtype, 'batch': 1, 'temperature': 0, **bench.in_turns(methods)}
    shared.write_json(report, out / 'train_rad.json')
    report['steps'] = step_times(bench, models)
    shared.write_json(report, out / 'train_rad.json')
    print(json.dumps({'decoding': report['decoding'], 'steps': report['steps']}))


if __name__ == '__main__':
    app.run(main)
