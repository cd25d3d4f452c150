"""Gates: what they read, that they learn, one token at a time as in one pass; stage 2, which trains nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backbone import formats, tokenizer
from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats.tensors import Loaded, flatten, params_hash
from configs import m2r2_gates, training
from harness import train_step, zoo
from m2r2 import gate_task, gates
from m2r2.calibrate import auc
from m2r2.config import M2R2Config
from m2r2.gates import GateConfig
from m2r2.streams import Ending
from m2r2.task import AcceleratorTask

SHAPE = training.llama(vocab=257, hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48, max_seq_len=64)
CFG = ModelConfig.from_dict(SHAPE)
M = M2R2Config.of(CFG, {'exits': (1, 2), 'rank': 4})


def task_of(kind: str = 'arla_depth', **options) -> gate_task.GateTask:
    return gate_task.GateTask(CFG, M, GateConfig(kind, 8), **options)


def batch_of(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of 32 tokens in two documents, of which some positions do not count."""
    rng = np.random.default_rng(seed)
    shape = (rows, 32)
    return {'tokens': rng.integers(0, 257, shape).astype(np.int32), 'targets': np.zeros(shape, np.int32),
            'segments': np.where(np.arange(32) < 20, 1, 2) * np.ones(shape, np.int32),
            'positions': np.tile(np.r_[:20, :12].astype(np.int32), (rows, 1)),
            'weights': (rng.random(shape) < 0.9).astype(np.float32)}


def filled(init, seed: int = 0, gain: float = 1.0):
    """Random parameters of init's shapes, at no compilation."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        name = path[-1].key
        if name in ('scale', 'bias'):
            return np.full(a.shape, name == 'scale', np.float32)
        rows = a.shape[-2] if a.ndim > 1 else a.shape[0]
        return (gain * rng.normal(size=a.shape) * rows ** -0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope='module')
def params():
    """A random base, and accelerators that do something."""
    tree = jax.tree.map(jnp.asarray, filled(task_of().init, gain=1.5))
    return {'base': tree['base'], 'm2r2': jax.tree.map(lambda a: 0.3 * a, tree['m2r2'])}


def fresh(kind: str) -> dict:
    """Parameters of a gate of width 8."""
    return filled(lambda key: gates.init_params(GateConfig(kind, 8), M, key), 5)


def streams_of(seed: int) -> tuple[Ending, dict[str, np.ndarray]]:
    """An ending [96, 24] of random streams, and labels by what a gate has to read to know them."""
    rng = np.random.default_rng(seed)
    path, slow = (rng.normal(size=(96, 24, *more, 32)).astype(np.float32) for more in ((2,), ()))
    before = np.cumsum(path[..., 1, 0], axis=1) / np.sqrt(np.arange(1, 25))
    seen = {'p': path[..., 1, 0], 'h': slow[..., 0], 'depth': path[..., 0, 0], 'tokens': before}
    return Ending(slow, path[..., 1, :], None, path), {
        name: value + 0.3 * rng.normal(size=value.shape) > 0 for name, value in seen.items()}


@pytest.mark.parametrize(('kind', 'reads', 'not_reads'), (
    ('arla_depth', 'depth', 'h'), ('arla_tokens', 'tokens', 'h'), ('mlp', 'p', 'depth'), ('linear_p', 'p', 'h'),
    ('linear_h', 'h', 'p')))
def test_a_gate_learns_what_it_reads_and_nothing_else(kind, reads, not_reads):
    """The loss falls, and positions not seen in training are ranked well above chance; where the labels hang on what
    the gate cannot see they are not."""
    gate, optimiser = GateConfig(kind, 8), optax.adam(0.02)
    (end, labels), (new_end, new_labels) = streams_of(0), streams_of(1)

    @jax.jit
    def fit(p, z):
        def loss(p):
            return optax.sigmoid_binary_cross_entropy(gates.evidence(gate, M, p, 0, end)[0], z).mean()

        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(p, updates), state), value
        (p, _), losses = jax.lax.scan(step, (p, optimiser.init(p)), None, length=50)
        return losses, gates.score(gate, M, p, 0, new_end)[0]

    begin = fresh(kind)['exit_1']
    losses, scores = fit(begin, labels[reads].astype(np.float32))
    assert losses[-1] < losses[0] - 0.05 and auc(scores, new_labels[reads]) > 0.65
    assert ((scores >= 0) & (scores <= 1)).all()
    assert abs(auc(fit(begin, labels[not_reads].astype(np.float32))[1], new_labels[not_reads]) - 0.5) < 0.1


def test_confidence_from_logits():
    logits = np.log(np.float32([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [1.0, 1e-30, 1e-30, 1e-30]]))
    entropy = 1 - np.array([-(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.1)), np.log(4), 0]) / np.log(4)
    for kind, expected in (('max_prob', [0.5, 0.25, 1]), ('margin', [0.2, 0, 1]), ('entropy', entropy)):
        gate = GateConfig(kind)
        assert gate.needs_head and not gates.init_params(gate, M, jax.random.key(0))['exit_2']
        np.testing.assert_allclose(gates.score(gate, M, {}, 0, None, logits)[0], expected, atol=1e-6)


def test_attention_over_depth_reads_every_depth_of_the_token_and_no_other_token():
    m, gate = M2R2Config(32, 6, 257, (3,)), GateConfig('arla_depth', 8)
    path = np.random.default_rng(1).normal(size=(1, 5, 4, 32)).astype(np.float32)

    p = filled(lambda key: gates.init_params(gate, m, key))['exit_1']
    of = lambda path: gates.score(gate, m, p, 0, Ending(None, None, None, path))[0][0, 2]
    touched = np.abs(jax.jit(jax.grad(of))(path)).max(-1)[0]
    assert (touched[2] > 0).all() and touched[[0, 1, 3, 4]].max() == 0


# attention over tokens ------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def over_tokens():
    """(gate, parameters, an ending [2, 9] of random streams, score jitted)."""
    gate = GateConfig('arla_tokens', 8)
    fast = np.random.default_rng(3).normal(size=(2, 9, 32)).astype(np.float32)
    score = jax.jit(lambda p, fast, memory, pos, j: gates.score(gate, M, p, j, Ending(None, fast, None), None, memory,
                                                                pos), static_argnums=4)
    return gate, fresh('arla_tokens'), fast, score


def test_attention_over_tokens_is_causal(over_tokens):
    gate, p, fast, _ = over_tokens
    of = lambda fast, mask: gates.score(gate, M, p['exit_1'], 0, Ending(None, fast, None), mask=mask)[0][0, 4]
    touched = jax.jit(lambda fast, mask: jnp.abs(jax.grad(of)(fast, mask)).max(-1))
    lower = jnp.tril(jnp.ones((9, 9), bool))
    causal = np.asarray(touched(fast, lower))
    assert (causal[0, :5] > 0).all() and causal[0, 5:].max() == 0 and causal[1].max() == 0
    assert (np.asarray(touched(fast, jnp.ones((9, 9), bool)))[0] > 0).all(), 'without the mask the check would see it'


def test_token_by_token_is_the_whole_sequence(over_tokens):
    """Rows that start at different slots; garbage behind the position, NaN even, changes nothing."""
    gate, p, fast, score = over_tokens
    expected = np.asarray(score(p['exit_1'], fast, None, None, 0)[0])
    memory = gates.init_memory(gate, M, 2, 12)
    memory = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if a.dtype != bool else a, memory)
    begin = jnp.array([0, 3])  # the second row lies three slots on, with holes before it
    first, memory = score(p['exit_1'], fast[:, :3], memory, begin, 0)
    found = [first]
    for t in range(3, 9):
        new, memory = score(p['exit_1'], fast[:, t:t + 1], memory, begin + t, 0)
        found.append(new)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-6)
    off, _ = score(p['exit_1'], fast[:, 8:], memory, begin + 7, 0)
    assert not np.allclose(off[:, 0], expected[:, 8], atol=1e-4), 'a slot too early'


def test_holes_are_skipped_and_writes_outside_are_dropped(over_tokens):
    gate, p, fast, score = over_tokens
    memory = gates.init_memory(gate, M, 2, 6)
    _, memory = score(p['exit_2'], fast[:, :2], memory, jnp.zeros(2, int), 1)
    skipped, _ = score(p['exit_2'], fast[:, 5:6], memory, jnp.full(2, 4), 1)
    expected = score(p['exit_2'], fast[:, jnp.array([0, 1, 5])], None, None, 1)[0]
    np.testing.assert_allclose(skipped[:, 0], expected[:, 2], atol=1e-6)
    outside, after = score(p['exit_2'], fast[:, :2], memory, jnp.array([[-1, 6], [7, -3]]), 1)
    assert np.isfinite(outside).all()
    jax.tree.map(np.testing.assert_array_equal, after, memory)
    # An earlier exit sees a slot anew: what a later one holds there was of a token that was taken back.
    _, again = score(p['exit_1'], fast[:, :1], memory, jnp.ones(2, int), 0)
    assert again['exit_2']['filled'].tolist() == [[True] + [False] * 5] * 2


# stage 2 --------------------------------------------------------------------------------------------------------------


def test_only_gates_have_gradients_and_only_they_move(params):
    """Steps on the whole tree: base and accelerators keep every bit; the loss falls and agreeing positions rank higher
    on the batch that is trained on."""
    task, batch = task_of(), batch_of(4, 2)
    tree = params | {'m2r2_gates': fresh('arla_depth')}
    mine = train_step.split(flatten(tree), task.trainable)[0]
    assert mine.keys() == {path for path in flatten(tree) if path.startswith('m2r2_gates/')}
    optimiser = optax.adam(0.02)

    @jax.jit
    def step(tree, state):
        (_, metrics), grads = jax.value_and_grad(lambda p: task.loss(p, batch, None), has_aux=True)(tree)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(tree, updates), state, metrics, grads

    moved, state, first, grads = step(tree, optimiser.init(tree))
    for path, leaf in flatten(grads).items():
        assert (np.abs(leaf).max() > 0) == (path in mine), path
    for _ in range(30):
        moved, state, metrics, _ = step(moved, state)
    before, after = flatten(tree), flatten(moved)
    assert all(np.array_equal(after[path], leaf) == (path not in mine) for path, leaf in before.items())
    assert float(metrics['weight']) == batch['weights'].sum() and 0 < float(metrics['rate_1']) < 1
    for j in (1, 2):
        assert metrics[f'bce_{j}'] < first[f'bce_{j}'] and metrics[f'auc_{j}'] > 0.6


def test_labels_from_kept_states_and_in_pieces_are_those_of_the_whole_pass(params):
    batch, task = batch_of(2, 3), task_of('mlp')
    tree = params | {'m2r2_gates': fresh('mlp')}
    read = jax.jit(lambda task, batch: task.read(tree, batch), static_argnums=0)
    want = read(task, batch)
    kept = batch | jax.jit(lambda batch: task.features(tree['base'], batch))(batch)
    cached = dataclasses.replace(task, cached=True, label_chunk=8)
    for ours, theirs in zip(read(cached, kept), want, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    wrong = read(cached, kept | {'hidden': np.roll(kept['hidden'], 1, axis=1)})
    assert not np.array_equal(wrong[0][1], want[0][1])
    with pytest.raises(ConfigError, match='label_chunk 5'):
        jax.eval_shape(lambda: dataclasses.replace(cached, label_chunk=5).read(tree, kept))


def test_with_a_carry_the_labels_are_what_its_own_training_counts():
    """Gates of a drafter: its exit reads the token before, here as where the accelerators are trained."""
    m, batch = M2R2Config.of(CFG, {'exits': (1,), 'rank': 4, 'carry': 6}), batch_of(4, 3)
    task = gate_task.GateTask(CFG, m, GateConfig('mlp', 8))
    tree = jax.tree.map(jnp.asarray, filled(task.init, gain=1.5))
    carry = jax.tree.map(lambda a: 0.3 * a, tree['m2r2']['carry']) | {'gain': jnp.ones(m.hidden_size)}

    @jax.jit
    def rates(tree, carry):
        tree = tree | {'m2r2': jax.tree.map(lambda a: 0.3 * a, tree['m2r2']) | {'carry': carry}}
        (_, agrees), = task.read(tree, batch)
        weights = batch['weights']
        return (agrees * weights).sum() / weights.sum(), AcceleratorTask(CFG, m).loss(tree, batch, None)[1]

    rate, metrics = rates(tree, carry)
    assert 0 < float(rate) < 1 and float(rate) == pytest.approx(float(metrics['agreement_1']), abs=1e-6)
    deaf = jax.tree.map(jnp.zeros_like, carry) | {'gain': carry['gain']}
    assert float(rates(tree, deaf)[0]) != float(rate), 'without what it carries'


def test_the_batch_auc_is_the_one_over_all_pairs():
    rng = np.random.default_rng(0)
    s, z = rng.integers(0, 9, 200).astype(np.float32) / 9, rng.random(200) < 0.4
    w = (rng.random(200) < 0.8).astype(np.float32)
    kept = w > 0
    ranked = jax.jit(gate_task.ranked)
    assert float(ranked(s, z, w)) == pytest.approx(auc(s[kept], z[kept]), abs=1e-5)
    pairs = [(a > b) + 0.5 * (a == b) for a in s[kept & z] for b in s[kept & ~z]]
    assert auc(s[kept], z[kept]) == pytest.approx(np.mean(pairs))
    assert float(ranked(s, np.ones(200, bool), w)) == 0.5


def test_accelerators_come_from_a_folder_of_the_zoo(params, tmp_path):
    base, mine = (jax.tree.map(np.asarray, params[part]) for part in ('base', 'm2r2'))
    formats.save(Loaded(CFG, base, tokenizer.of_bytes(), 'small', params_hash(base)), tmp_path / 'base', 'headway')
    card = {'base': 'small', 'base_hash': params_hash(base), 'config': {}, 'data': '', 'steps': 1, 'seed': 0,
            'command': '', 'metrics': {}, 'drafter': {'kwargs': {'m2r2': M.to_dict()}}}
    zoo.save('fast', mine, card, tmp_path, int8=('.*kernel',))
    task = gate_task.build(base=str(tmp_path / 'base'), accelerators=str(tmp_path / 'fast'), gate={'kind': 'linear_p'})
    assert task.m2r2 == M, 'the card says what they are'
    loaded = task.load()
    stored = zoo.load('fast', root=tmp_path)[0]
    jax.tree.map(np.testing.assert_array_equal, loaded['m2r2'], stored)
    assert params_hash(loaded['base']) == params_hash(base)
    zoo.save('strange', mine, card | {'base_hash': 'f' * 64}, tmp_path)
    with pytest.raises(ConfigError, match='strange: trained on a base with parameters ffff'):
        dataclasses.replace(task, accelerators=str(tmp_path / 'strange')).load()
    with pytest.raises(ConfigError, match='another shape'):
        dataclasses.replace(task, m2r2=dataclasses.replace(M, rank=5)).load()
    weights = tmp_path / 'fast' / zoo.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b'\1\2\3\4')
    with pytest.raises(FormatError, match='hash'):
        task.load()
    with pytest.raises(FormatError, match='none: accelerators cannot be read'):
        gate_task.read_accelerators(str(tmp_path / 'none'))


@pytest.mark.parametrize(('changes', 'named'), (
    ({'gate': {'kind': 'magic'}}, 'magic'), ({'gate': {'size': 0}}, 'gate.size'), ({'gate': {'with': 3}}, 'with'),
    ({'gate': {'kind': 'margin'}}, 'nothing to train'), ({'attention': 'magic'}, 'attention'), ({'m2r2': None}, 'm2r2'),
    ({'base': 'x'}, 'either'), ({'tempo': 1}, 'tempo')))
def test_a_wrong_field_is_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        gate_task.build(**({'model': SHAPE, 'm2r2': {'exits': (1, 2)}} | changes))


@pytest.mark.parametrize('variant', ('', 'deed', 'stories', 'draft', 'tiny'))
def test_configs_name_gates_that_can_be_trained(variant):
    kwargs = m2r2_gates.get_config(variant).task.kwargs.to_dict()
    GateConfig.of(kwargs['gate'])
    assert (kwargs['m2r2'].get('carry', 0) > 0) == (variant == 'draft') and ('base' in kwargs) == (variant != 'tiny')
