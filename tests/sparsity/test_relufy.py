"""ReLU in the place of SiLU: what is swapped, what heals, what is counted, and that a run is a plain model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.config import MoeConfig
from backbone.errors import ConfigError
from backbone.formats.tensors import Loaded, flatten, params_hash
from backbone.layers import norm
from backbone.model import forward, hidden_and_taps
from configs import relufy as config_file
from harness import models, train, train_step
from sparsity import relufy
from sparsity.relufy_task import RelufyTask, build
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

DENSE = tiny_config(vocab=61, hidden=16, layers=2, heads=2, kv_heads=1)
CFG = relufy.config(DENSE)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 25)).astype(np.int32)


@pytest.fixture(scope='module')
def dense():
    return jax.tree.map(np.asarray, lively(DENSE))


def batch_of(tokens):
    shape = (len(tokens), tokens.shape[1] - 1)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(shape, np.float32),
            'segments': np.zeros(shape, np.int32), 'positions': np.tile(np.arange(shape[1], dtype=np.int32), (4, 1))}


def test_only_the_activation_is_swapped_and_only_where_there_is_one_to_swap():
    assert dataclasses.replace(CFG.mlp, activation='silu') == DENSE.mlp and CFG.replace(mlp=DENSE.mlp) == DENSE
    for wrong in (CFG, DENSE.replace(moe=MoeConfig(4, 2))):
        with pytest.raises(ConfigError, match='moe|relu'):
            relufy.config(wrong)


def test_zeros_are_those_of_the_gate_and_a_silu_has_none(dense):
    """Counted beside the pass: the same states as an ordinary pass, and the share of gates that are not above zero."""
    hidden, zeros, size = relufy.run(CFG, dense, TOKENS)
    taps = [f'{kind}:{l}' for kind in ('hidden', 'mixer') for l in range(2)]
    plain, seen = hidden_and_taps(CFG, dense, TOKENS, tuple(taps))
    np.testing.assert_allclose(hidden, plain, atol=1e-5)
    for l in range(2):
        p = jax.tree.map(lambda a, l=l: a[l], dense['layers'])
        gate = norm(CFG, p['mlp_norm'], seen[f'hidden:{l}'] + seen[f'mixer:{l}']) @ p['mlp']['gate']['kernel']
        np.testing.assert_allclose(zeros[..., l], (gate <= 0).mean(-1), atol=0.03)  # a gate may lie at zero's edge
    assert 0.2 < zeros.min() and size.min() > 0
    np.testing.assert_allclose(relufy.natural_sparsity(CFG, dense, TOKENS), zeros.mean((0, 1)), atol=1e-6)
    assert float(relufy.natural_sparsity(DENSE, dense, TOKENS).max()) == 0


@pytest.mark.parametrize('what', ('all', 'mlp'))
def test_only_what_is_healed_is_trained_and_the_rest_is_the_model_before(dense, what):
    task = RelufyTask(DENSE, train=what)
    params = task._of(dense)
    trained, frozen = train_step.split(flatten(params), task.trainable)
    assert set(frozen) == {f'base/{path}' for path in flatten(dense)}
    assert all('/mlp' in path for path in trained) == (what == 'mlp')
    moved = flatten(task.merged(params | {'relu': jax.tree.map(lambda a: a + 1, params['relu'])}))
    for path, a in flatten(dense).items():
        np.testing.assert_array_equal(moved[path], a + (f'relu/{path}' in trained))


def test_the_loss_is_the_divergence_from_the_model_before(dense):
    task = RelufyTask(DENSE, kd=1.0, ce=0.5, l1=0.1)
    params, batch = task._of(jax.tree.map(jnp.asarray, dense)), batch_of(TOKENS)
    loss, found = jax.jit(task.loss)(params, batch, jax.random.key(0))
    before, now = (jax.nn.log_softmax(forward(cfg, dense, batch['tokens'])) for cfg in (DENSE, CFG))
    gold = lambda a: -np.take_along_axis(np.asarray(a), batch['targets'][..., None], -1).mean()
    np.testing.assert_allclose(found['teacher_nll'], gold(before), rtol=1e-4)
    np.testing.assert_allclose(found['nll'], gold(now), rtol=1e-4)
    np.testing.assert_allclose(found['kl'], (jnp.exp(before) * (before - now)).sum(-1).mean(), rtol=1e-3)
    size = relufy.run(CFG, dense, batch['tokens'])[2].mean()
    np.testing.assert_allclose(loss, found['kl'] + 0.5 * found['nll'] + 0.1 * size, rtol=1e-4)
    # The same from kept states of the model before, in chunks; and the model itself, not swapped, has nothing to learn.
    kept = batch | task.features(params['base'], batch)
    again = dataclasses.replace(task, cached=True, loss_chunk=8)
    np.testing.assert_allclose(again.loss(params, kept, jax.random.key(0))[0], loss, rtol=1e-4)
    same = task.divergences(dense, dense, kept['hidden'], kept['hidden'], batch['targets'], batch['weights'])
    assert abs(float(same['kl'])) < 1e-3 < float(found['kl'])


@pytest.mark.slow
def test_a_run_heals_and_is_a_plain_model_with_relu(tmp_path):
    """Trained from files with kept states; the divergence falls, and the run directory loads as any model does."""
    cfg = DENSE.replace(vocab_size=257)
    base = jax.tree.map(np.asarray, lively(cfg))
    formats.save(Loaded(cfg, base, tokenizer.of_bytes(), 'base', params_hash(base)), tmp_path / 'base', 'headway')
    rng = np.random.default_rng(0)
    (tmp_path / 'text').mkdir()
    for name in ('train', 'validation'):
        rows = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 30))} for i in range(40)]
        (tmp_path / 'text' / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = config_file.get_config('tiny')
    config.task.kwargs = {'base': str(tmp_path / 'base'), 'cached': True, 'positions': 16}
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(tmp_path / 'text'), 'tokenizer': 'bytes',
                        'seq_len': 32, 'batch_size': 8, 'data_dir': str(tmp_path / 'made')})
    config.num_steps, config.optimizer.warmup_steps, config.checkpoint.every = 30, 3, 30
    config.eval.update({'every': 15, 'batches': 2})
    assert train.run(config, tmp_path / 'run', say=lambda *_: None) == 'finished'
    kl = [row['kl'] for row in map(json.loads, (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines())
          if row['kind'] == 'eval']
    assert kl[-1] < kl[0]
    loaded = models.load(tmp_path / 'run')
    before = formats.load(str(tmp_path / 'base'))
    assert loaded.config == relufy.config(before.config) and loaded.decodes is None
    assert loaded.base_hash == params_hash(loaded.params) != before.base_hash
    target, params = models.target(loaded, packed=False)
    output = target.forward(params, jnp.asarray(TOKENS[:1]), target.init_cache(1, 32, 0))
    np.testing.assert_allclose(output.logits, forward(loaded.config, loaded.params, TOKENS[:1]), atol=1e-4)
    assert np.abs(output.logits - forward(loaded.config, before.params, TOKENS[:1])).max() > 1e-3, 'the swap alone'


def test_the_config_names_what_it_does_not_know():
    with pytest.raises(ValueError, match='unknown variant'):
        config_file.get_config('stories/after')
    assert config_file.get_config('stories/before').num_steps == 1
    assert train_step.build_task(config_file.get_config('tiny')).cfg.mlp.activation == 'relu'
    for wrong in ({'model': 'stories-15m', 'depth': 1}, {'model': 'stories-15m', 'base': 'stories-15m'},
                  {'model': 'stories-15m', 'train': 'gates'}, {'model': 'stories-15m', 'kd': 0.0}):
        with pytest.raises(ConfigError, match='task.kwargs'):
            build(**wrong)
