"""Training accelerators through the ordinary loop, from kept hidden states, to a drafter that is used by name."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError, RequestError
from backbone.formats.tensors import Loaded, params_hash
from backbone.layout import pack
from backbone.model import PlainTarget, embed, hidden_states, sequence_context, unembed
from backbone.presets import preset
from configs import m2r2_smollm2, training
from harness import artefacts, models, train, zoo
from harness.baselines import Autoregressive
from harness.decode import generate
from m2r2 import gate_task
from m2r2 import task as tasks
from m2r2.config import M2R2Config
from scripts import m2r2_artefact
from tests.conftest import lively

SHAPE = training.llama(vocab=257, hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48, max_seq_len=64)
FIELDS = {'exits': (1,), 'rank': 8, 'carry': 8, 'draft_vocab': 64}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """(path of a small model, its parameters, its config)."""
    cfg = ModelConfig.from_dict(SHAPE)
    params = jax.tree.map(np.asarray, lively(cfg, 3))
    params['embed']['tokens'] = 20 * params['embed']['tokens']  # laws with a favourite
    path = tmp_path_factory.mktemp('base') / 'model'
    formats.save(Loaded(cfg, params, tokenizer.of_bytes(), 'small', params_hash(params)), path, 'headway')
    return path, params, cfg


@pytest.fixture(scope='module')
def workdir(base, tmp_path_factory):
    """Twelve steps on a text of few letters, hidden states kept."""
    folder = tmp_path_factory.mktemp('text')
    rng = np.random.default_rng(0)
    rows = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 20))} for i in range(60)]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / 'validation.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:6]))
    np.save(folder / 'ids.npy', np.sort(np.r_[32, 97:102, 150:208]).astype(np.int32))
    config = m2r2_smollm2.get_config('tiny')
    config.task.kwargs = ml_collections.ConfigDict({
        'base': str(base[0]), 'cached': True, 'unroll': 2, 'm2r2': FIELDS, 'positions': 16,
        'draft_ids': str(folder / 'ids.npy')})
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(folder), 'seq_len': 48, 'batch_size': 8,
                        'data_dir': str(tmp_path_factory.mktemp('made'))})
    config.num_steps, config.log_every = 12, 4
    config.eval.every = config.checkpoint.every = 6
    config.optimizer.update({'learning_rate': 1e-2, 'warmup_steps': 2})
    workdir = tmp_path_factory.mktemp('run') / 'accelerators'
    assert train.run(config, workdir, say=lambda *_: None) == 'finished'
    return workdir


def test_training_learns_and_leaves_the_base_alone(workdir, base):
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    held_out = [row for row in rows if row['kind'] == 'eval']
    assert held_out[-1]['kl_1'] < held_out[0]['kl_1'] and held_out[-1]['kl_1_after_1'] < held_out[0]['kl_1_after_1']
    assert models.load(workdir).base_hash == params_hash(base[1])


def test_a_trained_drafter_by_name(workdir, base):
    """A working directory drafts: identical output, and accelerators moved from where they started."""
    _, params, cfg = base
    drafter, ready = artefacts.find(str(workdir), cfg, params_hash(base[1]), {'block': 3})
    packed = pack(params)
    whole = {'base': packed} | ready(packed, 'float32')
    target, prompts = PlainTarget(cfg, stacked=False), [[100, 99, 101], [98]]
    got = generate(target, drafter, whole, prompts, max_new_tokens=20)
    assert got.tokens == generate(target, Autoregressive(), whole, prompts, max_new_tokens=20).tokens
    assert (got.accepted_hist * np.arange(1, 5)).sum() == sum(map(len, got.tokens)) - 2, 'the first come from prefill'
    assert float(jnp.abs(whole['m2r2']['layers'][0]['adapter']['b']['kernel_t']).max()) > 0
    with pytest.raises(FormatError, match='trained on a base'):
        artefacts.find(str(workdir), cfg, '0' * 64)


def test_the_draft_gets_shorter_where_it_doubts(workdir, base):
    """doubt 100: nothing is ever that sure, so every round is plain decoding; in between some drafts stop early."""
    _, params, cfg = base
    target, prompts = PlainTarget(cfg), [[100, 99, 101], [98], [97, 98, 99, 32, 100]]
    drafted, tokens = {}, {}
    for doubt in (0, 12, 100):
        drafter, ready = artefacts.find(str(workdir), cfg, params_hash(base[1]), {'block': 3, 'doubt': doubt})
        whole = {'base': params} | ready(params, 'float32')
        got = generate(target, drafter, whole, prompts, max_new_tokens=20)
        drafted[doubt], tokens[doubt] = got.drafted_hist, got.tokens
    assert tokens[0] == tokens[12] == tokens[100]
    assert drafted[0][:3].sum() == 0 and drafted[100][1:].sum() == 0
    assert drafted[12][:3].sum() > 0 and drafted[12][1:].sum() > 0


@pytest.mark.slow
def test_a_gate_trained_for_the_drafter_drafts_by_name(workdir, base, tmp_path, monkeypatch):
    """From accelerators with a carry and a draft vocabulary to a gate, calibrated, that ends their drafts."""
    path, params, cfg = base
    artefacts.to_zoo('fast', workdir, artefacts.card_of(str(workdir)), None, tmp_path)
    config = ml_collections.ConfigDict(models.read_config(workdir)['config'])
    config.task = {'factory': 'm2r2.gate_task.build', 'kwargs': {
        'base': str(path), 'accelerators': str(tmp_path / 'fast'), 'cached': True, 'gate': {'kind': 'mlp', 'size': 8}}}
    config.num_steps = config.eval.every = config.checkpoint.every = 6
    assert train.run(config, tmp_path / 'gates', say=lambda *_: None) == 'finished'
    args = [f'--workdir={tmp_path / "gates"}', '--name=gated', f'--root={tmp_path}', '--rows=6']
    with pytest.raises(RequestError, match='--drafts'):
        m2r2_artefact.main(m2r2_artefact.parse(args))
    card = m2r2_artefact.main(m2r2_artefact.parse([*args, '--drafts=12']))
    assert 0 < card['draft_gate']['agreement'] < 1 and card['draft_gate']['n'] > 50
    assert 'gate' not in gate_task.read_accelerators(str(tmp_path / 'gated'))[0]
    monkeypatch.setattr(zoo, 'ROOT', tmp_path)
    drafter, ready = artefacts.find('gated', cfg, params_hash(params), {'block': 3})
    assert (drafter.doubt, drafter.gate.kind) == (12, 'mlp')
    packed = pack(params)
    whole, target, prompts = {'base': packed} | ready(packed, 'float32'), PlainTarget(cfg, stacked=False), [[100, 99]]
    got = generate(target, drafter, whole, prompts, max_new_tokens=20)
    assert got.tokens == generate(target, Autoregressive(), whole, prompts, max_new_tokens=20).tokens
    with pytest.raises(ConfigError, match='gate arla_tokens of size 32: these accelerators have those of another'):
        artefacts.find('gated', cfg, params_hash(params), {'gate': 'arla_tokens'})[1](packed, 'float32')


def small_task(**options):
    cfg = {key: value for key, value in SHAPE.items()}
    return tasks.build(model=cfg, m2r2={'exits': (1, 2), 'rank': 4} | options.pop('m2r2', {}), **options)


def batch_of(ids, segments):
    ids, segments = jnp.asarray(ids), jnp.asarray(segments)
    return {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'segments': segments, 'weights': jnp.ones(segments.shape),
            'positions': jnp.tile(jnp.arange(segments.shape[1]), (len(ids), 1))}


def test_the_loss_is_its_formula():
    """Every term, by numpy from the logits of both, on a batch of packed documents; agreement and overlap with it."""
    task = small_task(kd=0.7, ce=0.5, tv=0.3, cos=0.2, temperature=2.0, m2r2={'exits': (1,)})
    params = task.init(jax.random.key(0))
    params['m2r2'] = jax.tree.map(lambda a: a + 0.1, params['m2r2'])
    ids = np.random.default_rng(1).integers(0, 257, (2, 13))
    batch = batch_of(ids, np.tile([0] * 7 + [1] * 5, (2, 1)))
    loss, metrics = jax.jit(task.loss)(params, batch, jax.random.key(0))
    last = hidden_states(task.cfg, params['base'], batch['tokens'], segments=batch['segments'],
                         positions=batch['positions'])
    ctx = sequence_context(task.cfg, batch['tokens'].shape, batch['segments'], batch['positions'])
    ends, _ = task.fast_ends(params['base'], params['m2r2'], 0, embed(task.cfg, params['base'], batch['tokens'],
                                                                    ctx.positions), last, ctx, batch)
    h, p = (np.asarray(a, np.float64) for a in (last, ends[0]))
    z, y = (np.asarray(unembed(task.cfg, params['base'], a), np.float64) for a in (last, ends[0]))
    log = lambda a: a - np.logaddexp.reduce(a, -1, keepdims=True)
    P, Q = np.exp(log(z)), np.exp(log(y))
    kl = (np.exp(log(z / 2)) * (log(z / 2) - log(y / 2))).sum(-1)
    tv = np.abs(P - Q).sum(-1) / 2
    ce = -np.take_along_axis(log(y), np.asarray(batch['targets'])[..., None], -1)[..., 0]
    cos = (h * p).sum(-1) / np.sqrt((h * h).sum(-1) * (p * p).sum(-1))
    np.testing.assert_allclose(loss, (0.7 * 4 * kl + 0.5 * ce + 0.3 * tv + 0.2 * (1 - cos)).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['overlap_1'], np.minimum(P, Q).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['agreement_1'], (P.argmax(-1) == Q.argmax(-1)).mean(), rtol=1e-5)


def test_gradients_reach_the_accelerators_only_and_documents_stay_apart():
    task = small_task(unroll=2, m2r2={'exits': (2,), 'carry': 6})
    params = task.init(jax.random.key(0))
    params['m2r2'] = jax.tree.map(lambda a: a + 0.1, params['m2r2'])
    ids = np.random.default_rng(2).integers(0, 257, (1, 13))
    split = [[0] * 6 + [1] * 6]

    @jax.jit
    def gradient(params, ids):
        batch = batch_of(ids, split)
        batch['weights'] = batch['weights'].at[:, :6].set(0)  # counts the second document only
        return jax.value_and_grad(lambda mine: task.loss(params | {'m2r2': mine}, batch, None)[0])(params['m2r2'])

    loss, moved = gradient(params, ids)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(moved))
    other = ids.copy()
    other[:, :6] = (other[:, :6] + 7) % 257  # another first document
    np.testing.assert_allclose(gradient(params, other)[0], loss, rtol=1e-6)
    other[:, 7] = (other[:, 7] + 7) % 257
    assert abs(float(gradient(params, other)[0] / loss - 1)) > 1e-3
    assert task.trainable == ('m2r2/(layers|exits|carry)/.*',)


def test_all_exits_train_in_one_pass():
    """The loss of two exits is the mean of what each alone would have; the accelerators of a layer have one owner."""
    both = small_task()
    params = both.init(jax.random.key(0))
    params['m2r2'] = jax.tree.map(lambda a: a + 0.1, params['m2r2'])
    ids = np.random.default_rng(3).integers(0, 257, (2, 9))
    batch = batch_of(ids, np.zeros((2, 8), int))
    _, metrics = jax.jit(both.loss)(params, batch, None)
    one = small_task(m2r2={'exits': (1,)})
    first = jax.tree.map(lambda a: a[:1], params['m2r2'])
    _, alone = jax.jit(one.loss)(params | {'m2r2': first}, batch, None)
    np.testing.assert_allclose(metrics['kl_1'], alone['kl_1'], rtol=1e-5)
    assert abs(float(metrics['kl_2'] - metrics['kl_1'])) > 1e-4


@pytest.mark.parametrize('options, said', [
    ({'kd': 0.0}, 'kd'), ({'ce': -1.0}, 'ce'), ({'unroll': 2}, 'unroll'), ({'temperature': 0.0}, 'temperature'),
    ({'colour': 1}, 'colour'), ({'remat': 'some'}, 'remat'), ({'m2r2': {'stream': 'none'}}, 'none')])
def test_wrong_options_are_named(options, said):
    with pytest.raises(ConfigError, match=said):
        small_task(**options)


@pytest.mark.parametrize('variant', ('', 'more', 'gpu', 'exits', 'deed'))
def test_configs_fit_their_base(variant):
    config = m2r2_smollm2.get_config(variant)
    m = M2R2Config.of(preset(config.task.kwargs.base), config.task.kwargs.m2r2.to_dict())
    assert (m.carry > 0) == (len(m.exits) == 1), 'a carry is for drafting'
    assert config.task.kwargs.unroll == 1 or m.carry
