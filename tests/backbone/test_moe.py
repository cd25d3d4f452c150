"""The mixture of experts against a loop over tokens written in numpy, and as part of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone import layout, moe
from backbone.config import MoeConfig
from backbone.errors import ConfigError
from backbone.language_model import LanguageModel
from backbone.layers import feed
from backbone.model import PlainTarget, hidden_states, init_params, unembed
from harness.train_step import BATCH_KEYS
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

E, K, D, F = 6, 2, 16, 12
# What routing can be: both conventions, everyone to all, one expert each, and a shared one besides.
SHAPES = {'mixtral': MoeConfig(E, K), 'shared': MoeConfig(E, 3, norm_topk=False, shared_size=20),
          'all': MoeConfig(4, 4), 'one': MoeConfig(E, 1, norm_topk=False)}


def config(shape: MoeConfig, **changes):
    return tiny_config(hidden=D, layers=3, max_seq_len=32, **changes).replace(moe=shape)


def layer_of(cfg, seed=0) -> dict:
    """One layer's mixture, with a router that decides."""
    found = jax.tree.map(lambda a: 1.5 * a[0], init_params(cfg, jax.random.key(seed))['layers']['moe'])
    return found | {'router': {'kernel': 2 * found['router']['kernel']}}


def by_hand(cfg, p, x):
    """float64, one token after the other, straight from the definition."""
    p, shape = jax.tree.map(lambda a: np.asarray(a, np.float64), p), cfg.moe
    silu = lambda a: a / (1 + np.exp(-a))
    out, chosen = np.zeros(x.shape), []
    for t, row in enumerate(np.asarray(x, np.float64)):
        logits = row @ p['router']['kernel']
        chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = sorted(range(shape.num_experts), key=lambda e: (-chances[e], e))[:shape.experts_per_token]
        total = sum(chances[e] for e in best) if shape.norm_topk else 1.0
        for e in best:
            gate, up, down = (p['experts'][name][e] for name in ('gate', 'up', 'down'))
            out[t] += chances[e] / total * ((silu(row @ gate) * (row @ up)) @ down)
        if 'shared' in p:
            gate, up, down = (p['shared'][name]['kernel'] for name in ('gate', 'up', 'down'))
            out[t] += (silu(row @ gate) * (row @ up)) @ down
        chosen.append(best)
    return out, np.array(chosen)


@pytest.fixture(scope='module')
def x():
    return jax.random.normal(jax.random.key(9), (3, 7, D))


@pytest.mark.parametrize('name', SHAPES)
def test_grouped_is_dense_is_a_loop(name, x):
    cfg = config(SHAPES[name])
    p = layer_of(cfg)
    expected, chosen = by_hand(cfg, p, x.reshape(-1, D))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    found = {}
    for which in moe.IMPLEMENTATIONS:
        def loss(p, x, which=which):
            y = moe.apply(cfg, p, x, which)
            return (y * weight).sum(), y
        (_, y), found[which] = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, x)
        np.testing.assert_allclose(y.reshape(-1, D), expected, atol=2e-5)
    routing = moe.route(cfg.moe, p['router'], x)
    assert np.array_equal(routing.ids.reshape(chosen.shape), chosen)
    assert name == 'all' or len({tuple(sorted(row)) for row in chosen.tolist()}) > 3  # tokens really part
    for which in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found[which], found['dense'])
    if name == 'one':  # the weight of a single expert is its probability: only so does the router learn
        assert np.abs(found['grouped'][0]['router']['kernel']).max() > 1e-2


def test_the_loop_would_catch_a_wrong_weight_or_expert(x):
    """Negative control: unscaled weights, and a neighbour's expert, are far outside the tolerance."""
    cfg = config(SHAPES['mixtral'])
    p = layer_of(cfg)
    expected, _ = by_hand(cfg, p, x.reshape(-1, D))
    right = moe.route(cfg.moe, p['router'], x)
    wrong = (moe.route(dataclasses.replace(cfg.moe, norm_topk=False), p['router'], x),
             right.replace(ids=(right.ids + 1) % E))
    for routing in wrong:
        y = moe.grouped(cfg, p, x, routing)
        assert np.abs(y.reshape(-1, D) - expected).max() > 1e-2


def test_all_tokens_to_one_expert_and_none_is_dropped(x):
    cfg = config(MoeConfig(E, 1))
    p = layer_of(cfg)
    towards = jnp.zeros((D, E)).at[:, 4].set(1.0)
    p = p | {'router': {'kernel': towards}}
    positive = jnp.abs(x)
    y = moe.grouped(cfg, p, positive)
    assert (moe.route(cfg.moe, p['router'], positive).ids == 4).all()
    only = moe.expert(cfg, jax.tree.map(lambda a: a[4], p['experts']), positive)
    np.testing.assert_allclose(y, only, atol=1e-5)


def test_equals_go_to_the_lower_id():
    routing = moe.choose(MoeConfig(5, 3), jnp.array([[0.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 5]))
    assert routing.ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert routing.ids.dtype == jnp.int32 and routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(routing.weights[1], 1 / 3, atol=1e-6)


@pytest.mark.parametrize('which', moe.IMPLEMENTATIONS)
def test_a_token_alone_gets_what_it_gets_in_a_block(which, x):
    cfg = config(SHAPES['shared'])
    p = layer_of(cfg)
    run = jax.jit(lambda x: moe.apply(cfg, p, x, which))
    block = run(x)
    alone = jnp.stack([run(x[1, i]) for i in range(x.shape[1])])
    np.testing.assert_allclose(block[1], alone, atol=1e-6 * float(jnp.abs(block).max()))


def test_experts_of_nobody_get_no_gradient(x):
    cfg = config(MoeConfig(E, 1))
    p = layer_of(cfg)
    p = p | {'router': {'kernel': jnp.zeros((D, E)).at[:, 2].set(1.0)}}
    grads = jax.grad(lambda p: moe.grouped(cfg, p, jnp.abs(x)).sum())(p)['experts']
    used = np.abs(grads['up']).max((1, 2)) > 0
    assert used.tolist() == [e == 2 for e in range(E)]


def test_balance_loss_is_its_definition(x):
    shape = MoeConfig(E, K)
    p = layer_of(config(shape))
    routing = moe.route(shape, p['router'], x)
    counted = (jnp.arange(7) < 5)[None, :] & jnp.ones((3, 1), bool)
    chances = np.asarray(jax.nn.softmax(routing.logits, -1), np.float64)
    f, mean, total = np.zeros(E), np.zeros(E), 0
    for b in range(3):
        for s in range(5):
            total += 1
            mean += chances[b, s]
            for e in routing.ids[b, s]:
                f[int(e)] += 1
    expected = E * float((f / total * mean / total).sum())
    found = moe.balance_loss(routing.logits, routing.ids, counted)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(float(moe.balance_loss(routing.logits, routing.ids)) - expected) > 1e-3  # control: padding counted too
    even = jnp.stack([jnp.roll(jnp.array([9.0, 9.0, 0, 0, 0, 0]), 2 * i) for i in range(3)])
    np.testing.assert_allclose(moe.balance_loss(even, moe.choose(shape, even).ids), K, rtol=1e-5)
    lopsided = jnp.tile(even[:1], (3, 1))
    assert float(moe.balance_loss(lopsided, moe.choose(shape, lopsided).ids)) > 0.99 * E  # all at the same two


@pytest.fixture(scope='module')
def model():
    """With queries and keys normed too, as OLMoE's are; so many experts that steps and blocks run them differently."""
    cfg = config(MoeConfig(8, K, shared_size=20))
    cfg = cfg.replace(attention=dataclasses.replace(cfg.attention, qk_norm=True))
    return cfg, lively(cfg)


@pytest.fixture(scope='module')
def forced(model):
    """tokens [2, 9], and the whole sequences' hidden states and logits."""
    cfg, base = model
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, cfg.vocab_size)
    hidden = jax.jit(lambda tokens: hidden_states(cfg, base, tokens))(tokens)
    return tokens, hidden, unembed(cfg, base, hidden)


@pytest.mark.parametrize('stacked', (True, False), ids=('stacked', 'packed'))
def test_decoding_step_by_step_is_teacher_forced(model, forced, stacked):
    (cfg, base), (tokens, last, expected) = model, forced
    params = {'base': base if stacked else layout.pack(base)}
    target = PlainTarget(cfg, stacked=stacked)
    step = jax.jit(lambda tokens, cache: target.forward(params, tokens, cache, taps=('router:1', 'hidden:last')))
    cache, logits, routers, hidden = target.init_cache(2, 16, 1), [], [], []
    for i in range(9):
        out = step(tokens[:, i:i + 1], cache)
        cache = caches.commit(out.cache, jnp.zeros(2, int), tokens[:, i])
        logits.append(out.logits)
        routers.append(out.taps['router:1'])
        hidden.append(out.taps['hidden:last'])
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    np.testing.assert_allclose(jnp.concatenate(hidden, 1), last, atol=1e-5 * float(jnp.abs(last).max()))
    assert jnp.concatenate(routers, 1).shape == (2, 9, 8)
    of = lambda size: moe.fitting(cfg, jnp.zeros((2, size, D)))
    assert (of(1), of(9)) == ('gathered', 'grouped')
    assert np.ptp(np.asarray(moe.choose(cfg.moe, jnp.concatenate(routers, 1)).ids)[..., 0]) > 0


def test_packed_in_bfloat16_keeps_the_router_wide(model, forced):
    (cfg, base), (tokens, _, expected) = model, forced
    packed = layout.pack(base, jnp.bfloat16)
    found = packed['layers'][1]['moe']
    assert found['router']['kernel'].dtype == jnp.float32 and found['experts']['up'].dtype == jnp.bfloat16
    assert set(found['shared']) == {'gate_up', 'down'}
    target = PlainTarget(cfg, stacked=False)
    run = jax.jit(lambda params: target.forward({'base': params}, tokens, target.init_cache(2, 12, 1)).logits)
    apart = lambda logits: float(jnp.abs(logits - expected).mean() / jnp.abs(expected).mean())
    assert apart(run(packed)) < 0.1  # loose: rounding may send a token elsewhere
    other = lambda p: p | {'experts': {name: jnp.roll(a, 1, 0) for name, a in p['experts'].items()}}
    turned = [layer | {'moe': other(layer['moe'])} for layer in packed['layers']]
    assert apart(run(packed | {'layers': tuple(turned)})) > 0.3  # the control
    assert np.array_equal(packed['layers'][0]['moe']['router']['kernel'], base['layers']['moe']['router']['kernel'][0])


def test_training_with_the_balance_loss(model):
    cfg, base = model
    rng = np.random.default_rng(0)
    batch = {name: jnp.asarray(rng.integers(0, 40, (2, 8)), dtype) for name, dtype in BATCH_KEYS.items()}
    batch |= {'segments': jnp.zeros((2, 8), jnp.int32), 'positions': jnp.tile(jnp.arange(8), (2, 1)),
              'weights': jnp.ones((2, 8)).at[1, 5:].set(0)}
    run = lambda task: jax.jit(jax.value_and_grad(task.loss, has_aux=True))({'base': base}, batch, jax.random.key(0))
    (plain, metrics), grads = run(LanguageModel(cfg))
    (loss, also), other = run(LanguageModel(cfg, balance=0.5, remat='full'))
    assert 0.9 * K <= float(metrics['balance']) <= 8
    np.testing.assert_allclose(metrics['balance'], also['balance'], rtol=1e-5)
    np.testing.assert_allclose(loss - plain, 0.5 * metrics['balance'], rtol=1e-4)
    apart = lambda a, b: float(jnp.abs(a - b).max())
    routers = [g['base']['layers']['moe']['router']['kernel'] for g in (grads, other)]
    assert apart(*routers) > 1e-4  # the term reaches the router of every layer
    assert apart(grads['base']['lm_head']['kernel'], other['base']['lm_head']['kernel']) < 1e-5  # and not the head
    with pytest.raises(ConfigError, match='balance'):
        LanguageModel(tiny_config(), balance=0.1)


def test_what_cannot_be_is_refused(model, x):
    cfg, base = model
    with pytest.raises(ConfigError, match=r'moe.experts_per_token 7 is not in 1..6'):
        MoeConfig(6, 7)
    with pytest.raises(ConfigError, match='implementation: unknown'):
        moe.apply(cfg, layer_of(cfg), x, 'capacity')
    with pytest.raises(ConfigError, match='neurons'):
        feed(cfg, {'moe': layer_of(cfg)}, x, jnp.ones(F))
    with pytest.raises(ConfigError, match="unknown tap 'router:0'"):
        plain = tiny_config()
        target = PlainTarget(plain)
        jax.eval_shape(lambda: target.forward({'base': init_params(plain, jax.random.key(0))}, jnp.zeros((1, 1), int),
                                              target.init_cache(1, 4, 1), taps=('router:0',)))
    data = cfg.to_dict()
    assert type(cfg).from_dict(data) == cfg
    data['moe']['capacity'] = 2
    with pytest.raises(ConfigError, match='moe.capacity'):
        type(cfg).from_dict(data)
