"""A dense model taken apart and put together as a staggered one, and healed towards what it was."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.errors import ConfigError
from backbone.formats.tensors import Loaded, flatten, params_hash
from backbone.layers import norm, qkv
from backbone.model import abstract_params, sequence_context
from backbone.model import forward as plain_forward
from backbone.presets import preset
from configs import stagformer_heal
from harness import models, train, train_step
from stagformer import distill
from stagformer.convert import convert, shape
from stagformer.model import context_of, cross_keys, forward, stack_layers, stack_outputs
from tests.conftest import tiny_config

TOKENS = np.arange(14).reshape(2, 7) * 5 % 97


@pytest.fixture(scope='module')
def dense():
    """(config, parameters) of a model of bytes, sure of what it says, whose norms have scales that matter."""
    cfg, rng = tiny_config(vocab=257, tie_embeddings=False), np.random.default_rng(3)

    def leaf(path, like):
        if path[-1].key == 'scale':
            return rng.uniform(0.6, 1.5, like.shape).astype(np.float32)
        size = 3 if path[0].key == 'lm_head' else 1.5
        return (size * like.shape[-2]**-0.5 * rng.normal(size=like.shape)).astype(np.float32)
    return cfg, jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg))


def plain(cfg, params):
    """Logits of the plain model of the layers there are."""
    return _plain(cfg.replace(num_layers=len(params['layers']['attn_norm']['scale'])), params)


_plain = jax.jit(lambda cfg, params: plain_forward(cfg, params, TOKENS), static_argnums=0)


@pytest.mark.parametrize(('kwargs', 'last'), (
    ({}, (2, 3)), ({'depths': (2, 1, 1), 'context_from': 'all_prev', 'mix': True}, (3,)),
    ({'shared': True}, (0, 1, 2, 3)),
    pytest.param({'depths': (1, 3), 'window': 2}, (1, 2, 3), marks=pytest.mark.slow),
    pytest.param({'layers': (0, 2, 1, 0)}, (1, 0), marks=pytest.mark.slow)),
    ids=('halves', 'three', 'shared', 'uneven', 'chosen'))
def test_at_zero_the_last_stack_decides_alone(dense, kwargs, last):
    cfg, params = dense
    layers = kwargs.get('layers', ())
    made = shape(cfg, **kwargs)
    run = jax.jit(lambda p: forward(made, p, TOKENS))
    found = run(convert(made, params, layers))
    kept = jax.tree.map(lambda a: a[np.array(last)], params['layers'])
    np.testing.assert_allclose(found, plain(cfg, params | {'layers': kept}), atol=2e-5)
    if not kwargs.get('shared'):
        assert np.abs(found - plain(cfg, params)).max() > 0.5, 'a conversion that is not healed is another model'
    assert np.abs(run(convert(made, params, layers, 'copy')) - found).max() > 1e-2, 'a copied projection says something'


def test_copied_keys_and_values_are_those_the_dense_layer_would_make(dense):
    """Layer 2 reads of the stack below what it read of layer 1 before; not so if the norms' scales were forgotten."""
    cfg, params = dense
    made = shape(cfg)
    tree = convert(made, params, cross='copy')
    layer = jax.tree.map(lambda a: a[2], params['layers'])

    @jax.jit
    def both(tree):
        below = stack_outputs(made, tree, TOKENS)[0]
        ctx = sequence_context(cfg, TOKENS.shape)
        p = stack_layers(made, tree, 1)['cross']
        p = {name: {'kernel': p[name]['kernel'][0, 0]} for name in ('k', 'v')}  # of its first layer and only source
        ours = cross_keys(made, p, context_of(made, tree, 0, below), ctx.rope)
        return (ours.k, ours.v), qkv(cfg, layer['attn'], norm(cfg, layer['attn_norm'], below), ctx)[1:]

    ours, theirs = both(tree)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    tree['stagformer']['cross']['k'] = {'kernel': params['layers']['attn']['k']['kernel'][2:]}
    ours, theirs = both(tree)
    assert np.abs(ours[0] - theirs[0]).max() > 0.05


@pytest.mark.parametrize(('kwargs', 'cross', 'says'), (
    ({'layers': (0, 4)}, 'zero', 'layers: 4 is not among the 4'), ({'stacks': 3}, 'zero', '4 layers are not 3 stacks'),
    ({}, 'ones', "cross: unknown 'ones'"), ({'cross_kv_heads': 1}, 'copy', 'cross_kv_heads 1')))
def test_what_cannot_be_converted_is_named(dense, kwargs, cross, says):
    with pytest.raises(ConfigError, match=says):
        convert(shape(dense[0], **kwargs), dense[1], kwargs.get('layers', ()), cross)


# Healing --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teacher(dense, tmp_path_factory):
    """Path of the dense model on the disk."""
    cfg, params = dense
    path = tmp_path_factory.mktemp('dense') / 'model'
    formats.save(Loaded(cfg, params, tokenizer.of_bytes(), 'dense', params_hash(params)), path, 'headway')
    return str(path)


def words(count=2, size=48):
    """A batch whose second row holds two documents, and positions that do not count."""
    tokens = np.random.default_rng(0).integers(0, 257, (count, size + 1)).astype(np.int32)
    segments, weights = np.ones((count, size), np.int32), np.ones((count, size), np.float32)
    segments[1, 20:], weights[1, 19], weights[0, :5] = 2, 0, 0
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'weights': weights,
            'positions': np.arange(size, dtype=np.int32)[None].repeat(count, 0)}


def test_healing_brings_it_back_and_the_teacher_stays(teacher, tmp_path):
    config = stagformer_heal.get_config('tiny')
    config.task.kwargs = {'dense': teacher, 'loss_chunk': 16}
    text = tmp_path / 'text'
    text.mkdir()
    rng = np.random.default_rng(1)
    for name, count in (('train', 60), ('validation', 6)):
        rows = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 20))} for i in range(count)]
        (text / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(text), 'loss_on': 'all', 'seq_len': 48,
                        'batch_size': 8, 'data_dir': str(tmp_path / 'made')})
    config.update({'num_steps': 20, 'log_every': 1})
    config.optimizer.update({'learning_rate': 5e-3, 'warmup_steps': 2})
    config.eval.every = config.checkpoint.every = 10
    assert train.run(config, tmp_path / 'run', say=lambda *_: None) == 'finished'

    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    first, held_out = rows[0], [row for row in rows if row['kind'] == 'eval']
    assert first['kl'] > 1 and first['agreement'] < 0.5, 'unhealed it is far from the teacher'
    assert held_out[-1]['kl'] < held_out[0]['kl'] and held_out[-1]['kl'] < first['kl'] / 2
    assert held_out[-1]['agreement'] > first['agreement']
    assert held_out[-1]['teacher_nll'] == held_out[0]['teacher_nll'], 'it is frozen'
    healed = models.load(tmp_path / 'run').tree
    assert set(healed) == {'base', 'stagformer'}, 'the teacher is no part of the model'
    before = flatten(train_step.build_task(config).load())
    assert all(np.abs(leaf - before[name]).max() > 0 for name, leaf in flatten(healed).items()), 'all of it learns'


def test_the_loss_by_hand_and_in_chunks(teacher):
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(size=(2, 2, 6, 5))
    targets, weights = rng.integers(0, 5, (2, 6)), np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1.0]])
    sums = distill.compare(*map(jnp.asarray, (ours, theirs, targets, weights)), 2.0)
    law = lambda a: np.exp(a / 2) / np.exp(a / 2).sum(-1, keepdims=True)
    kl = 4 * (law(theirs) * np.log(law(theirs) / law(ours))).sum(-1)
    np.testing.assert_allclose(sums.kl, (kl * weights).sum(), rtol=1e-5)
    same = (ours.argmax(-1) == theirs.argmax(-1)) * weights
    np.testing.assert_allclose(sums.agreement, same.sum(), rtol=1e-6)
    assert float(distill.compare(*map(jnp.asarray, (theirs, theirs, targets, weights))).kl) == pytest.approx(0)

    task = distill.build(teacher, loss_chunk=12, temperature=1.5, cross='copy')
    params, batch = task.load(), words()
    loss, metrics = jax.jit(task.loss)(params, batch, None)

    @jax.jit
    def whole(params):
        segments = {'segments': batch['segments']}
        logits = (forward(task.model, params, batch['tokens'], **segments),
                  plain_forward(task.dense, params['teacher'], batch['tokens'], **segments))
        return distill.compare(*logits, batch['targets'], batch['weights'], 1.5)

    sums = whole(params)
    want = {'nll': sums.text.mean('nll'), 'kl': sums.mean('kl'), 'teacher_nll': sums.mean('teacher_nll'),
            'agreement': sums.mean('agreement'), 'accuracy': sums.text.mean('correct'), 'weight': sums.text.weight}
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, 0.9 * want['kl'] + 0.1 * want['nll'], rtol=1e-4)


def test_unknown_options_are_named():
    fields = {'dense': 'stories-15m', 'random': True}
    for options, says in (({'betta': 1}, 'betta'), ({'stagger': {'windw': 1}}, 'stagger.windw'), ({'beta': 2}, 'beta')):
        with pytest.raises(ConfigError, match=says):
            distill.build(**fields, **options)
    with pytest.raises(ConfigError, match='overrides need random'):
        distill.build('x', overrides={'num_layers': 2})


@pytest.mark.parametrize('model', ('stories', 'smollm2', 'gpu'))
def test_every_deal_halves_the_depth(model):
    cfg = preset('stories-15m' if model == 'stories' else 'smollm2-135m')
    half = cfg.num_layers // 2
    for deal in stagformer_heal.DEALS:
        kwargs = stagformer_heal.get_config(f'{model}/{deal}').task.kwargs.to_dict()
        layers = kwargs.get('layers', ())
        made = shape(cfg, kwargs.get('stacks', 2), (), layers, **kwargs.get('stagger', {}))
        assert made.depths == (half,) * (1 if deal == 'half' else 2), deal
        if layers:  # the upper stack begins and ends as the dense model does
            assert layers[-half] == 0 and layers[-1] == cfg.num_layers - 1
    assert stagformer_heal.get_config('gpu/ends_copy').task.kwargs.cross == 'copy'
    for bad in ('storys', 'gpu/end', ''):
        with pytest.raises(ValueError, match='unknown variant'):
            stagformer_heal.get_config(bad)


@pytest.mark.parametrize('deal', ('half', 'shared'))
def test_a_task_without_a_file_has_its_shapes(deal):
    task = train_step.build_task(stagformer_heal.get_config(f'tiny/{deal}'))
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert len(params['teacher']['layers']['attn_norm']['scale'].shape) == 2 and task.load() == {}
    loss, metrics = jax.eval_shape(task.loss, params, words(), jax.random.key(0))
    assert loss.shape == () and set(metrics) == {'nll', 'kl', 'teacher_nll', 'agreement', 'accuracy', 'weight'}
    assert task.train_flops(4, 64) > 0
