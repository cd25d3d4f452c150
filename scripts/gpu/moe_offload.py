"""Experts in host memory: ms a token resident, on demand, with LRU, and loaded ahead of time. For one NVIDIA GPU.

    python scripts/gpu/moe_offload.py --out=$OUT                                # a made-up trace
    python scripts/gpu/moe_offload.py --trace=trace.npz --out=$OUT              # recorded: m2r2/expert_traces.py
    python scripts/gpu/moe_offload.py --tiny --out=/tmp/tiny                    # the same path on a CPU, seconds

The shape of OLMoE-1B-7B with random weights in bfloat16, 12.9 GB of experts in pinned host memory. What the routers
choose is replaced by the trace's experts, so with a recorded one the traffic is a real model's; the words mean nothing.
'ahead' replays guesses that are right with the probability --recalls (or, --recalls=recorded/NAME, those of the trace
file), made one layer ahead; a predictor's own time is not in them. Every way runs the same tokens, in turns, --repeats
times; all must say the same words. It stops after --minutes and says what it left out. Writes moe_offload.json.
"""

from __future__ import annotations

import gc
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from backbone.config import ModelConfig, MoeConfig
from backbone.errors import ConfigError
from backbone.model import init_params
from backbone.presets import preset
from harness import provenance
from m2r2 import expert_traces
from m2r2.expert_guess import Recorded
from m2r2.expert_runtime import SPARE, ExpertRuntime, generate
from m2r2.expert_store import HostExperts

OUT = flags.DEFINE_string('out', 'out/gpu', 'Folder for the result.')
TRACE = flags.DEFINE_string('trace', '', 'A trace of 16 layers, 64 experts, 8 a token; without it a made-up one.')
TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens decoded in each repeat.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Repeats of each way, in turns.')
SIZES = flags.DEFINE_list('sizes', ['12', '25', '50', '75'], 'Cache sizes, per cent of all experts.')
RECALLS = flags.DEFINE_list('recalls', ['1.0', '0.9', '0.75'], 'Shares of true experts among the guesses.')
EVICTION = flags.DEFINE_string('eviction', 'least_stale', 'Of the ways that guess; lru stays lru.')
MINUTES = flags.DEFINE_float('minutes', 8.0, 'When to stop.')
TINY = flags.DEFINE_bool('tiny', False, 'Narrow layers, for trying this script without a GPU.')


def model() -> ModelConfig:
    cfg = preset('olmoe-1b-7b')
    if not TINY.value:
        return cfg
    small = preset('stories-15m')
    return cfg.replace(vocab_size=61, hidden_size=32, num_layers=4, max_seq_len=128,
                       attention=small.attention.__class__(2, 2, 16, qk_norm=True),
                       mlp=small.mlp.__class__(16), moe=MoeConfig(16, 2, norm_topk=False))


def weights(cfg: ModelConfig) -> tuple[dict, HostExperts]:
    """Random, an expert at a time: all of them need never be on the device."""
    thin = cfg.replace(mlp=cfg.mlp.__class__(1, cfg.mlp.activation))
    base = jax.jit(lambda key: init_params(thin, key, jnp.bfloat16))(jax.random.key(0))
    d, f = cfg.hidden_size, cfg.mlp.intermediate_size

    @jax.jit
    def expert(key):
        keys = jax.random.split(key, 3)
        make = lambda key, a, b: (jax.random.normal(key, (a, b)) * a ** -0.5).astype(jnp.bfloat16)
        return {'gate': make(keys[0], d, f), 'up': make(keys[1], d, f), 'down': make(keys[2], f, d)}

    store = HostExperts(cfg)
    for number, key in enumerate(jax.random.split(jax.random.key(1), cfg.num_layers * cfg.moe.num_experts)):
        store.put(*divmod(number, cfg.moe.num_experts), expert(key))
    return {'base': base}, store


def trace(cfg: ModelConfig, positions: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """ids [L, 1, positions, K], and by name what was guessed of them, one layer ahead, the same shape."""
    k, num = cfg.moe.experts_per_token, cfg.moe.num_experts
    made = {}
    if TRACE.value:
        ids, experts, made = expert_traces.load(TRACE.value)
        if (ids.shape[1:], experts) != ((cfg.num_layers, k), num) or len(ids) < positions:
            raise ConfigError(f'--trace: needs {positions} tokens of {cfg.num_layers} layers, {k} of {num} experts, '
                              f'got {ids.shape} of {experts}')
        ids = ids[:positions]
    else:
        ids = expert_traces.synthetic(positions, cfg.num_layers, num, k)
    by_layer = lambda a: np.moveaxis(np.asarray(a, np.int32), 1, 0)[:, None]
    guesses = {}
    for name in RECALLS.value:
        kind, _, which = name.partition('/')
        if kind == 'recorded' and which not in made:
            raise ConfigError(f'--recalls={name}: the trace holds no predictions {which!r}')
        found = made[which][:positions] if kind == 'recorded' else expert_traces.noisy(ids, num, k, float(kind))
        guesses[name] = by_layer(found[:, :cfg.num_layers, 0])
    return by_layer(ids), guesses


def link(store: HostExperts) -> float:
    """Bytes a second from host memory to the device, of 16 experts at a time."""
    some = [store.experts[0][e] for e in range(min(16, len(store.experts[0])))]
    put = lambda: jax.block_until_ready(jax.device_put(some, jax.sharding.SingleDeviceSharding(store.device)))
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        put()
        seconds.append(time.perf_counter() - begin)
    return len(some) * store.expert_bytes / statistics.median(seconds[1:])


def measure(ways: dict[str, ExpertRuntime], prompt: list[int], new: int, ids: np.ndarray) -> dict[str, dict]:
    """Each way in turns on the same tokens, the first time uncounted: it compiles, and fills the slots."""
    found: dict[str, list] = {name: [] for name in ways}
    for turn in range(REPEATS.value + 1):
        for name, runtime in ways.items():
            done = generate(runtime, [prompt], max_new_tokens=new, forced=ids)
            if turn:
                found[name].append(done)
    rows = {}
    for name, runs in found.items():
        ms = [1e3 * run.decode_s / run.passes for run in runs]
        last, passes = runs[-1].decode, runs[-1].passes
        rows[name] = {
            'ms_a_token': {'median': statistics.median(ms), 'min': min(ms), 'max': max(ms)}, 'slots': len(
                ways[name].cache.table.state),
            'hit_rate': last['hits'] / last['requests'], 'mb_a_token': last['bytes'] / passes / 1e6,
            'a_token': {key: last[key] / passes for key in ('hits', 'late', 'demand', 'prefetch_copies', 'wasted')},
            'words': runs[-1].tokens[0]}
    return rows


def main(argv: list[str]) -> None:
    del argv
    out, began = pathlib.Path(OUT.value), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    cfg = model()
    new, prompt = TOKENS.value + 1, [1, 2, 3, 4]
    params, store = weights(cfg)
    ids, guesses = trace(cfg, 128 if TINY.value else 64 * -(-(16 + new) // 64))
    k, every = cfg.moe.experts_per_token, cfg.num_layers * cfg.moe.num_experts
    report = {**provenance.collect(None), 'host_memory': store.kind, 'expert_mb': store.expert_bytes / 1e6,
              'link_gb_s': link(store) / 1e9, 'trace': TRACE.value or 'made up', 'tokens': TOKENS.value,
              'repeats': REPEATS.value, 'eviction': EVICTION.value, 'rows': [], 'left_out': []}
    make = lambda **options: ExpertRuntime(cfg, params, store, cache_dtype='bfloat16', **options)
    resident = make()
    resident.load_all()
    same = {'resident': resident, 'on_demand': make(slots=k + SPARE, keep=False)}
    for size in SIZES.value:
        if time.perf_counter() - began > 60 * MINUTES.value:
            report['left_out'].append(size)
            continue
        slots = max(k + SPARE, every * int(size) // 100)
        ways = same | {'lru': make(slots=slots)} | {
            f'ahead_{name}': ExpertRuntime(cfg, params | {'prefetch': {'trace': guess}}, store, slots=slots,
                                           predictor=Recorded(), eviction=EVICTION.value, cache_dtype='bfloat16')
            for name, guess in guesses.items()}
        rows = measure(ways, prompt, new, ids)
        words = [row.pop('words') for row in rows.values()]
        base = rows['on_demand']['ms_a_token']['median']
        report['rows'] += [{'size': int(size), 'way': name, 'speedup': base / row['ms_a_token']['median'], **row}
                           for name, row in rows.items()]
        report['same_words'] = report.get('same_words', True) and all(w == words[0] for w in words)
        (out / 'moe_offload.json').write_text(json.dumps(report, indent=1))
        del ways
        gc.collect()  # the slots of this size, before those of the next
    for row in report['rows']:
        print(f"{row['size']:3d} %  {row['way']:14s} {row['ms_a_token']['median']:8.2f} ms a token  "
              f"{row['speedup']:5.2f}x on demand  hits {row['hit_rate']:.2f}  {row['mb_a_token']:8.1f} MB a token")
    (out / 'moe_offload.json').write_text(json.dumps(report, indent=1))


if __name__ == '__main__':
    app.run(main)
