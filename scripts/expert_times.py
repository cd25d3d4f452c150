"""What the simulator needs to know of a machine: ms of a layer up to its router, of its experts, and of one copy.

    python scripts/expert_times.py --model=out/moe_stories_base
    python scripts/expert_simulation.py --trace out/stories_trace.npz --times ATTENTION EXPERTS COPY

The programs are the host runtime's own (m2r2/expert_steps.py, expert_store.py), one token at batch 1, each waited for
by itself; medians and quartiles of interleaved repeats. --preset takes a shape of backbone/presets.py with random
weights and two layers instead of a model. A copy goes from the host's memory kind to a slot on the device, the write
into the slot included.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import layout
from backbone.errors import RequestError
from backbone.model import init_params
from backbone.presets import preset
from harness import models
from m2r2 import expert_steps as steps
from m2r2.expert_runtime import ExpertRuntime


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', help='a model with experts: a run, a checkpoint, a file')
    parser.add_argument('--preset', help='or a shape, with random weights')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--context', type=int, default=128, help='slots of the cache')
    parser.add_argument('--repeats', type=int, default=50)
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple:
    """(cfg, base packed). Errors: RequestError unless exactly one of --model and --preset is given."""
    if bool(args.model) == bool(args.preset):
        raise RequestError('give either --model or --preset')
    if args.model:
        loaded = models.load(args.model)
        return loaded.config, models.pack(loaded, args.dtype)['base']
    cfg = preset(args.preset).replace(num_layers=2)
    return cfg, layout.pack(init_params(cfg, jax.random.key(0), args.dtype), args.dtype)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """{'attention', 'experts', 'copy': ms of each repeat}."""
    cfg, base = load(args)
    runtime = ExpertRuntime(cfg, {'base': base})
    runtime.load_all()
    kv, k = runtime.init_state(1, args.context)[0], cfg.moe.experts_per_token
    tokens, pos, live = np.ones((1, 1), np.int32), np.array([args.context // 2], np.int32), np.ones((1, 1), bool)
    slow, add = steps.begin(cfg, runtime.base, tokens, pos)
    spent: dict[str, list[float]] = {'attention': [], 'experts': [], 'copy': []}

    def timed(name: str, run) -> object:
        begin = time.perf_counter()
        found = jax.block_until_ready(run())
        spent[name].append(1e3 * (time.perf_counter() - begin))
        return found

    def attention():
        return steps.attend_and_route(cfg, None, 0, runtime.base['layers'][0], None, (), slow, add, (), kv[0], (), (),
                                      pos, live, None)

    def copy():
        runtime.slots.start(0, 0, 0)
        runtime.slots.land([0])
        return runtime.slots.buffers

    slots, experts = np.arange(k, dtype=np.int32), np.arange(k, dtype=np.int32)
    for _ in range(args.repeats + 2):  # the first two compile and warm up
        routed, kv[0], _, _ = timed('attention', attention)
        timed('experts', lambda: steps.run_experts(cfg, runtime.slots.buffers, slots, experts, experts[None, None],
                                                   routed.weights, routed.normed, routed.mixed))
        timed('copy', copy)
    return {name: times[2:] for name, times in spent.items()}


def main(args: argparse.Namespace) -> None:
    found = measure(args)
    for name, times in found.items():
        low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
        print(f'{name:<10} {middle:.4f} ms ({low:.4f}-{high:.4f})')
    print('--times', *(f'{np.median(times):.4f}' for times in found.values()))


if __name__ == '__main__':
    main(parse())
