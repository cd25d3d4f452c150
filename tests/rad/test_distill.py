"""What the loss says: by hand, in chunks, at the start, with nothing replaced, in steps, and from another teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.model import embed, finish, hidden_and_taps, sequence_context, unembed
from backbone.model import forward as plain_forward
from rad import distill, model
from rad.config import RadConfig
from rad.skip import SkipConfig, run_skipping
from rad.student import whole
from rad.task import RadTask
from tests.conftest import lively, tiny_config
from tests.rad.hybrids import mixers

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=61, hidden=16, heads=2, kv_heads=1, tie_embeddings=False)
RCFG = RadConfig.of(CFG, {'layers': (1, 3), 'ssm': {'chunk': 8}})
TASK = RadTask(CFG, RCFG, drafts=2)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 25)).astype(np.int32)


def batch_of(tokens=TOKENS, ends=12):
    """Two documents a row, and positions that do not count."""
    shape = (len(tokens), tokens.shape[1] - 1)
    segments, weights = np.ones(shape, np.int32), np.ones(shape, np.float32)
    segments[:, ends:], weights[:, ends - 1], weights[0, :3] = 2, 0, 0
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'weights': weights,
            'positions': np.arange(shape[1], dtype=np.int32)[None].repeat(len(tokens), 0)}


@pytest.fixture(scope='module')
def params():
    """Every part of the mixers says something."""
    return {'base': lively(CFG), 'rad': {'mixers': mixers(CFG, RCFG)}}


def run(task, params, batch=None):
    return jax.jit(task.loss)(params, batch_of() if batch is None else batch, None)


def test_the_loss_by_hand_and_in_chunks(params):
    batch = batch_of()
    task = dataclasses.replace(TASK, kl=0.7, ce=0.2, align=0.3, temperature=2.0)
    loss, found = run(task, params)
    taps = ('mixer:1', 'mixer:3')
    options = {'segments': batch['segments'], 'positions': batch['positions']}

    @jax.jit
    def by_hand(params):
        old, before = hidden_and_taps(CFG, params['base'], batch['tokens'], taps, **options)
        new, after = model.hidden_and_taps(CFG, RCFG, params, batch['tokens'], taps, **options)
        return [unembed(CFG, params['base'], h) for h in (old, new)], [(after[t] - before[t]) ** 2 for t in taps]

    logits, apart = by_hand(params)
    z, y = (np.asarray(a, np.float64) for a in logits)
    log = lambda a: a - np.logaddexp.reduce(a, -1, keepdims=True)
    mean = lambda a: (a * batch['weights']).sum() / batch['weights'].sum()
    kl = mean(4 * (np.exp(log(z / 2)) * (log(z / 2) - log(y / 2))).sum(-1))
    gold = lambda a: mean(-np.take_along_axis(log(a), batch['targets'][..., None], -1)[..., 0])
    want = {'kl': kl, 'nll': gold(y), 'teacher_nll': gold(z), 'agreement': mean(z.argmax(-1) == y.argmax(-1)),
            'accuracy': mean(y.argmax(-1) == batch['targets']), 'weight': batch['weights'].sum(),
            'overlap': mean(np.minimum(np.exp(log(z)), np.exp(log(y))).sum(-1)),
            'align': mean(np.mean([a.mean(-1) for a in apart], axis=0))}
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(loss, 0.7 * kl + 0.2 * want['nll'] + 0.3 * want['align'], rtol=2e-4)

    gradient = lambda task: jax.jit(jax.value_and_grad(lambda mine: task.loss(params | {'rad': mine}, batch, None)[0]))
    (first, one), (second, other) = (gradient(t)(params['rad']) for t in (
        task, dataclasses.replace(task, loss_chunk=8, query_chunk=8, remat='full')))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)
    with pytest.raises(ConfigError, match='loss_chunk 7'):
        run(dataclasses.replace(task, loss_chunk=7), params)


def test_nothing_replaced_is_nothing_to_learn(params):
    """The teacher itself: no divergence and no gradient. One weight moved, and there is one."""
    task = RadTask(CFG, RadConfig.of(CFG, {'layers': ()}), train='all')
    own = {'whole': params['base']}
    gradient = jax.jit(jax.value_and_grad(lambda mine: task.loss(params | {'rad': mine}, batch_of(), None)[1]['kl']))
    kl, grads = gradient(own)
    assert float(kl) == 0 and max(float(jnp.abs(a).max()) for a in jax.tree.leaves(grads)) < 1e-6
    moved = jax.tree_util.tree_map_with_path(lambda path, a: 2 * a if path[-2].key == 'final_norm' else a, own)
    kl, grads = gradient(moved)
    assert float(kl) > 1e-3 and max(float(jnp.abs(a).max()) for a in jax.tree.leaves(grads)) > 1e-4


def test_it_begins_as_the_base_without_those_attentions(params):
    """To the bit; other mixers begin as something else."""
    base = params['base']

    @jax.jit
    def skipping(base):
        ctx = sequence_context(CFG, TOKENS.shape)
        x = embed(CFG, base, TOKENS, ctx.positions)
        x, _ = run_skipping(CFG, base, x, None, ctx, SkipConfig((1, 3)))
        return unembed(CFG, base, finish(CFG, base, x))

    want = skipping(base)
    hybrid = jax.jit(lambda tree: model.forward(CFG, RCFG, tree, TOKENS))
    made = {name: {'base': base, 'rad': dataclasses.replace(TASK, init_as=name).own(base, jax.random.key(1))}
            for name in ('rad', 'mamba_in_llama')}
    np.testing.assert_array_equal(hybrid(made['rad']), want)
    assert float(jnp.abs(hybrid(made['mamba_in_llama']) - want).max()) > 0.05
    plain = jax.jit(lambda base: plain_forward(CFG, base, TOKENS))(base)
    assert float(jnp.abs(want - plain).max()) > 0.05


def test_no_gradient_reaches_a_teacher_and_documents_stay_apart(params):
    @jax.jit
    def gradient(params, tokens):
        batch = batch_of(tokens)
        batch['weights'] = jnp.asarray(batch['weights']).at[:, :12].set(0)  # counts the second document only
        (_, found), grads = jax.value_and_grad(lambda p: TASK.loss(p, batch, None), has_aux=True)(params)
        return found['kl'], grads

    kl, grads = gradient(params, TOKENS)
    assert all(not np.any(a) for a in jax.tree.leaves(grads['base']))
    assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(grads['rad']))
    other = TOKENS.copy()
    other[:, :12] = (other[:, :12] + 7) % 61  # another first document
    np.testing.assert_allclose(gradient(params, other)[0], kl, rtol=1e-4)  # sums of decays begin with the chunk
    other[:, 14] = (other[:, 14] + 7) % 61
    assert abs(float(gradient(params, other)[0] / kl - 1)) > 1e-3


def test_layers_give_way_one_after_the_other_in_one_program(params):
    task = dataclasses.replace(TASK, stages=2, until=10)
    step = jax.jit(lambda params, step: task.loss(params, batch_of() | {'step': step}, None)[1]['kl'])
    found = [float(step(params, jnp.int32(n))) for n in (0, 4, 5, 100)]
    assert step._cache_size() == 1
    lowest = dataclasses.replace(RCFG, layers=(1,))
    first = jax.tree.map(lambda a: a[:1], params['rad'])
    one = run(RadTask(CFG, lowest), params | {'rad': first})[1]['kl']
    both = run(task, params)[1]['kl']  # without a step, as in evaluation: all have
    np.testing.assert_allclose(found, [one, one, both, both], rtol=1e-4)
    assert abs(float(one - both)) > 5e-5
    shares = [float(distill.replaced_share(4, 100, n)) for n in (0, 24, 25, 75, 1000)]
    assert shares == [0.25, 0.25, 0.5, 1.0, 1.0]


def test_a_larger_teacher_of_the_same_words(params):
    large = tiny_config(vocab=61, hidden=24, layers=3, heads=3, kv_heads=3)
    task = dataclasses.replace(TASK, teacher=large)
    tree = params | {'teacher': lively(large, 2)}
    batch = batch_of()
    _, found = run(task, tree)
    options = {'segments': batch['segments'], 'positions': batch['positions']}

    @jax.jit
    def laws(tree):
        logits = (plain_forward(large, tree['teacher'], batch['tokens'], **options),
                  model.forward(CFG, RCFG, tree, batch['tokens'], **options))
        p, q = map(jax.nn.log_softmax, logits)
        return (jnp.exp(p) * (p - q)).sum(-1)

    mean = lambda a: (a * batch['weights']).sum() / batch['weights'].sum()
    np.testing.assert_allclose(found['kl'], mean(laws(tree)), rtol=1e-4)
    alone = run(TASK, params)[1]  # as a drafter it is the base that judges it
    for name, same in (('overlap', 'overlap'), ('base_agreement', 'agreement'), ('drafts_kept', 'drafts_kept')):
        np.testing.assert_allclose(found[name], alone[same], rtol=1e-5)
    training = jax.eval_shape(lambda: task.loss(tree, batch | {'step': 0}, None)[1])
    assert 'base_agreement' not in training and 'drafts_kept' not in training, 'a third pass, for evaluation only'
    with pytest.raises(ConfigError, match='teacher has 60 words, the base 61'):
        RadTask(CFG, RCFG, teacher=large.replace(vocab_size=60))


def test_parts_of_the_base_that_are_trained_take_their_places(params):
    """Norms of the replaced layers, attentions in place, and a shared output projection."""
    norms = dataclasses.replace(TASK, train='ssm_plus_norms', share_out=True)
    own = norms.own(params['base'], jax.random.key(0))
    assert set(own['mixers']) == set(params['rad']['mixers']) - {'out_proj'}
    own['layers'] = jax.tree.map(lambda a: a + 1, own['layers'])
    base, merged = params['base'], whole((1, 3), {'base': params['base'], 'rad': own})
    for name in ('attn_norm', 'mlp_norm'):
        change = merged['base']['layers'][name]['scale'] - base['layers'][name]['scale']
        np.testing.assert_allclose(change, np.array([0, 1, 0, 1])[:, None] * np.ones(16), atol=1e-6)
    np.testing.assert_array_equal(merged['rad']['mixers']['out_proj']['kernel'],
                                  base['layers']['attn']['o']['kernel'][np.array([1, 3])])
    assert merged['base']['layers']['attn'] is base['layers']['attn'] and whole((1, 3), merged) is merged

    control = dataclasses.replace(TASK, in_place=True, kl=0.0, ce=1.0)
    mine = control.own(base, None)
    assert set(mine) == {'layers'} and set(mine['layers']) == {'attn'}
    loss, found = run(control, {'base': base, 'rad': mine})
    assert float(found['kl']) == 0 and float(found['agreement']) == 1
    np.testing.assert_allclose(loss, found['teacher_nll'], rtol=1e-6)
    grads = jax.jit(jax.grad(lambda mine: control.loss({'base': base, 'rad': mine}, batch_of(), None)[0]))(mine)
    assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(grads))
