"""Accelerators that draft, on frozen SmolLM2-135M, by exit layer: held-out loss, accepted drafts, speed-up. One GPU.

    python scripts/gpu/train_m2r2.py --base=FILE.gguf --rows=rows.npz --held_out=held_out.npz --prompts=prompts.npz \\
        --draft_ids=ids.npy --heads=k2,k3,k6 --steps=2000 --out=$OUT
    python scripts/gpu/train_m2r2.py --tiny --out=/tmp/tiny                    # the same path on a CPU, seconds

Flags, inputs and outputs are those of train_tensorhead.py; the draft vocabulary has the size that draft_ids has.
kN: exit after N layers; _plain: without a carry, as the paper is read; _deed: an adapter of equal size on h alone.
"""

from __future__ import annotations

import numpy as np
import train_tensorhead as shared
from absl import app

from configs import m2r2_smollm2

CARRY = m2r2_smollm2.get_config().task.kwargs.m2r2.carry
EXITS = {'k2': (2, CARRY, 'fast'), 'k3': (3, CARRY, 'fast'), 'k4': (4, CARRY, 'fast'), 'k6': (6, CARRY, 'fast'),
         'k3_plain': (3, 0, 'fast'), 'k10_plain': (10, 0, 'fast'), 'k10_deed': (10, 0, 'exit')}
TINY_EXITS = {'k1': (1, 16, 'fast'), 'k2_plain': (2, 0, 'fast'), 'k2_deed': (2, 0, 'exit')}


def configure(shape: tuple[int, int, str]):
    exit_layer, carry, stream = shape
    config = m2r2_smollm2.get_config('tiny' if shared.TINY.value else 'gpu')
    kwargs = config.task.kwargs
    if shared.TINY.value:
        kwargs.cached = True
        config.num_steps = 20
    else:
        kwargs.update({'base': shared.BASE.value or kwargs.base, 'draft_ids': shared.DRAFT_IDS.value})
        if shared.DRAFT_IDS.value:
            kwargs.m2r2.draft_vocab = len(np.load(shared.DRAFT_IDS.value))
    kwargs.m2r2.update({'exits': (exit_layer,), 'carry': carry, 'stream': stream})
    kwargs.unroll = kwargs.unroll if carry else 1
    config.num_steps = shared.STEPS.value or config.num_steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.num_steps // 4)
    return config


def main(argv: list[str]) -> None:
    every = TINY_EXITS if shared.TINY.value else EXITS
    shared.compare('train_m2r2', {name: every[name] for name in shared.WHICH.value or every}, configure,
                   lambda shape: dict(zip(('exit', 'carry', 'stream'), shape, strict=True)))


if __name__ == '__main__':
    app.run(main)
