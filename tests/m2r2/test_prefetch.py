"""Predictors of experts: what they may know, what they equal when untrained, that they learn, and what is recorded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backbone.config import MoeConfig
from backbone.errors import ConfigError
from backbone.layers import attend, block, norm, out, qkv, read_write
from backbone.model import embed, run_layers, sequence_context
from configs import prefetch as config_file
from m2r2 import expert_traces, prefetch, prefetch_task, recall, routing_trace
from m2r2.config import M2R2Config
from m2r2.prefetch import PREDICTORS, FastStream, PrefetchConfig, StateAdapter
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=61, hidden=16, layers=4, heads=2, kv_heads=1)
CFG = CFG.replace(mlp=dataclasses.replace(CFG.mlp, intermediate_size=8), moe=MoeConfig(8, 2))
SHAPE = PrefetchConfig(interval=2, reach=2, rank=8)
TASK = prefetch_task.PrefetchTask(CFG, SHAPE)
LEADS = SHAPE.leads(CFG.num_layers)


def tokens_of(seed, rows=4, size=20):
    return np.random.default_rng(seed).integers(0, 61, (rows, size)).astype(np.int32)


def batch_of(tokens):
    return {'tokens': tokens, 'weights': jnp.ones(tokens.shape), 'segments': jnp.zeros(tokens.shape, jnp.int32),
            'positions': jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))}


@pytest.fixture(scope='module')
def params():
    mine = jax.jit(functools.partial(prefetch.init_params, SHAPE, CFG))(jax.random.key(1))
    base = lively(CFG)
    base['layers']['moe']['experts']['down'] *= 0.5  # as in a trained model, a layer moves the residual a little
    return {'base': base, 'prefetch': mine}


@pytest.fixture(scope='module')
def stirred(params):
    """Predictors that say something of their own."""
    rng = np.random.default_rng(2)
    return params | {'prefetch': jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(np.float32),
                                              params['prefetch'])}


@pytest.fixture(scope='module')
def every():
    """(what was seen, every predictor's scores by lead) of tokens."""

    @jax.jit
    def run(params, tokens):
        seen = prefetch.observe(CFG, SHAPE, params['base'], params['prefetch'], tokens,
                                sequence_context(CFG, tokens.shape))
        return seen, {name: {lead: prefetch.scores(CFG, SHAPE, name, params['base'], params['prefetch'], seen, lead,
                                                   layers) for lead, layers in LEADS.items()} for name in PREDICTORS}
    return run


@pytest.fixture(scope='module')
def gradient():
    """((loss, metrics), gradients of the whole tree) of tokens."""
    return jax.jit(jax.value_and_grad(lambda params, tokens: TASK.loss(params, batch_of(tokens), jax.random.key(0)),
                                      has_aux=True))


def test_what_is_foretold_and_when():
    by_rate = PrefetchConfig(interval=3, rate=2, further=1)
    assert [by_rate.targets(layer, 6) for layer in range(6)] == [(1, 2), (2, 3, 4), (4, 5), (4, 5), (5,), ()]
    assert PrefetchConfig(interval=3, further=0).targets(1, 6) == (2, 3)
    assert LEADS == {1: (0, 1, 2), 2: (0, 1)}
    m = SHAPE.m2r2(CFG)
    assert (m.starts, m.exits, m.ffn) == ((0, 2), (2, 3), False)
    assert [FastStream(shape=SHAPE).restarts(layer) for layer in range(4)] == [True, False, True, False]
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in jax.eval_shape(
        functools.partial(prefetch.init_params, SHAPE, CFG), jax.random.key(0)).items()}
    assert sizes['fast'] == sizes['state'] > 0


def test_the_runtimes_form_is_the_whole_sequences_form(stirred, every):
    """Layer by layer as the protocol has it, on the plain model's own stream: the same slow stream, the same scores."""
    tokens, predictors = tokens_of(3), {'fast': FastStream(shape=SHAPE), 'adapter': StateAdapter(shape=SHAPE)}
    base, mine = stirred['base'], stirred['prefetch']

    @jax.jit
    def by_layer(base, mine):
        ctx = sequence_context(CFG, tokens.shape)
        x, stream, found = embed(CFG, base, tokens, ctx.positions), None, {}
        for layer in range(CFG.num_layers - 1):
            p = jax.tree.map(lambda a, layer=layer: a[layer], base['layers'])
            fast = predictors['fast']
            stream = fast.begin(mine, x) if fast.restarts(layer) else stream
            q, k, v = qkv(CFG, p['attn'], norm(CFG, p['attn_norm'], x), ctx)
            keys, values, _ = read_write(None, k, v, ctx)
            after = x + out(CFG, p['attn'], attend(q, keys, values, ctx))
            stream = fast.beside(CFG, p, fast.layer_params(mine, layer), stream, keys, values, ctx)
            for name, predictor in predictors.items():
                view = prefetch.expert_guess.View(after, stream, (), ctx.positions, jnp.int32(layer))
                for target in predictor.targets(layer, CFG.num_layers):
                    there = jax.tree.map(lambda a, t=target: a[t], base['layers'])
                    where = {'mlp_norm': there['mlp_norm'], 'router': there['moe']['router']}
                    found[name, layer, target - layer] = predictor.scores(
                        CFG, where, predictor.layer_params(mine, layer), view)
            x, _, _ = block(CFG, p, x, None, ctx)
        _, _, taps = run_layers(CFG, base, embed(CFG, base, tokens, ctx.positions), None, ctx, taps=('router:3',))
        return found, taps['router:3']

    found, last = by_layer(base, mine)
    seen, scores = every(stirred, tokens)
    np.testing.assert_allclose(seen.logits[3], last, atol=1e-4)
    assert len(found) == 2 * sum(map(len, LEADS.values()))
    for (name, layer, lead), value in found.items():
        np.testing.assert_allclose(scores[name][lead][LEADS[lead].index(layer)], value, atol=1e-4)


def test_untrained_the_adapter_is_the_next_router_and_the_oracle_is_right(params, stirred, every):
    tokens = tokens_of(4)
    seen, scores = every(params, tokens)
    for lead, layers in LEADS.items():
        np.testing.assert_allclose(scores['adapter'][lead], scores['next_router'][lead], atol=1e-5)
        truth = seen.ids[jnp.asarray(layers) + lead]
        assert float(prefetch.recall(scores['oracle'][lead], truth, 2).min()) == 1
        assert abs(float(prefetch.recall(scores['random'][lead], truth, 2).mean()) - 2 / 8) < 0.06
    other = every(stirred, tokens)
    np.testing.assert_array_equal(other[0].logits, seen.logits)  # predictors change nothing of the slow stream
    assert float(jnp.abs(other[1]['adapter'][2] - scores['adapter'][2]).max()) > 0.1


def test_what_earlier_tokens_chose(params, every):
    """previous and frequency against a walk in numpy."""
    seen, scores = every(params, tokens_of(4))
    ids = np.asarray(seen.ids)
    for lead, layers in LEADS.items():
        for i, layer in enumerate(layers):
            for t in range(4):
                chosen = ids[layer + lead, 1, :t]
                want = [max([s + 1 for s in range(t) if e in chosen[s]], default=0) for e in range(8)]
                np.testing.assert_array_equal(scores['previous'][lead][i, 1, t], want)
                np.testing.assert_array_equal(scores['frequency'][lead][i, 1, t], np.bincount(chosen.ravel(),
                                                                                              minlength=8))


def test_nothing_is_known_of_later_tokens(stirred, every):
    """Token 9 and all after it are others: predictions up to 8 are the same, later ones are not. What only counts does
    not even read the token itself."""
    tokens = tokens_of(5)
    changed = tokens.copy()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61
    (_, one), (_, two) = every(stirred, tokens), every(stirred, changed)
    for name in PREDICTORS:
        until = 10 if name in ('previous', 'frequency') else 9
        for lead in LEADS:
            a, b = np.asarray(one[name][lead]), np.asarray(two[name][lead])
            np.testing.assert_allclose(a[:, :, :until], b[:, :, :until], atol=1e-5)
            assert name == 'random' or np.abs(a[:, :, until:] - b[:, :, until:]).max() > 1e-2, name


def test_training_reaches_the_predictors_only_and_pays(params, gradient):
    """On tokens not trained on: the fast stream, and its control, name more experts than the routers untrained. Which
    of the two is better is not claimed."""
    mine, rule = params['prefetch'], optax.adam(0.01)
    state = rule.init(mine)
    fresh = tokens_of(100)
    for step in range(40):
        (_, _), grads = gradient(params | {'prefetch': mine}, tokens_of(step))
        assert not any(np.any(a) for a in jax.tree.leaves(grads['base']))
        if step == 1:  # at first B is zero, and A is not asked
            assert all(np.any(a) for a in jax.tree.leaves(grads['prefetch']))
        updates, state = rule.update(grads['prefetch'], state)
        mine = optax.apply_updates(mine, updates)
    start, end = (gradient(params | {'prefetch': m}, fresh)[0][1] for m in (params['prefetch'], mine))
    assert end['kl_fast'] < 0.8 * start['kl_fast'] and end['kl_adapter'] < 0.9 * start['kl_adapter']
    mean = lambda name, of: np.mean([of[f'{name}_{lead}{extra}'] for lead in LEADS for extra in ('', '_extra')])
    for name in ('fast', 'adapter'):
        assert mean(name, end) > mean('next_router', end) + 0.01, name
        assert mean(name, end) > mean(name, start) + 0.03, name
    assert mean('next_router', end) == mean('next_router', start) and mean('oracle', end) == 1
    assert mean('fast', end) > mean('random', end) + 0.1
    assert TASK.trainable == ('prefetch/.*',)


def test_the_recorded_trace_says_the_same(stirred, gradient, tmp_path):
    """By way of the file, the recall of each predictor is the task's metric on those tokens."""
    tokens = tokens_of(6)
    ids, made = routing_trace.record(CFG, SHAPE, stirred, tokens, 3)
    assert ids.shape == (80, 4, 2) and all(a.shape == (80, 4, 2, 3) and a.dtype == np.int32 for a in made.values())
    expert_traces.save(tmp_path / 'trace.npz', ids, 8, made)
    read, count, known = expert_traces.load(tmp_path / 'trace.npz')
    np.testing.assert_array_equal(read, ids)
    assert count == 8 and set(known) == set(PREDICTORS)
    _, metrics = gradient(stirred, tokens)[0]
    found = recall.table(ids, known, (2, 3))
    for name in ('fast', 'adapter', 'next_router', 'oracle'):
        for lead in LEADS:
            want = [metrics[f'{name}_{lead}'], metrics[f'{name}_{lead}_extra']]
            np.testing.assert_allclose(found[name][:, lead - 1], want, atol=1e-5)
    assert (made['previous'][0] == -1).all() and (made['previous'][1, 0, 0, :2] >= 0).all()
    assert sorted(made['previous'][1, 0, 0, :2]) == sorted(ids[0, 1])
    assert (made['fast'][:, 3] == -1).all(), 'the last layer has nothing to foretell'


@pytest.mark.parametrize('changes, said', [
    ({'prefetch': {'interval': 0}}, 'interval'), ({'prefetch': {'rate': 2, 'size': 1}}, 'prefetch.size'),
    ({'temperature': 0.0}, 'temperature'), ({'colour': 1}, 'colour'), ({'attention': 'none'}, 'attention'),
    ({'model': CFG.to_dict() | {'moe': None}}, 'experts')])
def test_a_wrong_field_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        prefetch_task.build(**({'model': CFG.to_dict(), 'prefetch': {'rank': 4}} | changes))


def test_the_fast_stream_of_a_mixture_passes_no_experts():
    with pytest.raises(ConfigError, match='ffn must be False'):
        M2R2Config.of(CFG, {'exits': (2,)})


def test_the_config_can_be_tried_on_a_random_mixture():
    task = prefetch_task.build(**config_file.get_config('tiny').task.kwargs.to_dict())
    assert task.cfg.moe.num_experts == 8 and max(task.shape.leads(task.cfg.num_layers)) == 3
