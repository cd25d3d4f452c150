"""Tokens/s and MFU of the 135M shape in bfloat16, and the loss curve of the same run. For one NVIDIA GPU.

    python scripts/gpu/train_135m.py --rows=rows.npz --out=$OUT --minutes=6      # rows: scripts/gpu/pack_text.py
    python scripts/gpu/train_135m.py --tiny --out=/tmp/tiny                      # the same path on a CPU, 1 minute

First every variant of VARIANTS takes a few steps of the real configuration; then the fastest one trains for
--minutes. Writes train_135m.json (all figures, versions, device) and train_135m_loss.csv into --out.
MFU: model FLOPs (roofline.train_flops) over the chip's published dense peak; the share of a measured matrix product
rate stands beside it.
"""

from __future__ import annotations

import csv
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from backbone.mesh import make_mesh
from configs import base_135m
from harness import peak, provenance, roofline
from harness.train_step import build_task, place_batch, plan

ROWS = flags.DEFINE_string('rows', '', 'Packed rows; without them random tokens, and no claim about the loss.')
OUT = flags.DEFINE_string('out', 'out/gpu', 'Folder for the results.')
MINUTES = flags.DEFINE_float('minutes', 5.0, 'How long the fastest variant trains.')
TINY = flags.DEFINE_bool('tiny', False, 'Two narrow layers, for trying this script without a GPU.')

# attention, remat, rows a step, positions at a time through the vocabulary
VARIANTS = (('cudnn', 'none', 64, 256), ('cudnn', 'dots', 64, 256), ('cudnn', 'none', 32, 256),
            ('cudnn', 'none', 64, 0), ('cudnn', 'none', 128, 128), ('dense', 'none', 32, 256))
TINY_VARIANTS = (('dense', 'none', 4, 16), ('xla', 'full', 4, 0))


def configure(variant) -> object:
    config = base_135m.get_config('tiny' if TINY.value else '')
    attention, remat, rows, chunk = variant
    config.task.kwargs.update({'attention': attention, 'loss_chunk': chunk})
    config.task.kwargs.remat = remat
    if TINY.value:
        config.task.kwargs.overrides.vocab_size = 10_000  # the rows are random: most of a tiny step would be the head
    config.data.batch_size = rows
    return config


def read_rows(config) -> dict[str, np.ndarray]:
    size, vocab = config.data.seq_len, build_task(config).cfg.vocab_size
    if ROWS.value:
        with np.load(ROWS.value) as found:
            return {k: found[k] for k in found.files}
    tokens = np.random.default_rng(0).integers(0, vocab, (256, size + 1))
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': np.ones((256, size), np.int32),
            'positions': np.arange(size)[None].repeat(256, 0), 'weights': np.ones((256, size), np.float32)}


class Run:
    """A compiled variant with its state."""

    def __init__(self, variant, rows):
        self.variant, self.rows, self.count = variant, rows, 0
        self.config = configure(variant)
        self.plan = plan(self.config, make_mesh())
        self.size = self.config.data.batch_size * self.config.data.seq_len
        self.flops = roofline.train_flops(self.plan.task.cfg, self.config.data.batch_size, self.config.data.seq_len)
        start = time.perf_counter()
        self.state = self.plan.init()
        self.losses, self.compile_s = [self.step()], time.perf_counter() - start

    def step(self) -> float:
        n, total = self.config.data.batch_size, len(self.rows['tokens'])
        index = np.arange(self.count * n, (self.count + 1) * n) % total
        batch = place_batch({k: v[index] for k, v in self.rows.items()}, self.plan.batch, 0)
        self.state, metrics = self.plan.step(self.state, batch)
        self.count += 1
        return metrics['loss']

    def timed(self, steps: int) -> float:
        """Seconds a step; the device is waited for once, at the end."""
        start = time.perf_counter()
        for _ in range(steps):
            last = self.step()
        last.block_until_ready()
        return (time.perf_counter() - start) / steps

    def figures(self, seconds: list[float], published: float, measured: float) -> dict:
        middle = statistics.median(seconds)
        return {'variant': dict(zip(('attention', 'remat', 'rows', 'loss_chunk'), self.variant, strict=True)),
                'compile_s': self.compile_s, 'step_ms': [1e3 * s for s in seconds],
                'tokens_per_s': self.size / middle, 'mfu_published': self.flops / middle / published,
                'share_of_measured': self.flops / middle / measured}


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    variants = TINY_VARIANTS if TINY.value else VARIANTS
    rows = read_rows(configure(variants[0]))
    dtype = configure(variants[0]).compute_dtype
    published, source = peak.peak_flops(dtype)
    measured = peak.measured_flops(dtype, 256 if TINY.value else 8192)
    results, best = [], None
    for variant in variants:
        try:
            with jax.set_mesh(make_mesh()):
                run = Run(variant, rows)
                found = run.figures([run.timed(1 if TINY.value else 10) for _ in range(5)], published, measured)
        except Exception as error:  # a variant that does not fit or is not supported is a result, too
            found = {'variant': variant, 'error': f'{type(error).__name__}: {str(error)[:300]}'}
        else:
            if best is None or found['tokens_per_s'] > best[0]:
                best = (found['tokens_per_s'], variant)
            del run
        results.append(found)
        print(json.dumps(found), flush=True)
    if best is None:
        raise SystemExit('no variant ran')
    with jax.set_mesh(make_mesh()):
        curve, final = train(best[1], rows, published, measured)
    with (out / 'train_135m_loss.csv').open('w', newline='') as sink:
        csv.writer(sink).writerows([('step', 'loss', 'seconds'), *curve])
    report = {**provenance.collect(configure(best[1])), 'variants': results, 'run': final,
              'peak_flops': {'value': published, 'source': source, 'measured_matmul': measured},
              'text': ROWS.value or 'random tokens: the loss says nothing'}
    (out / 'train_135m.json').write_text(json.dumps(report, indent=2))
    print(json.dumps(final))


def train(variant, rows, published, measured) -> tuple[list, dict]:
    run = Run(variant, rows)
    curve, seconds, start = [], [], time.perf_counter()
    # The learning rate ends where the config says; what fits into the minutes is what is reported.
    while run.count < run.config.num_steps and time.perf_counter() - start < 60 * MINUTES.value:
        at = time.perf_counter()
        losses = [run.step() for _ in range(10)]
        losses[-1].block_until_ready()
        seconds.append((time.perf_counter() - at) / 10)
        curve += [(run.count - 9 + i, float(loss), time.perf_counter() - start) for i, loss in enumerate(losses)]
    return curve, run.figures(seconds, published, measured) | {
        'steps': run.count, 'tokens': run.count * run.size, 'first_loss': curve[0][1], 'last_loss': curve[-1][1]}


if __name__ == '__main__':
    app.run(main)
