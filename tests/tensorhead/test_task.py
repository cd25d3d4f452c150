"""Training a head through the ordinary loop, from kept hidden states, to a drafter of the zoo; and the loss's parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags

from backbone import formats, tokenizer
from backbone.cache import commit
from backbone.config import ModelConfig
from backbone.draft_vocabulary import read_ids
from backbone.errors import ConfigError, FormatError, NoValidCheckpoint, RequestError, TensorMismatch
from backbone.formats.tensors import Loaded, flatten, params_hash
from backbone.layout import pack
from backbone.model import PlainTarget
from backbone.sampling import Sampling
from configs import tensorhead_smollm2, training
from harness import artefacts, checkpoint, data, decode, models, train, train_step, zoo
from harness.baselines import Autoregressive
from harness.launch import artefact as artefact_cli
from tensorhead import cp, losses
from tensorhead import head as heads
from tensorhead import task as tasks
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter
from tests.conftest import lively

SHAPE = training.llama(vocab=257, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48, max_seq_len=64)
HEAD = {'horizon': 3, 'rank': 2, 'inner_rank': 4, 'draft_vocab': 64}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """(path of a small model, its parameters, its hash)."""
    cfg = ModelConfig.from_dict(SHAPE)
    params = jax.tree.map(np.asarray, lively(cfg, 3))
    path = tmp_path_factory.mktemp('base') / 'model'
    loaded = Loaded(cfg, params, tokenizer.of_bytes(), 'small', params_hash(params))
    formats.save(loaded, path, 'headway')
    return path, cfg, params, params_hash(params)


@pytest.fixture(scope='module')
def config(base, tmp_path_factory):
    """Twelve steps on a text of few letters, hidden states kept."""
    folder = tmp_path_factory.mktemp('text')
    rng = np.random.default_rng(0)
    rows = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 20))} for i in range(60)]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / 'validation.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:6]))
    np.save(folder / 'ids.npy', np.sort(np.r_[32, 97:102, 150:208]).astype(np.int32))
    config = tensorhead_smollm2.get_config('tiny')
    config.task.kwargs = ml_collections.ConfigDict({
        'base': str(base[0]), 'cached': True, 'positions': 16, 'head': HEAD, 'draft_ids': str(folder / 'ids.npy')})
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(folder), 'seq_len': 48, 'batch_size': 8,
                        'data_dir': str(tmp_path_factory.mktemp('made'))})
    config.num_steps = 12
    config.log_every = 4
    config.eval.every = config.checkpoint.every = 6
    config.optimizer.update({'learning_rate': 5e-3, 'warmup_steps': 2})
    return config


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'head'
    assert train.run(config, folder, say=lambda *_: None) == 'finished'
    return folder


def test_training_learns_and_leaves_the_base_alone(workdir, base):
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    held_out = [row for row in rows if row['kind'] == 'eval']
    assert held_out[-1]['joint_nll'] < held_out[0]['joint_nll']
    assert 'perplexity' not in held_out[-1], 'with a draft vocabulary the loss is not that of the text'
    assert models.load(workdir).base_hash == base[3]


def test_kept_hidden_states_are_those_of_the_base(config, workdir):
    """Loss and gradient from kept states are those of running the base, to bfloat16; with wrong states they are not."""
    with jax.set_mesh(train_step.build_mesh(config)):
        plan = train_step.plan(config)
        state = plan.init()
        assert plan.batch['hidden'].shape == (8, 48, 32) and plan.batch['hidden'].dtype == jnp.bfloat16
        tok = tokenizer.of_bytes()
        rows = data.open_rows(config.data, 'train', tok)
        leaves = {path: a for path, a in state.frozen.items() if path.startswith('base/')}
        digest = params_hash(jax.tree.map(np.asarray, leaves))
        before = sorted(path.name for path in (rows.folder.parent.parent / 'features').iterdir())
        kept = data.cached(rows, plan.task.features, plan.tree(state)['base'], digest, plan.task.feature_name, 8)
        assert sorted(path.name for path in (rows.folder.parent.parent / 'features').iterdir()) == before, 'made again'
        batch = kept.batch(range(8))
        run = dataclasses.replace(plan.task, cached=False)
        loss = lambda head, batch, task: task.loss(plan.tree(state) | {'tensorhead': head}, batch, jax.random.key(1))[0]
        gradient = jax.jit(jax.grad(loss, allow_int=True), static_argnums=2)
        head = plan.tree(state)['tensorhead']
        ours, theirs = gradient(head, batch, plan.task), gradient(head, batch, run)
        wrong = gradient(head, batch | {'hidden': np.roll(batch['hidden'], 1, axis=1)}, plan.task)

    def off(a, b):
        a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t['factors'])]) for t in (a, b))
        return np.linalg.norm(a - b) / np.linalg.norm(b)
    assert off(ours, theirs) < 0.05 < 0.3 < off(wrong, theirs)


def test_a_run_starts_from_what_another_trained(workdir, config):
    config = ml_collections.ConfigDict(config.to_dict() | {'start': str(workdir)})
    saved = checkpoint.read_part(workdir / 'checkpoints', 'params')[1]
    state = train_step.plan(config).init()
    assert int(state.step) == 0 and saved.keys() == state.params.keys()
    assert all(np.array_equal(leaf, saved[path]) for path, leaf in state.params.items())
    config.start = ''
    fresh = train_step.plan(config).init().params
    assert not np.allclose(fresh['tensorhead/factors/up'], saved['tensorhead/factors/up'])
    config.start = str(workdir)
    config.task.kwargs.head.inner_rank = 8
    with pytest.raises(TensorMismatch, match='factors'):
        train_step.plan(config)
    config.start = str(workdir / 'none')
    with pytest.raises(NoValidCheckpoint, match='none'):
        train_step.plan(config)


def test_what_was_trained_drafts_losslessly_from_the_directory_and_from_the_zoo(workdir, base, tmp_path, monkeypatch):
    path, cfg, params, digest = base
    monkeypatch.setattr(zoo, 'ROOT', tmp_path)
    card = artefacts.card_of(str(workdir))
    artefacts.to_zoo('small_head', workdir, card, ('factors/.*',))
    assert card['base'] == str(path) and card['steps'] == 12 and card['metrics']['joint_nll'] > 0
    packed = pack(params)
    target = PlainTarget(cfg, stacked=False)
    prompts = [tokenizer.of_bytes().encode(text) for text in ('abc dce', 'b')]
    want = decode.generate(target, Autoregressive(), {'base': packed}, prompts, max_new_tokens=20).tokens
    heads = {}
    for name in (str(workdir), 'small_head'):
        assert artefacts.is_artefact(name)
        drafter, ready = artefacts.find(name, cfg, digest)
        heads[name] = ready(packed, 'float32')
        found = decode.generate(target, drafter, {'base': packed} | heads[name], prompts, max_new_tokens=20)
        assert found.tokens == want and drafter.block == 2
    with pytest.raises(FormatError, match='trained on'):
        artefacts.find('small_head', cfg, 'b' * 64)
    with pytest.raises(FormatError, match='trained on'):
        artefacts.find(str(workdir), cfg, 'b' * 64)
    with pytest.raises(ConfigError, match='blok'):
        artefacts.find('small_head', cfg, digest, {'blok': 2})
    raw, loaded = (flatten(artefacts.from_workdir(str(workdir))[0]), flatten(zoo.load('small_head', digest)[0]))
    off = np.abs(raw['factors/up'] - loaded['factors/up']).max()
    assert 0 < off <= np.abs(raw['factors/up']).max() / 127, 'int8 with a scale a column'


def test_the_card_command_refuses_a_file_that_is_not_one(workdir, tmp_path):
    bad = tmp_path / 'x.json'
    bad.write_text('[]')
    flags.FLAGS(['artefact', f'--workdir={workdir}', '--name=x', f'--measured={bad}'])
    with pytest.raises(RequestError, match='cannot be read'):
        artefact_cli.main(['artefact'])
    assert not (zoo.ROOT / 'x').exists()


# The loss's parts -----------------------------------------------------------------------------------------------------


def small(**changes) -> tasks.HeadTask:
    given = {'model': SHAPE, 'head': {'horizon': 3, 'rank': 2, 'inner_rank': 4}} | changes
    return tasks.build(**given)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 257, (4, 25)).astype(np.int32)
    segments = np.ones((4, 24), np.int32)
    segments[1, 10:] = 2
    weights = np.ones((4, 24), np.float32)
    weights[1, 9] = 0  # the target that belongs to another document
    weights[2, :6] = 0  # a prompt
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'weights': weights,
            'positions': np.tile(np.arange(24, dtype=np.int32), (4, 1))}


def test_positions_are_drawn_from_those_that_count(batch):
    hidden = np.random.default_rng(0).normal(size=(4, 24, 32)).astype(np.float32)
    window = tasks.losses.windows(batch['targets'], batch['segments'], batch['weights'], 3)
    keys = jax.random.split(jax.random.key(0), 20)
    e, _, _, weight, at = jax.vmap(lambda key: small(positions=5).choose(hidden, *window, key))(keys)
    assert (weight > 0).all() and all(len(set(row)) == 5 for row in np.asarray(at).reshape(-1, 5).tolist())
    assert np.array_equal(e[:, 2, 0], hidden[2, at[:, 2, 0]])
    assert set(np.asarray(at[:, 2]).ravel().tolist()) == set(range(6, 24)), 'each position that counts, and no other'


def test_an_unknown_word_ends_the_window_except_at_the_pending_token():
    head = {'draft_ids': jnp.array([2, 5, 9])}
    future = jnp.array([[2, 5, 9], [3, 5, 9], [2, 3, 9], [2, 5, 3]])
    index, valid = tasks.known_suffix(head, future, jnp.ones((4, 3), bool))
    assert valid.tolist() == [[True] * 3, [False, True, True], [True, False, False], [True, True, False]]
    assert np.array_equal(np.where(valid, index, -1), [[0, 1, 2], [-1, 1, 2], [0, -1, -1], [0, 1, -1]])


def filled(task: tasks.HeadTask) -> dict:
    """Random parameters of the task's shapes, at no compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32),
                        jax.eval_shape(task.init, jax.random.key(0)))


@pytest.mark.parametrize(('mode', 'options'), (
    ('full', {'loss': 'joint', 'balance': 'switch'}),
    ('lowrank_shared', {'loss': 'distill', 'beta': 0.5, 'chunk': 100}),
    pytest.param('medusa_shared', {'loss': 'distill', 'bernoulli': True, 'balance': 'cv2'}, marks=pytest.mark.slow),
    pytest.param('linear_shared', {'first': 0.0, 'balance': 'neg_entropy'}, marks=pytest.mark.slow)))
def test_every_form_of_the_loss_trains_every_mode(batch, mode, options):
    """Finite loss, and gradients that reach gate, factors and, from scratch, the trunk."""
    task = small(head={'horizon': 3, 'rank': 2, 'inner_rank': 4, 'mode': mode}, **options)
    params = jax.tree.map(jnp.asarray, filled(task))
    (loss, metrics), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, jax.random.key(0))
    assert np.isfinite(loss) and 0 < float(metrics['joint_nll']) < 60
    assert metrics['nll'] == metrics['nll_1'] and float(metrics['weight']) == batch['weights'].sum()
    for path, leaf in flatten(grads['tensorhead']).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert np.abs(grads['base']['embed']['tokens']).max() > 0


def test_adapters_train_with_the_head_and_make_another_base(batch, base):
    task = tasks.build(base=str(base[0]), head={'horizon': 2, 'rank': 1, 'inner_rank': 4}, lora_rank=2, lora_last=1)
    params = filled(task) | {'base': jax.tree.map(jnp.asarray, base[2])}
    for leaves in params['lora']['layers']['attn'].values():
        leaves['kernel']['b'] *= 0  # as lora.init has it: nothing is changed at first
    assert train_step.split(flatten(params), task.trainable)[0].keys() == {
        path for path in flatten(params) if path.startswith(('lora/', 'tensorhead/'))}
    grads = jax.jit(jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0]))(params)
    assert all(np.abs(leaf).max() > 0 for path, leaf in flatten(grads['lora']).items() if path.endswith('/b'))
    pieces = dataclasses.replace(task, loss_chunk=8, query_chunk=8, remat='full')  # the same in less memory
    again = jax.jit(jax.grad(lambda p: pieces.loss(p, batch, jax.random.key(0))[0]))(params)
    for ours, theirs in zip(jax.tree.leaves(again['lora']), jax.tree.leaves(grads['lora']), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    moved = params | {'lora': jax.tree.map(lambda a: a + 0.1, params['lora'])}
    assert params_hash(jax.tree.map(np.asarray, task.merged(moved))) != base[3]
    assert params_hash(jax.tree.map(np.asarray, task.merged(params))) == base[3]


@pytest.mark.parametrize(('changes', 'named'), (
    ({'loss': 'magic'}, 'magic'), ({'balance': 'magic'}, 'magic'), ({'attention': 'magic'}, 'attention'),
    ({'cached': True}, 'cached'), ({'discount': 0.0}, 'discount'), ({'rank': 3}, 'rank'), ({'base': 'x'}, 'either'),
    ({'head': {'mode': 'magic'}}, 'magic'), ({'head': {'rang': 3}}, 'rang'),
    ({'head': {'hidden_size': 5}}, 'hidden_size 5 is not the 32')))
def test_a_wrong_field_is_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        small(**changes)


@pytest.mark.parametrize('ids', (np.arange(3), np.array([0, 5, 5, 6]), np.array([0, 1, 2, 9]), np.zeros((1, 4))))
def test_a_wrong_draft_vocabulary_is_refused(tmp_path, ids):
    np.save(tmp_path / 'ids.npy', ids)
    with pytest.raises(ConfigError, match='ids.npy'):
        read_ids(str(tmp_path / 'ids.npy'), 4, 8)


def test_a_draft_vocabulary_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match='none.npy'):
        read_ids(str(tmp_path / 'none.npy'), 4, 8)


def test_factors_that_read_the_pending_token_draft_what_they_were_trained_for(batch, base):
    """The drafter's law of a draft is the loss's conditional; another pending token gives another."""
    cfg, params = base[1], {'base': jax.tree.map(jnp.asarray, base[2])}
    head_cfg = TensorHeadConfig(32, 257, 3, 2, inner_rank=4, pending_size=8)
    params['tensorhead'] = heads.init(head_cfg, jax.random.key(1))
    params['tensorhead']['pending']['up'] = 0.3 * jax.random.normal(jax.random.key(2), (8, 32))
    drafter = TensorHeadDrafter(head_cfg)
    tokens = batch['tokens'][:2, :6]
    cache = PlainTarget(cfg).init_cache(2, 16, 2)
    output = jax.jit(lambda p: PlainTarget(cfg).forward(p, tokens, cache, taps=('hidden:last',)))(params)
    e = output.taps['hidden:last'][:, 4]
    state = {'e': e}
    seen = commit(output.cache, jnp.array([4, 4]), tokens[:, 5])
    drafts = jax.jit(lambda cache: drafter.draft(params, cache, state, jax.random.key(0), Sampling(1.0))[0])
    draft = drafts(seen)
    x_1 = params['base']['embed']['tokens'][tokens[:, 5]]
    mixture = heads.factors(head_cfg, params['tensorhead'], e, x_1)
    window = jnp.concatenate([tokens[:, 5:], draft.tokens], axis=1)
    logp = losses.gold_logp(head_cfg, params['tensorhead'], mixture, heads.unembedding(params['base'], {}), window,
                            jnp.ones((2, 3), bool))
    expected = jnp.exp(cp.conditionals(mixture.log_w, logp)[:, 1:])
    assert np.allclose(draft.law.gold, expected, rtol=2e-4)
    other = drafts(commit(output.cache, jnp.array([4, 4]), (tokens[:, 5] + 1) % 257))
    assert not np.allclose(draft.law.row(jnp.array([0, 0])), other.law.row(jnp.array([0, 0])), rtol=0.05)
