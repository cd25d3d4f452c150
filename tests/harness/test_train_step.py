"""One training step: what is trained, what stays, what a bad step does, and that the split of work changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from backbone.errors import ConfigError, TensorMismatch
from backbone.formats.tensors import flatten
from backbone.language_model import LanguageModel
from backbone.mesh import make_mesh
from configs import training
from harness import optimizer
from harness.train_step import host_rows, place_batch, plan
from tests.conftest import lively, tiny_config

ROWS, SIZE = 8, 16


@pytest.fixture(scope='module')
def wide():
    return tiny_config(vocab=64, hidden=32, heads=4, kv_heads=2)


def config(**changes):
    found = training.defaults()
    found.data.update({'batch_size': ROWS, 'seq_len': SIZE})
    found.optimizer.update({'warmup_steps': 0, 'schedule': 'constant', 'learning_rate': 1e-2})
    for key, value in changes.items():
        group, _, name = key.rpartition('__')
        (found[group] if group else found)[name] = value
    return found


def make_batch(seed=0):
    """Two documents a row, one target of each row not counted, and rows of unequal weight."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (ROWS, SIZE + 1))
    segments = np.where(np.arange(SIZE) < 6, 1, 2)[None].repeat(ROWS, 0)
    positions = np.concatenate([np.arange(6), np.arange(SIZE - 6)])[None].repeat(ROWS, 0)
    weights = np.ones((ROWS, SIZE), np.float32)
    weights[:, 5] = 0
    weights[:3, 9:] = 0
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'positions': positions,
            'weights': weights}


def steps(plan_, batches, state=None):
    state = plan_.init() if state is None else state
    seen = []
    with jax.set_mesh(plan_.mesh):
        for batch in batches:
            state, metrics = plan_.step(state, place_batch(batch, plan_.batch, 0))
            seen.append({k: float(v) for k, v in metrics.items()})
    return state, seen


def numbers(tree):
    return ravel_pytree(jax.tree.map(np.asarray, tree))[0]


def gradients_and_metrics(made):
    """(the first step's gradients, metrics of three steps, the last state).

    Adam's first moment after one step is 1 - b1 of the clipped gradient. Later ones compare less: where a gradient is
    nearly zero, Adam's first update turns its rounding into a whole step.
    """
    state, first = steps(made, [make_batch(0)])
    gradients = numbers(state.opt_state[1].mu) / (1 - 0.9)
    state, rest = steps(made, [make_batch(1), make_batch(2)], state)
    return gradients, first + rest, state


@pytest.fixture(scope='module')
def reference(wide):
    """Three steps on one device."""
    return gradients_and_metrics(plan(config(), make_mesh(), LanguageModel(wide)))


@pytest.mark.parametrize('changes, task', (
    ({'mesh__data': 4, 'mesh__model': 2, 'optimizer__accumulate': 2}, {}),
    ({'mesh__data': 8}, {'remat': 'full', 'loss_chunk': 4, 'query_chunk': 8}),
    ({'mesh__data': 2, 'mesh__model': 2, 'mesh__fsdp': False}, {'remat': 'dots'}),
), ids=('data4xmodel2_accumulate2', 'data8_remat_chunked', 'data2xmodel2_dots'))
@pytest.mark.filterwarnings('ignore:.*replicated')
def test_the_split_of_the_work_changes_nothing(wide, reference, changes, task):
    """Eight fake devices, microbatches, rematerialisation and chunks against one device at once."""
    made = config(**changes)
    mesh = make_mesh(**{k: made.mesh[k] for k in ('data', 'model')})
    gradients, seen, state = gradients_and_metrics(plan(made, mesh, LanguageModel(wide, **task)))
    np.testing.assert_allclose(gradients, reference[0], atol=1e-5)
    for ours, theirs in zip(seen, reference[1], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5)
        assert ours['grad_norm'] == pytest.approx(theirs['grad_norm'], abs=1e-4)
    if mesh.size > 1:
        assert any(not a.sharding.is_fully_replicated for a in state.params.values())


def test_unequal_microbatches_would_show(wide, reference):
    """Negative control: the mean of microbatch means is not the mean over tokens; the rows here are uneven."""
    batch = make_batch(0)
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    task = LanguageModel(wide)
    params = task.init(jax.random.key(0))
    loss = jax.jit(lambda batch: task.loss(params, batch, None)[0])
    assert abs(np.mean([loss(half) for half in halves]) - loss(batch)) > 1e-4


@dataclasses.dataclass(frozen=True)
class HeadOnly(LanguageModel):
    """Trains the final norm and the last matrices on a base that comes from elsewhere."""

    trainable: tuple[str, ...] = ('base/final_norm/.*', 'base/layers/mlp/down/kernel')

    def load(self):
        return {'base': jax.tree.map(np.asarray, lively(self.cfg, seed=3))}


def test_frozen_leaves_stay_bit_identical_and_have_no_optimiser_state(wide):
    task = HeadOnly(wide)
    made = plan(config(), make_mesh(), task)
    before = flatten(task.load())
    state, _ = steps(made, [make_batch(i) for i in range(3)])
    assert set(state.params) == {'base/final_norm/scale', 'base/layers/mlp/down/kernel'}
    assert set(state.frozen) | set(state.params) == set(before)
    for path, leaf in state.frozen.items():
        assert np.array_equal(np.asarray(leaf), before[path]), path
    for path, leaf in state.params.items():
        assert not np.array_equal(np.asarray(leaf), before[path]), path
    assert set(state.opt_state[1].mu) == set(state.params)


def test_patterns_and_loaded_leaves_must_fit(wide):
    with pytest.raises(ConfigError, match='head/.*matches no parameter'):
        plan(config(), make_mesh(), LanguageModel(wide, trainable=('base/.*', 'head/.*')))

    class Wrong(HeadOnly):
        def load(self):
            return {'base': {'final_norm': {'scale': np.ones(7)}}}

    with pytest.raises(TensorMismatch, match='final_norm/scale'):
        plan(config(), make_mesh(), Wrong(wide))


@dataclasses.dataclass(frozen=True)
class Poisoned(LanguageModel):
    """Loss is not finite wherever token 63 is the first of a row."""

    def loss(self, params, batch, rng):
        loss, metrics = super().loss(params, batch, rng)
        bad = (batch['tokens'][:, 0] == 63).any()
        return jnp.where(bad, jnp.nan, 1.0) * loss, metrics


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(wide):
    made = plan(config(ema_decay=0.9), make_mesh(), Poisoned(wide))
    good = [make_batch(i) for i in range(3)]
    for batch in good:
        batch['tokens'][:, 0] = 1
    bad = {k: v.copy() for k, v in good[1].items()}
    bad['tokens'][0, 0] = 63
    state, seen = steps(made, [good[0]])
    before = numbers((state.params, state.opt_state, state.ema))
    state, seen = steps(made, [bad, bad], state)
    assert [m['bad_steps'] for m in seen] == [1, 2] and np.isnan(seen[0]['loss'])
    np.testing.assert_array_equal(numbers((state.params, state.opt_state, state.ema)), before)
    state, seen = steps(made, [good[2]], state)
    assert seen[0]['bad_steps'] == 0 and int(state.step) == 4
    assert not np.array_equal(numbers(state.params), before[:numbers(state.params).size])


def test_bfloat16_computes_narrow_and_keeps_float32_masters(wide, reference):
    state, seen = steps(plan(config(compute_dtype='bfloat16'), make_mesh(), LanguageModel(wide)),
                        [make_batch(i) for i in range(3)])
    assert {a.dtype for a in jax.tree.leaves((state.params, state.opt_state[1].mu))} == {jnp.dtype('float32')}
    differences = [abs(a['loss'] - b['loss']) for a, b in zip(seen, reference[1], strict=True)]
    assert 0 < max(differences) < 0.05


def test_evaluation_computes_in_the_type_of_the_step(wide):
    """A fused attention that takes bfloat16 only must not meet float32 there."""
    seen = []

    class Watching(LanguageModel):
        def loss(self, params, batch, rng):
            seen.append({a.dtype for a in jax.tree.leaves(params)})
            return super().loss(params, batch, rng)

    made = plan(config(compute_dtype='bfloat16'), make_mesh(), Watching(wide))
    made.evaluate.lower(made.tree(made.state), made.batch)
    made.step.lower(made.state, made.batch)
    assert seen and all(dtypes == {jnp.dtype('bfloat16')} for dtypes in seen)


def test_a_batch_is_learnt(wide):
    """Memorises eight rows: gradients really reach the parameters."""
    _, seen = steps(plan(config(), make_mesh(), LanguageModel(wide)), [make_batch(0)] * 40)
    assert seen[0]['loss'] > 4 > 0.5 > seen[-1]['loss'] and seen[-1]['accuracy'] > 0.9


def test_documents_do_not_see_each_other(wide):
    """The loss of the second document has no gradient in the first one's token; in one segment it has."""
    batch = make_batch(0)
    tokens = batch['tokens'].copy()
    tokens[:, 0] = 64 + np.arange(ROWS)  # ids of their own, so that their embeddings are nobody else's
    weights = batch['weights'] * (np.arange(SIZE) >= 6)
    task = LanguageModel(wide.replace(vocab_size=64 + ROWS, tie_embeddings=False))
    params = task.init(jax.random.key(0))

    @jax.jit
    @jax.grad
    def slope(params, segments):
        return task.loss(params, batch | {'tokens': tokens, 'weights': weights, 'segments': segments}, None)[0]

    moved = lambda segments: float(jnp.abs(slope(params, segments)['base']['embed']['tokens'][64:]).max())
    assert moved(batch['segments']) == 0 < moved(np.ones_like(batch['segments']))


def test_the_moving_average(wide):
    made = plan(config(ema_decay=0.5), make_mesh(), LanguageModel(wide))
    start = {k: np.asarray(v) for k, v in made.init().params.items()}
    one, _ = steps(made, [make_batch(0)])
    path = 'base/embed/tokens'
    np.testing.assert_allclose(one.ema[path], 0.5 * start[path] + 0.5 * np.asarray(one.params[path]), atol=1e-7)
    tree = made.tree(one)
    assert np.array_equal(tree['base']['embed']['tokens'], one.ema[path])
    assert np.array_equal(made.tree(one, ema=False)['base']['embed']['tokens'], one.params[path])


def test_schedules():
    base = {'learning_rate': 1.0, 'warmup_steps': 4, 'decay_steps': 5, 'end_fraction': 0.1}
    rate = lambda kind: [float(optimizer.learning_rate(base | {'schedule': kind}, 20)(s)) for s in range(21)]
    for kind in optimizer.SCHEDULES:
        np.testing.assert_allclose(rate(kind)[:5], [0.25, 0.5, 0.75, 1.0, 1.0], atol=1e-6)
    assert rate('constant')[20] == 1
    np.testing.assert_allclose(rate('wsd')[15:], [1, 0.82, 0.64, 0.46, 0.28, 0.1], atol=1e-6)
    np.testing.assert_allclose(rate('cosine')[12], 0.55, atol=1e-6)
    np.testing.assert_allclose(rate('cosine')[20], 0.1, atol=1e-6)
    with pytest.raises(ConfigError, match='schedule'):
        optimizer.learning_rate(base | {'schedule': 'linear'}, 20)
    with pytest.raises(ConfigError, match='decay_steps 5 is not within the 4 steps'):
        optimizer.learning_rate(base | {'schedule': 'wsd'}, 8)


def test_decay_spares_norms_and_biases():
    transform = optimizer.make(training.defaults().optimizer)
    params = {'base/layers/attn/q/kernel': jnp.ones((2, 3, 3)), 'base/layers/attn_norm/scale': jnp.ones((2, 3))}
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    assert float(updates['base/layers/attn/q/kernel'].min()) == pytest.approx(0.1)
    assert float(jnp.abs(updates['base/layers/attn_norm/scale']).max()) == 0


def test_batches_that_do_not_divide_are_refused(wide):
    with pytest.raises(ConfigError, match='batch_size 8 is not a multiple of mesh.data 1 x optimizer.accumulate 3'):
        plan(config(optimizer__accumulate=3), make_mesh(), LanguageModel(wide))


def test_a_host_takes_its_own_rows(wide):
    made = plan(config(mesh__data=4), make_mesh(data=4), LanguageModel(wide))
    assert host_rows(made.batch['tokens']) == slice(0, ROWS)
    whole = make_batch(0)
    placed = place_batch({k: v for k, v in whole.items()}, made.batch, 0)
    assert np.array_equal(placed['tokens'], whole['tokens'])
    assert len(placed['tokens'].addressable_shards) == 4
