"""What staggering can learn: recall, which takes two layers, with stacks of one layer each."""

import jax
import numpy as np
import optax
import pytest

from backbone.language_model import build as build_plain
from configs import training
from stagformer.task import build

PAIRS, KEYS, VALUES = 4, 8, 8


def recall(rng, rows):
    """Keys each with its value, then the keys again in another order: what follows each of these is its value.

    At a key nothing but its own token is known; who came after it is known at that other token, to one that looked
    back from there. So one layer must come after another, but it need not be at the same position.
    """
    keys = np.argsort(rng.random((rows, KEYS)), 1)[:, :PAIRS]
    values = KEYS + rng.integers(0, VALUES, (rows, PAIRS))
    again = np.argsort(rng.random((rows, PAIRS)), 1)
    pairs = np.stack([keys, values], -1)
    tokens = np.concatenate([pairs, np.take_along_axis(pairs, again[..., None], 1)], 1).reshape(rows, -1)
    size = tokens.shape[1] - 1
    asked = (np.arange(size) >= 2 * PAIRS) & (np.arange(size) % 2 == 0)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': np.ones((rows, size), np.int32),
            'positions': np.tile(np.arange(size), (rows, 1)), 'weights': np.tile(asked.astype(np.float32), (rows, 1))}


def accuracy(task, steps):
    """Of the answers, after training on fresh rows."""
    rng = np.random.default_rng(0)
    params = jax.jit(task.init)(jax.random.key(0))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, steps)))
    lots = jax.tree.map(lambda *a: np.stack(a), *[recall(rng, 64) for _ in range(steps)])

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(lambda p: task.loss(p, batch, None)[0])(params)
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), lots))(params)
    return float(jax.jit(task.loss)(params, recall(rng, 512), None)[1]['accuracy'])


def shape(layers):
    return training.llama(vocab=KEYS + VALUES, hidden=32, layers=layers, heads=2, kv_heads=2, intermediate=64,
                          max_seq_len=32) | {'embed_scale': 50.0}


@pytest.mark.slow
def test_two_stacks_of_one_layer_recall_and_one_layer_does_not():
    steps = 400
    assert accuracy(build_plain(shape(1)), steps) < 0.5, 'one layer can only guess among the values it has seen'
    assert accuracy(build(shape(2)), steps) > 0.95
    # The control: what a stack reads is the pair it looks for, so a window that has not got it is of no use.
    assert accuracy(build(shape(2), stagger={'window': 1}), steps) < 0.8
