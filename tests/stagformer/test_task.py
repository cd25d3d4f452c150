"""Training a staggered model: the loss, what saves memory leaves it alone, a run through the ordinary loop, and what
staggering can learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backbone.errors import ConfigError, FingerprintMismatch
from backbone.formats.tensors import flatten
from backbone.language_model import LanguageModel
from configs import stagformer as configs
from configs import training
from harness import models, roofline, train
from harness.train_step import build_task
from stagformer import model
from stagformer.task import build

SHAPE = training.llama(vocab=97, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, max_seq_len=64)


@pytest.fixture(scope='module')
def task():
    return build(SHAPE, stagger={'window': 5})


@pytest.fixture(scope='module')
def params(task):
    return jax.jit(lambda key: jax.tree.map(lambda a: 1.5 * a, task.init(key)))(jax.random.key(0))


@pytest.fixture(scope='module')
def batch():
    """Two rows of 16, the first of two documents, one token without weight."""
    rng = np.random.default_rng(0)
    segments = np.ones((2, 16), np.int32)
    segments[0, 7:] = 2
    positions = np.arange(16)[None].repeat(2, 0)
    positions[0, 7:] -= 7
    weights = np.ones((2, 16), np.float32)
    weights[0, 6] = 0
    return {'tokens': rng.integers(0, 97, (2, 16)), 'targets': rng.integers(0, 97, (2, 16)), 'segments': segments,
            'positions': positions, 'weights': weights}


@pytest.fixture(scope='module')
def graded(task):
    """(params, batch) -> ((loss, metrics), gradients)."""
    return jax.jit(lambda params, batch: jax.value_and_grad(task.loss, has_aux=True)(params, batch, None))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_nll_of_the_last_stack_document_by_document(task, params, batch, graded):
    (value, metrics), _ = graded(params, batch)
    documents = ((0, 0, 7), (0, 7, 16), (1, 0, 16))  # row, start, stop: each at the start of a row of its own
    alone = {name: np.stack([np.resize(batch[name][row, start:stop], 16) for row, start, stop in documents])
             for name in ('tokens', 'targets', 'weights')}
    logits = jax.jit(lambda p, tokens: model.forward(task.model, p, tokens))(params, alone['tokens'])
    inside = np.arange(16) < np.array([[stop - start] for _, start, stop in documents])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, alone['targets'])
    expected = float((each * alone['weights'] * inside).sum()) / 31
    assert float(metrics['weight']) == 31
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    mingled = batch | {'segments': np.ones((2, 16), np.int32)}
    assert abs(float(graded(params, mingled)[0][0]) - expected) > 1e-3


def test_chunks_and_recomputation_change_neither_loss_nor_gradient(task, params, batch, graded):
    thrifty = dataclasses.replace(task, remat='full', loss_chunk=4, query_chunk=4)
    (loss, _), grads = graded(params, batch)
    found = jax.jit(lambda params: jax.value_and_grad(thrifty.loss, has_aux=True)(params, batch, None))(params)
    np.testing.assert_allclose(found[0][0], loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found[1], grads)
    assert all(float(jnp.abs(g).max()) > 0 for g in flatten(grads).values()), 'the lower stack learns by what is read'


def test_one_stack_is_the_plain_language_model(task, params, batch):
    plain, one = LanguageModel(task.cfg), build(SHAPE, stacks=1)
    whole = {'base': params['base'], 'stagformer': {}}
    losses = [jax.jit(t.loss)(whole, batch, jax.random.key(0))[0] for t in (plain, one)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert one.train_flops(2, 16) == roofline.train_flops(plain.cfg, 2, 16)
    assert jax.eval_shape(one.init, jax.random.key(0))['stagformer'] == {}


def test_flops_count_both_passes_and_what_is_seen(task):
    separate, shared = build(SHAPE), build(SHAPE | {'num_layers': 1}, stagger={'shared': True})
    assert separate.train_flops(2, 64) == shared.train_flops(2, 64) > task.train_flops(2, 64)
    extra = separate.train_flops(2, 64) - roofline.train_flops(separate.cfg, 2, 64)
    projections = 32 * 32 * 2 + 32 * 16 * 2  # q and o, k and v
    assert extra == 6 * 2 * (64 * projections + 2 * 32 * 63 * 64 // 2)  # position i sees i others


@pytest.mark.parametrize(('arguments', 'said'), [
    ({'stagger': {'windows': 3}}, 'stagger: unknown windows'), ({'chunk': 3}, 'unknown chunk'),
    ({'stacks': 3}, '2 layers are not 3 stacks'), ({'depths': (2, 1)}, 'are 3 layers, the base has 2'),
    ({'stagger': {'window': 0}}, 'window must be at least 1'), ({'remat': 'some'}, 'remat'),
    ({'attention': 'flashy'}, 'attention'), ({'overrides': {'layers': 3}}, 'layers')])
def test_what_cannot_be_trained_is_refused_by_name(arguments, said):
    with pytest.raises(ConfigError, match=said):
        build(SHAPE, **arguments)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config():
    config = configs.get_config('toy/shared')
    config.task.kwargs.base.update({'vocab_size': 257, 'num_layers': 1})
    config.task.kwargs.stagger.window = 8
    config.eval.update({'every': 5, 'batches': 2})
    return config


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'shared'
    assert train.run(config, folder, say=lambda *_: None) == 'finished'
    return folder


def test_a_run_learns_and_its_directory_is_the_model(workdir, config):
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    nll = [row['nll'] for row in rows if row['kind'] == 'eval']
    assert len(nll) == 2 and nll[1] < nll[0] < 6
    loaded = models.load(workdir)
    assert set(loaded.tree) == {'base', 'stagformer'}
    target, params = models.target(loaded)  # by the names that Task.decodes gives
    assert target.cfg == build_task(config).model and target.cfg.window == 8
    tokens = jnp.arange(12)[None]
    logits = jax.jit(lambda p: target.forward(p, tokens, target.init_cache(1, 16, 11)).logits)(params)
    expected = jax.jit(lambda p: model.forward(target.cfg, p, tokens))(loaded.tree)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_checkpoint_of_other_stacks_is_refused_by_name(workdir, config):
    other = config.copy_and_resolve_references()
    other.task.kwargs.stacks = 3
    with pytest.raises(FingerprintMismatch, match='task.kwargs.stacks 2 -> 3'):
        train.run(other, workdir, say=lambda *_: None)
