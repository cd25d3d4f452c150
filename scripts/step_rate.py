"""How much of the matrix product rate a training step reaches, both measured in turns in one run.

    python scripts/step_rate.py --config=configs/base_30m.py --config.data.batch_size=8

Random tokens: what they are does not change the work. FLOPs are the model's (roofline.train_flops): scores above the
diagonal and what is computed again do not count. The product is 1024 x 1024 x 1024 in the step's dtype.
"""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from backbone.mesh import make_mesh
from harness import roofline
from harness.results import Spread
from harness.train_step import place_batch, plan

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base_30m.py', 'Whose step.')
REPEATS = flags.DEFINE_integer('repeats', 7, 'Steps that are timed.')


def timed(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    config = CONFIG.value
    rows, size = config.data.batch_size, config.data.seq_len
    with jax.set_mesh(make_mesh()):
        made = plan(config, make_mesh())
        ids = np.random.default_rng(0).integers(0, made.task.cfg.vocab_size, (rows, size + 1))
        batch = place_batch({'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'segments': np.ones((rows, size)),
                             'positions': np.arange(size)[None].repeat(rows, 0), 'weights': np.ones((rows, size))},
                            made.batch, 0)
        state = made.init()
        square = jnp.full((1024, 1024), 0.5, config.compute_dtype)
        product = jax.jit(lambda a: a @ a)

        def products():
            for _ in range(4):
                product(square).block_until_ready()

        def step():
            nonlocal state
            state, metrics = made.step(state, batch)
            return metrics

        compile_s = timed(step)
        timed(products)
        pairs = [(timed(products), timed(step)) for _ in range(REPEATS.value)]
    flops = roofline.train_flops(made.task.cfg, rows, size)
    rates = [8 * 1024**3 / a for a, _ in pairs]
    print(json.dumps({
        'parameters': sum(a.size for a in made.state.params.values()), 'compile_s': compile_s,
        'step_s': vars(Spread.of([b for _, b in pairs])), 'product_flops_per_s': vars(Spread.of(rates)),
        'tokens_per_s': rows * size / Spread.of([b for _, b in pairs]).median,
        'share_of_product_rate': vars(Spread.of([flops / b / r for (_, b), r in zip(pairs, rates, strict=True)]))},
        indent=1))


if __name__ == '__main__':
    app.run(main)
