"""Predictors: what they read, that they learn what is in it and nothing else, and what the measures of that say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats.tensors import flatten, unflatten
from configs import sparsity_predictor, training
from harness import artefacts, components, train, zoo
from sparsity import measures, predictor, predictor_task, spans
from sparsity.config import PARTS
from sparsity.predictor import PredictorConfig

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = ModelConfig.from_dict(training.llama(vocab=257, hidden=16, layers=3, heads=4, kv_heads=2, intermediate=24,
                                           max_seq_len=32))
SHAPE = {'width_heads': 16, 'width_neurons': 16, 'head_unit': 'head', 'block': 2}
P = PredictorConfig(**SHAPE)
of_part = jax.jit(measures.of_part, static_argnums=2)


def filled(p: PredictorConfig, seed: int = 0, tree: dict | None = None) -> dict:
    """Random parameters of init's shapes, at no compilation."""
    rng = np.random.default_rng(seed)
    shapes = tree or jax.eval_shape(lambda key: predictor.init_params(CFG, p, key), jax.random.key(0))
    return jax.tree.map(lambda a: (rng.normal(size=a.shape) * max(a.shape[-2:-1] + (1,))**-0.5).astype(np.float32),
                        shapes)


def contexts(seed: int, rows: int, *lead: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, *lead, 16)).astype(np.float32)


@pytest.mark.parametrize('kind', predictor.KINDS)
def test_every_row_is_read_by_itself(kind):
    """A row's scores are the same alone and among others, whatever it is scaled by; a range over the batch would make
    them depend on neighbours."""
    p = dataclasses.replace(P, kind=kind)
    params = filled(p)
    x = contexts(0, 3, *(() if kind == 'unified' else (3,)))
    scale = np.float32([1, 9, 0.1]).reshape(3, *[1] * (x.ndim - 1))
    run = lambda x: predictor.predict(CFG, p, params, x)
    together, alone = run(x * scale), run(x[:1])
    assert together['heads'].shape == (3, 3, 4) and together['neurons'].shape == (3, 3, 12)
    for part in PARTS:
        np.testing.assert_allclose(together[part][:1], alone[part], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together[part], run(x)[part], rtol=1e-4, atol=1e-5)  # a scale says nothing
        assert together[part].dtype == jnp.float32
    assert not np.allclose(predictor.unit_range(x, None)[:1], predictor.unit_range(x)[:1])
    assert (predictor.unit_range(np.ones((2, 5))) == 0).all()


def test_which_layers_each_kind_reads():
    """Of the scores of layer 1: per_layer its own context, dejavu the residual of the layer before, through nothing
    that bends."""
    x = contexts(1, 1, 3)
    for kind, layer in (('per_layer', 1), ('dejavu', 0)):
        p = dataclasses.replace(P, kind=kind)
        params = filled(p)
        slope = jax.grad(lambda x, p=p, params=params: predictor.predict(CFG, p, params, x)['neurons'][0, 1].sum())(x)
        assert [bool(np.abs(slope[0, l]).max() > 1e-6) for l in range(3)] == [l == layer for l in range(3)]
    length = np.sqrt(np.square(x).mean(-1, keepdims=True))
    says = lambda x: np.asarray(predictor.predict(CFG, p, params, x)['heads'])
    np.testing.assert_allclose(says(-x), -says(x), rtol=1e-4, atol=1e-6)
    assert set(flatten(params)) == {f'{part}/{end}/kernel' for part in PARTS for end in ('in', 'out')}
    assert np.isfinite(length).all() and predictor.dejavu_widths(CFG) == {'width_heads': 2, 'width_neurons': 4}


@pytest.fixture(scope='module')
def world():
    """(contexts [N, 16], scores) for training and held out: structure that all inputs share, and some that hangs on
    the input, in layers of very different scale."""
    rng = np.random.default_rng(2)
    shared = {'heads': rng.random((3, 4)) * 2, 'neurons': rng.random((3, 12)) * 2}
    mix = {part: rng.normal(size=(16, *a.shape)) for part, a in shared.items()}
    scale = np.float32([1e-4, 1, 50])[:, None]

    def make(seed: int) -> dict:
        x = contexts(seed, 192)
        unit = np.asarray(predictor.unit_range(x)) - 0.5
        return {'context': x} | {part: (scale * np.exp(shared[part] + np.einsum('be,eln->bln', unit, mix[part]))
                                        ).astype(np.float32) for part in PARTS}
    return make(3), make(4)


@pytest.mark.parametrize('loss', predictor.LOSSES)
def test_it_learns_what_the_mean_cannot_know(world, loss):
    """On inputs it has not seen the predictor ranks better than the mean vector; on the inputs of other examples it
    falls to the mean vector or below: what it knew was context, not structure."""
    train, held_out = world
    p = dataclasses.replace(P, loss=loss)
    optimiser = optax.adam(0.01)

    @jax.jit
    def fit(params):
        def total(params, rng):
            guess = predictor.predict(CFG, p, params, train['context'])
            return sum(predictor.loss(CFG, p, part, guess[part], train[part], rng).mean() for part in PARTS)

        def step(carry, rng):
            params, state = carry
            value, grads = jax.value_and_grad(total)(params, rng)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), value
        keys = jax.random.split(jax.random.key(0), 250)
        (params, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), keys)
        says = lambda x: predictor.predict(CFG, p, params, x)
        return losses, says(held_out['context']), says(jnp.roll(held_out['context'], 1, 0))

    losses, own, shuffled = fit(filled(p))
    assert losses[-1] < losses[0]
    for part in PARTS:
        truth, k = held_out[part], p.kept(CFG, part)
        of = lambda guess, truth=truth, k=k: {name: float(a.mean()) for name, a in
                                              of_part(truth, jnp.asarray(guess), k).items()}
        mean, oracle = of(np.broadcast_to(train[part].mean(0), truth.shape)), of(truth)
        mine, other = of(own[part]), of(shuffled[part])
        assert mean['rho'] > 0.2  # a good part is structure, which is why it has to be reported
        assert mine['rho'] > mean['rho'] + 0.1 and mine['recall'] > mean['recall'] and mine['mass'] > mean['mass']
        assert other['rho'] < mean['rho'] + 0.02
        assert oracle['rho'] > 0.9999 and oracle['recall'] == 1 and oracle['mass'] >= mine['mass'] > other['mass']


def test_targets_over_all_layers_let_the_loudest_speak():
    """A layer of large scores leaves the others nothing; by layer each has its own range."""
    truth = np.random.default_rng(5).random((2, 3, 4)).astype(np.float32) * np.float32([1e-3, 1, 30])[:, None]
    zero = jnp.zeros((2, 3, 4))
    by = lambda targets, which: predictor.loss(CFG, dataclasses.replace(P, targets=targets), 'heads', zero, which, None)
    quiet = truth.copy()
    quiet[:, 0] = quiet[:, 0, ::-1] ** 2
    np.testing.assert_allclose(by('all', truth), by('all', quiet), rtol=1e-4)
    assert not np.allclose(by('layer', truth), by('layer', quiet), rtol=1e-2)


def test_labels_of_membership():
    """The best share of each layer, or what a ReLU lets through; the rare side weighs more."""
    truth = jnp.asarray([[[3., 1, 0, 2], [0, 0, 0, 5], [1, 2, 3, 4]]])
    right = jnp.where(truth > 0, 9., -9.)
    near = lambda part, members, guess: float(predictor.loss(
        CFG, dataclasses.replace(P, loss='bce', members=members, block=6), part, guess, truth, None)[0])
    assert near('neurons', 'active', right) < 1e-3 < near('neurons', 'top', right)
    top = jnp.asarray([[[9., -9, -9, 9], [9, -9, -9, 9], [-9, -9, 9, 9]]])  # of equal ones the first
    assert near('heads', 'top', top) < 1e-3 and near('heads', 'active', top) < 1e-3  # active is about neurons


def test_measures():
    """Against scipy, with ties; and nothing holds more than the best of the scores themselves: exactly so."""
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 6, (2, 20, 15)).astype(np.float32)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(measures.spearman(a, b), expected, atol=1e-5)
    assert measures.spearman(a, jnp.ones_like(a)).tolist() == [0] * 20
    for k in (4, 15):
        most = measures.mass(a, a, k)
        assert (most >= measures.mass(a, b, k)).all() and (measures.recall(a, a, k) == 1).all()
        assert (measures.mass(a, -a, k) < most).any() == (k < 15)
    assert measures.mass(jnp.zeros((1, 4)), jnp.ones((1, 4)), 2) == 1


def test_in_int8_it_ranks_the_same():
    """A quarter of the bytes, as an artefact stores it; two bits would not do."""
    params, x = filled(P, 7), contexts(8, 32)
    stored = zoo.quantise({path: np.asarray(a) for path, a in flatten(params).items()}, ('.*/kernel',))
    assert sum(a.nbytes for a in stored.values()) < 0.5 * sum(a.nbytes for a in flatten(params).values())
    coarse = jax.tree.map(lambda a: np.round(a / np.abs(a).max() * 1.5).astype(np.float32), params)
    run = lambda tree: predictor.predict(CFG, P, tree, x)['neurons']
    rho = lambda tree: float(measures.spearman(run(params), run(tree)).mean())
    assert rho(unflatten(zoo.dequantise(stored))) > 0.98 > rho(coarse)


def batch_of(rows: int = 2, size: int = 16) -> dict:
    rng = np.random.default_rng(9)
    return {'tokens': rng.integers(0, 257, (rows, size)).astype(np.int32),
            'targets': rng.integers(0, 257, (rows, size)).astype(np.int32),
            'segments': np.ones((rows, size), np.int32), 'weights': np.ones((rows, size), np.float32),
            'positions': np.broadcast_to(np.arange(size, dtype=np.int32), (rows, size))}


@pytest.fixture(scope='module')
def task():
    return predictor_task.build(model=CFG.to_dict(), predictor=SHAPE, window=4)


@pytest.fixture(scope='module')
def params(task):
    return jax.tree.map(jnp.asarray, filled(P, tree=jax.eval_shape(task.init, jax.random.key(0))))


@pytest.fixture(scope='module')
def made(task, params):
    """The features of a batch, those of label 'ahead', and what kept ones give as loss and metrics."""
    batch, kept = batch_of(), dataclasses.replace(task, cached=True)

    @jax.jit
    def run(params):
        features = task.features(params['base'], batch)
        return (features, dataclasses.replace(task, label='ahead').features(params['base'], batch),
                kept.loss(params, batch | features, jax.random.key(1)))
    return run(params)


def test_a_step_moves_the_predictor_alone_and_kept_labels_are_the_same(task, params, made):
    batch, rng = batch_of(), jax.random.key(1)
    value, grads = jax.jit(jax.value_and_grad(lambda p: task.loss(p, batch, rng)[0]))(params)
    moved = {path.split('/')[0] for path, g in flatten(grads).items() if np.abs(g).max() > 0}
    assert moved == {'sparsity'}
    features, _, (again, metrics) = made
    assert {name: a.shape for name, a in features.items()} == {
        'context': (2, 4, 16), 'heads': (2, 4, 3, 4), 'neurons': (2, 4, 3, 12), 'known': (2, 4)}
    np.testing.assert_allclose(again, value, rtol=1e-5)
    assert metrics['weight'] == 8 and {f'{part}_{name}{of}' for part in PARTS for of in ('', '_mean')
                                       for name in ('rho', 'rho_flat', 'recall', 'mass')} <= set(metrics)


def test_labels_of_the_window_alone_differ_from_those_of_the_rest(task, made):
    batch = batch_of()
    one, two, _ = made
    np.testing.assert_allclose(one['context'], two['context'], rtol=1e-5)
    assert one['neurons'].shape == two['neurons'].shape
    assert not np.allclose(one['neurons'][:, 0] / 4, two['neurons'][:, 0], rtol=0.05)
    # The last window has nothing after it: there they are the same, but for what the mean is over.
    np.testing.assert_allclose(one['neurons'][:, -1] * 4, two['neurons'][:, -1], rtol=1e-3)
    names = {dataclasses.replace(task, **change).feature_name for change in (
        {}, {'label': 'ahead'}, {'window': 8}, {'length': 1}, {'criterion': 'fisher'}, {'label': 'prompt', 'cut': 3},
        {'predictor': dataclasses.replace(P, block=1)}, {'predictor': dataclasses.replace(P, kind='dejavu')})}
    assert len(names) == 8  # what is kept is never taken for something else
    assert dataclasses.replace(task, predictor=dataclasses.replace(P, loss='rank')).feature_name in names
    assert isinstance(task.spans(batch), spans.Spans)


@pytest.mark.parametrize(('change', 'words'), (
    ({'predictor': {'kind': 'deep'}}, "predictor.kind: unknown 'deep'"), ({'predictor': {'size': 2}}, 'unknown field'),
    ({'predictor': {'block': 5}}, 'does not divide'), ({'criterion': 'size'}, "criterion: unknown 'size'"),
    ({'windows': 3}, 'unknown windows'), ({'window': 0}, 'at least 1'), ({'base': 'stories-15m'}, 'either base')))
def test_what_cannot_be_trained_is_named(change, words):
    with pytest.raises(ConfigError, match=words):
        predictor_task.build(**({'model': CFG.to_dict()} | change))


@pytest.mark.parametrize('variant', ('stories', 'smollm2-dejavu', 'tiny-per_layer'))
def test_configs_name_fields_that_exist(variant):
    kwargs = sparsity_predictor.get_config(variant).task.kwargs.to_dict()
    made = predictor_task.build(**{k: v for k, v in kwargs.items() if k not in ('base', 'model')}
                                | {'model': kwargs.get('model', CFG.to_dict()),
                                   'predictor': kwargs['predictor'] | {'block': 2}})
    assert made.predictor.kind == {'stories': 'unified', 'smollm2-dejavu': 'dejavu'}.get(variant, 'per_layer')
    with pytest.raises(ValueError, match='unknown variant'):
        sparsity_predictor.get_config(variant + 'x')


@pytest.mark.slow
@pytest.mark.parametrize('cached', (False, True))
def test_a_run_learns_and_is_measured(tmp_path, cached):
    """The tiny config as headway-train runs it, and the script that compares with the mean vector."""
    from scripts import sparsity_artefact
    from scripts import sparsity_predictor as measured

    rng = np.random.default_rng(0)
    (tmp_path / 'text').mkdir()
    for name in ('train', 'validation'):
        text = '\n'.join(json.dumps({'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 40))})
                         for i in range(40))
        (tmp_path / 'text' / f'{name}.jsonl').write_text(text)
    config = sparsity_predictor.get_config('tiny')
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(tmp_path / 'text'), 'data_dir': str(tmp_path / 'data')})
    config.task.kwargs.cached = cached
    assert train.run(config, tmp_path / 'run', say=lambda *_: None) == 'finished'
    task, params, _ = measured.models.read_run(tmp_path / 'run', None)
    rows = measured.data.open_rows(config.data, 'validation', measured.data.make_tokenizer(config.data))
    mean = measured.mean_of(task, params['base'], rows, 8, 4)
    table = measured.measure(task, jax.device_put(params), rows, 5, mean, 4)
    assert table['neurons']['oracle']['rho'][0] > 0.999 and abs(table['neurons']['random']['rho'][0]) < 0.15
    assert table['neurons']['predictor']['rho'][0] > table['neurons']['random']['rho'][0] + 0.1
    if cached:
        return
    with pytest.raises(FormatError, match='sparsity_artefact.py'):
        artefacts.to_zoo('mine', tmp_path / 'run', {}, None, tmp_path / 'zoo')
    card = sparsity_artefact.main(sparsity_artefact.parse([f'--workdir={tmp_path / "run"}', '--name=mine',
                                                           f'--root={tmp_path / "zoo"}']))
    tree, found = zoo.load('mine', card['base_hash'], root=tmp_path / 'zoo')
    build = lambda spec: components.build(spec['factory'], spec['kwargs'], {}, 'mine')
    assert build(found['target']).selector.p == task.predictor and set(tree) == {'sparsity'}
