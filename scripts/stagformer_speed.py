"""Time of one decode step of L layers against two stacks of L/2 that run at once. One device, batch 1, a CPU or a GPU.

    python scripts/stagformer_speed.py --out=out/stagformer_speed      # 15M, 135M and 1B
    python scripts/stagformer_speed.py --shapes=135m --contexts=64,1024 --dtype=float32 --forms=tuple,arrays
    python scripts/stagformer_speed.py --tiny --out=/tmp/tiny          # the same path, seconds

Weights are random: what they are does not change the work. A step is one token through the whole model, its argmax
included, with `context` tokens cached, inside one jitted loop (harness/steps.py). Rows take turns; a ratio is that of
two times of the same turn, the dense model's over the row's, so above 1 is faster. dense is plain decoding in its
fastest layout (backbone/layout.py); half, L/2 plain layers, is what two stacks would cost if the second were free.
Predicted: the bytes a step reads (harness/stages.py) over the bandwidth measured between the turns. Prints Markdown,
writes stagformer_speed.json. A shape that does not fit into the free memory is left out, and said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import layout
from backbone.config import ModelConfig
from backbone.model import PlainTarget, init_params
from backbone.presets import preset
from harness import provenance, roofline, stages, steps
from harness.bandwidth import Meter
from harness.results import Spread
from stagformer import layout as side_by_side
from stagformer import model
from stagformer.config import StagFormerConfig
from stagformer.target import StagFormerTarget

SHAPES = {'15m': 'stories-15m', '135m': 'smollm2-135m', '1b': 'llama-3.2-1b'}
WINDOW = 128
WARM_UP = 1  # turns that do not count


@dataclasses.dataclass(frozen=True)
class Row:
    """name; the model; how its parameters lie ('' for a plain model); what a step of it reads."""

    name: str
    cfg: ModelConfig | StagFormerConfig
    form: str = ''
    recurrent: bool = False

    def target(self, dtype: str) -> Any:
        if not self.form:
            return PlainTarget(self.cfg, dtype, stacked=False)
        return StagFormerTarget(self.cfg, dtype, self.form, self.recurrent)

    def abstract(self, dtype: str) -> Any:
        """Shapes of the parameters as they are stored."""
        make = model.init_params if self.form else init_params
        tree = jax.eval_shape(lambda: make(self.cfg, jax.random.key(0), dtype))
        return tree if self.form else {'base': tree}

    def pack(self, params: dict, dtype: str) -> dict:
        if not self.form:
            return {'base': layout.pack(params['base'], dtype)}
        return side_by_side.pack(self.cfg, params, dtype, self.form)

    def cost(self, context: int, dtype: str) -> roofline.Cost:
        """Of one step, the head included."""
        base = self.cfg.base if self.form else self.cfg
        request = {'context': context, 'dtype': dtype}
        if not self.form:
            return roofline.step_cost(base, **request)
        stacks = stages.Stacks(self.cfg.depths, self.cfg.window, self.cfg.shared)
        body = (stages.stage_costs(base, stacks, **request)[-1] if self.recurrent else
                stages.on_one_device(base, stacks, **request))
        parts = zip(dataclasses.astuple(body), dataclasses.astuple(stages.head_cost(base, dtype=dtype)), strict=True)
        return roofline.Cost(*map(sum, parts))


def rows_of(cfg: ModelConfig, forms: Sequence[str] = ()) -> list[Row]:
    """The dense model first. forms: of the staggered ones, default what suits this machine."""
    half = cfg.replace(num_layers=cfg.num_layers // 2)
    staggered = {'separate': (StagFormerConfig.even(cfg, 2), False),
                 f'separate, window {WINDOW}': (StagFormerConfig.even(cfg, 2, window=WINDOW), False),
                 'shared': (StagFormerConfig.even(half, 2, shared=True), False),
                 f'shared, window {WINDOW}': (StagFormerConfig.even(half, 2, shared=True, window=WINDOW), False),
                 'recurrent': (StagFormerConfig.even(half, 2, shared=True), True)}
    found = [Row('dense', cfg), Row('half', half)]
    for name, (made, recurrent) in staggered.items():
        for form in forms or (side_by_side.form_here(made),):
            found.append(Row(name + f' ({form})' * (len(forms) > 1), made, form, recurrent))
    return found


def filled(shapes: Any, dtype: str) -> Any:
    """Numbers such as a model has, cheap to make: kernels from one block of random ones, scales of one."""
    block = (0.02 * np.random.default_rng(0).standard_normal(65_537)).astype(jnp.dtype(dtype))

    def leaf(path, like):
        return np.ones(like.shape, block.dtype) if path[-1].key == 'scale' else np.resize(block, like.shape)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def bytes_of(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def free_bytes() -> float:
    """Of the memory the models go to."""
    if jax.default_backend() != 'cpu':
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get('bytes_limit', float('inf')) - stats.get('bytes_in_use', 0)
    try:
        found = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
        return 1024.0 * int(found['MemAvailable'].split()[0])
    except (OSError, KeyError):
        return float('inf')


def needed_bytes(rows: Sequence[Row], dtype: str) -> int:
    """Packed parameters of all; and one more of the largest, made before it is packed, with room to spare."""
    sizes = {_weights(row): bytes_of(row.abstract(dtype)) for row in rows}
    return sum(sizes.values()) + 2 * max(sizes.values())


def _weights(row: Row) -> Any:
    """Rows of the same key decode the same parameters."""
    return (dataclasses.replace(row.cfg, window=None), row.form) if row.form else row.cfg


def measure(cfg: ModelConfig, dtype: str, contexts: Sequence[int], repeats: int, forms: Sequence[str] = (),
            min_buffer_bytes: int = 256 << 20) -> dict[str, Any]:
    """{'rows': [...]} with one entry a row and context, or {'skipped': why}."""
    rows = rows_of(cfg, forms)
    needed, free = needed_bytes(rows, dtype), free_bytes()
    if needed > free:
        return {'skipped': f'needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free'}
    packed: dict[Any, dict] = {}
    for row in rows:
        if _weights(row) not in packed:
            packed[_weights(row)] = jax.block_until_ready(row.pack(filled(row.abstract(dtype), dtype), dtype))
    meter = Meter({dtype: int(rows[0].cost(0, dtype).weight_bytes)}, min_buffer_bytes=min_buffer_bytes)
    entries = []
    for context in contexts:
        timers = [timer(row, packed[_weights(row)], context, dtype) for row in rows]
        times, passes = [], []
        for turn in range(-WARM_UP, repeats):
            order = np.roll(range(len(rows)), turn)  # nobody always follows the same one
            spent = {i: timers[i]() for i in order}
            if turn >= 0:
                times.append([1e3 * spent[i] for i in range(len(rows))])
                passes.append(meter.measure(dtype).bytes_per_s)
        entries += figures(rows, times, statistics.median(passes), context, dtype)
    return {'bandwidth_source': meter.source, 'rows': entries}


def timer(row: Row, params: dict, context: int, dtype: str) -> steps.Timer:
    target = row.target(dtype)
    cache = target.init_cache(1, min(context + 64, target.max_seq_len), 0)
    cache = cache.replace(pos=jnp.full((1,), context, jnp.int32))
    return steps.forward_timer(target, params, cache, jnp.ones((1, 1), jnp.int32))


def figures(rows: Sequence[Row], times: list[list[float]], bandwidth: float, context: int, dtype: str) -> list[dict]:
    found = []
    for i, row in enumerate(rows):
        cost = row.cost(context, dtype)
        found.append({
            'name': row.name, 'context': context, 'ms': dataclasses.asdict(Spread.of([turn[i] for turn in times])),
            'ratio': dataclasses.asdict(Spread.of([turn[0] / turn[i] for turn in times])), 'bytes': cost.bytes,
            'predicted_ms': 1e3 * cost.bytes / bandwidth, 'bytes_per_s': bandwidth,
            'predicted_ratio': rows[0].cost(context, dtype).bytes / cost.bytes})
    return found


def table(found: dict[str, Any]) -> str:
    lines = ['| | tokens cached | ms a step (quartiles) | against dense (extremes) | predicted ms | predicted |',
             '|---|---|---|---|---|---|']
    for row in found['rows']:
        ms, ratio = row['ms'], row['ratio']
        lines.append(f'| {row["name"]} | {row["context"]} | {ms["median"]:.3g} ({ms["q1"]:.3g}-{ms["q3"]:.3g}) | '
                     f'{ratio["median"]:.2f} ({ratio["min"]:.2f}-{ratio["max"]:.2f}) | {row["predicted_ms"]:.3g} | '
                     f'{row["predicted_ratio"]:.2f} |')
    return '\n'.join(lines)


def tiny() -> ModelConfig:
    return preset('stories-15m').replace(vocab_size=512, hidden_size=48, num_layers=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(',')
    parser.add_argument('--shapes', type=words, default=list(SHAPES), help=f'of {", ".join(SHAPES)}')
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'))
    parser.add_argument('--contexts', type=lambda text: [int(n) for n in words(text)], default=[64],
                        help='tokens cached; a shape with a shorter context takes what it has')
    parser.add_argument('--repeats', type=int, default=15, help='turns')
    parser.add_argument('--forms', type=words, default=(), help='of tuple, arrays; default what suits this machine')
    parser.add_argument('--out', default='out/stagformer_speed')
    parser.add_argument('--tiny', action='store_true', help='a model of 2 layers, 3 turns')
    args = parser.parse_args()
    if unknown := [name for name in args.shapes if name not in SHAPES]:
        parser.error(f'unknown shape {unknown[0]!r}, known: {", ".join(SHAPES)}')
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = provenance.collect(vars(args)) | {'dtype': args.dtype, 'batch': 1, 'shapes': {}}
    shapes = {'tiny': tiny()} if args.tiny else {name: preset(SHAPES[name]) for name in args.shapes}
    for name, cfg in shapes.items():
        contexts = sorted({min(n, cfg.max_seq_len - 64) for n in args.contexts})
        found = measure(cfg, args.dtype, contexts, 3 if args.tiny else args.repeats, args.forms,
                        1 << 20 if args.tiny else 256 << 20)
        report['shapes'][name] = {'layers': cfg.num_layers, **found}
        (out / 'stagformer_speed.json').write_text(json.dumps(report, indent=2))
        print(f'\n{name}, {cfg.num_layers} layers, {args.dtype}\n\n{found.get("skipped") or table(found)}', flush=True)


if __name__ == '__main__':
    main()
