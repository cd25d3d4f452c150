"""Time of one decode step, sparse against dense, the predictor included. One device, batch 1.

    python scripts/sparsity_speed.py --out=out/sparsity_speed                  # 135M and 1B, what this machine can
    python scripts/sparsity_speed.py --shapes=1b --dtype=float32 --keep=0.5,0.2 --refresh=8 --width=512
    python scripts/sparsity_speed.py --tiny --out=/tmp/tiny                    # the same path, seconds

Weights are random: what they are does not change the work, and which units a random predictor names does not either. A
step is one token through the whole model, its argmax included, inside one jitted loop in which the position moves on:
what is chosen for m tokens is chosen in every m-th step, and its time is spread over them. Rows take turns with plain
decoding in its fastest layout (backbone/layout.py); a ratio is that of two times of the same turn, the dense model's
over the row's, so above 1 is faster.

    dense                plain decoding
    dense, rows          the same of the parameters as the sparse model needs them: what the layout alone costs
    PATH k, m            heads (KV groups) and neurons at k kept, chosen every m tokens by a predictor of --width.
                         native: C that reads the rows in place; xla: rows are copied and then multiplied, so that at
                         half kept 1.5 times the dense bytes are moved
    PATH k, free         chosen without a predictor: what is missing to it is the predictor's price
    PATH neurons k, m    neurons alone

Asked: bytes a step needs (sparsity/account.py), the predictor's spread over m; predicted: the dense model's over that.
The copies of `xla` are in no account. Prints Markdown, writes sparsity_speed.json. A shape that does not fit into the
free memory is left out, and said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import cache as caches
from backbone import layout as dense_layout
from backbone import native
from backbone.config import ModelConfig
from backbone.model import PlainTarget, abstract_params
from backbone.presets import preset
from harness import provenance
from harness.results import Spread
from harness.steps import Timer, copy
from scripts.stagformer_speed import bytes_of, filled, free_bytes
from sparsity import layout, predictor
from sparsity.config import SparsityConfig
from sparsity.predictor import PredictorConfig
from sparsity.selectors import Predictor, Random
from sparsity.target import SparseTarget

SHAPES = {'15m': 'stories-15m', '135m': 'smollm2-135m', '1b': 'llama-3.2-1b'}
WARM_UP = 1  # turns that do not count
SPAN = 128  # positions a loop walks through before it starts again at --context: a whole number of refreshes


@dataclasses.dataclass(frozen=True)
class Row:
    """path: 'dense', 'rows', 'native' or 'xla'. keep: share of neurons, and of heads unless `neurons`. refresh: m, 0
    for no predictor."""

    path: str
    keep: float = 1.0
    refresh: int = 0
    neurons: bool = False

    @property
    def name(self) -> str:
        if self.path in ('dense', 'rows'):
            return {'dense': 'dense', 'rows': 'dense, rows'}[self.path]
        when = f'm {self.refresh}' if self.refresh else 'free'
        return f'{self.path} {"neurons " * self.neurons}{self.keep:g}, {when}'

    def target(self, cfg: ModelConfig, p: PredictorConfig, dtype: str) -> Any:
        if self.path in ('dense', 'rows'):
            return PlainTarget(cfg, dtype, stacked=False)
        s = SparsityConfig(1.0 if self.neurons else self.keep, self.keep, p.head_unit, p.block,
                           refresh=self.refresh or SPAN)
        selector = Predictor(cfg, s, p) if self.refresh else Random(cfg, s)
        return SparseTarget(cfg, s, selector, 'gathered', self.path, dtype, stacked=False)


def rows_of(paths: Sequence[str], keeps: Sequence[float], refreshes: Sequence[int]) -> list[Row]:
    """Dense first."""
    found = [Row('dense'), Row('rows')]
    for path, keep in itertools.product(paths, keeps):
        found += [Row(path, keep, m) for m in refreshes] + [Row(path, keep), Row(path, keep, refreshes[-1], True)]
    return found


def timer(target: Any, params: dict, context: int) -> tuple[Timer, Any]:
    """A step at `context` cached tokens and up to SPAN more; and a cache to read the account from."""
    cache = target.init_cache(1, context + SPAN + 1, 0)
    empty = target.forward(params, jnp.ones((1, 16), jnp.int32), cache, logits_at=jnp.array([0])).cache
    cache = caches.ahead(empty, context)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(trips, carry, params):
        def body(i, carry):
            cache, token = carry
            output = target.forward(params, token, cache)
            best = output.logits.argmax(-1).astype(token.dtype)
            back = jnp.where((i + 1) % SPAN == 0, 1 - SPAN, 1)
            return caches.ahead(output.cache, back), best
        start = caches.ahead(carry[0], context - carry[0].pos)
        return jax.lax.fori_loop(0, trips, body, (start, carry[1]))

    made = Timer(lambda trips, carry: loop(trips, carry, params), (copy(cache), jnp.ones((1, 1), jnp.int32)))
    return made, loop(jnp.int32(SPAN), (copy(cache), jnp.ones((1, 1), jnp.int32)), params)[0]


def measure(cfg: ModelConfig, dtype: str, rows: Sequence[Row], width: int, block: int, context: int, repeats: int
            ) -> dict[str, Any]:
    """{'rows': [...], 'predictor': {...}} or {'skipped': why}."""
    size = bytes_of(abstract_params(cfg, dtype))
    if 4 * size > free_bytes():  # two layouts, and one more of each while it is made
        return {'skipped': f'needs about {4 * size / 1e9:.1f} GB of memory, {free_bytes() / 1e9:.1f} GB are free'}
    block = next(n for n in range(block, 0, -1) if cfg.mlp.intermediate_size % n == 0)
    p = PredictorConfig(width_heads=width, width_neurons=width, block=block)
    mine = jax.tree.map(jnp.asarray, filled(jax.eval_shape(
        lambda: predictor.init_params(cfg, p, jax.random.key(0))), dtype))
    base = dense_layout.pack(filled(abstract_params(cfg, dtype), dtype), jnp.dtype(dtype))
    turned = layout.pack(base, jnp.dtype(dtype))
    timers, caches_after, targets = [], [], []
    for row in rows:
        targets.append(row.target(cfg, p, dtype))
        params = {'base': base} if row.path == 'dense' else {'base': turned, 'sparsity': mine}
        made, after = timer(targets[-1], params, context)
        made.trips = -(-made.trips // max(row.refresh, 1)) * max(row.refresh, 1)  # whole refreshes
        timers.append(made)
        caches_after.append(after)
    times = []
    for turn in range(-WARM_UP, repeats):
        order = np.roll(range(len(rows)), turn)  # nobody always follows the same one
        spent = {i: timers[i]() for i in order}
        if turn >= 0:
            times.append([1e3 * spent[i] for i in range(len(rows))])
    found = []
    for i, row in enumerate(rows):
        entry = {'name': row.name, **dataclasses.asdict(row),
                 'ms': dataclasses.asdict(Spread.of([turn[i] for turn in times])),
                 'ratio': dataclasses.asdict(Spread.of([turn[0] / turn[i] for turn in times]))}
        if isinstance(targets[i], SparseTarget):
            said = targets[i].statistics(caches_after[i], jnp.dtype(dtype).itemsize)
            entry |= {'asked': {name: said[name] for name in ('weights', 'kv', 'selector', 'head', 'bytes', 'dense')},
                      'predicted_ratio': said['dense'] / said['bytes']}
        found.append(entry)
    return {'rows': found, 'block': block, 'weight_bytes': size, 'predictor_bytes': bytes_of(mine)}


def table(found: dict[str, Any]) -> str:
    lines = [f'Predictor: {found["predictor_bytes"] / 1e6:.2f} MB beside {found["weight_bytes"] / 1e6:.1f} MB, blocks '
             f'of {found["block"]} neurons.', '',
             '| | ms a step (quartiles) | against dense (quartiles) | predicted | MB: layers, cache, predictor, head |',
             '|---|---|---|---|---|']
    for row in found['rows']:
        ms, ratio, asked = row['ms'], row['ratio'], row.get('asked')
        parts = ', '.join(f'{asked[n] / 1e6:.2f}' for n in ('weights', 'kv', 'selector', 'head')) if asked else ''
        predicted = f'{row["predicted_ratio"]:.2f}' if asked else ''
        lines.append(f'| {row["name"]} | {ms["median"]:.3g} ({ms["q1"]:.3g}-{ms["q3"]:.3g}) | {ratio["median"]:.2f} '
                     f'({ratio["q1"]:.2f}-{ratio["q3"]:.2f}) | {predicted} | {parts} |')
    return '\n'.join(lines)


def main(args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = provenance.collect(vars(args)) | {'dtype': args.dtype, 'batch': 1, 'shapes': {}}
    rows = rows_of(args.paths, args.keep, args.refresh)
    shapes = {'tiny': tiny()} if args.tiny else {name: preset(SHAPES[name]) for name in args.shapes}
    for name, cfg in shapes.items():
        context = min(args.context, cfg.max_seq_len - SPAN - 1)
        found = measure(cfg, args.dtype, rows, args.width, args.block, context, args.repeats)
        report['shapes'][name] = {'layers': cfg.num_layers, 'context': context, **found}
        (out / 'sparsity_speed.json').write_text(json.dumps(report, indent=2))
        print(f'\n{name}, {cfg.num_layers} layers, {args.dtype}, {context} tokens cached\n\n'
              f'{found.get("skipped") or table(found)}', flush=True)
    return report


def tiny() -> ModelConfig:
    return preset('stories-15m').replace(vocab_size=512, num_layers=3)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(',')
    numbers = lambda kind: lambda text: [kind(word) for word in words(text)]
    parser.add_argument('--shapes', type=words, default=['135m', '1b'], help=f'of {", ".join(SHAPES)}')
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'))
    parser.add_argument('--paths', type=words, help='of native, xla; default what this machine has')
    parser.add_argument('--keep', type=numbers(float), default=[0.5, 0.2, 0.1], help='shares kept')
    parser.add_argument('--refresh', type=numbers(int), default=[1, 8, 32], help='tokens a choice serves')
    parser.add_argument('--width', type=int, default=256, help='of the predictor, heads and neurons alike')
    parser.add_argument('--block', type=int, default=16, help='neurons; the next smaller one that divides')
    parser.add_argument('--context', type=int, default=64, help='tokens cached')
    parser.add_argument('--repeats', type=int, default=15, help='turns')
    parser.add_argument('--out', default='out/sparsity_speed')
    parser.add_argument('--tiny', action='store_true', help='3 layers, few rows, 2 turns')
    args = parser.parse_args(argv)
    args.paths = args.paths or (['native'] * native.available() + ['xla'])
    if args.tiny:
        args.keep, args.refresh, args.repeats, args.width, args.context = [0.5], [1, 8], 2, 8, 16
    for name, known in (('shapes', SHAPES), ('paths', ('native', 'xla'))):
        if unknown := [word for word in getattr(args, name) if word not in known]:
            parser.error(f'--{name}: unknown {unknown[0]!r}, known: {", ".join(known)}')
    if bad := [m for m in args.refresh if m < 1 or SPAN % m]:
        parser.error(f'--refresh: {bad[0]} does not divide {SPAN}')
    return args


if __name__ == '__main__':
    main(parse())
