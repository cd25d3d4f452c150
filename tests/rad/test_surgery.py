"""What a mixer begins as: exactly nothing and yet alive, or the attention's projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.layers import feed, norm
from backbone.layout import pack
from backbone.mamba2 import convolve, mix, project, ssd
from backbone.model import forward as base_forward
from backbone.model import hidden_states, unembed
from rad import model, surgery
from rad.config import RadConfig
from tests.conftest import lively, tiny_config
from tests.rad.hybrids import rad_config

pytestmark = pytest.mark.usefixtures('quick_compile')
TOKENS = jnp.array([[4, 8, 15, 16, 23, 42, 4], [1, 1, 2, 3, 5, 8, 13]])


@pytest.fixture(scope='module')
def base(cfg):
    return lively(cfg)


def without_attention(cfg, layers):
    """A plain layer function in which these layers have an MLP only, written on its own."""
    from backbone.layers import block

    def layer(cfg, p, x, state, ctx, skipped):
        kept, state, taps = block(cfg, p, x, state, ctx)
        bare = x + feed(cfg, p, norm(cfg, p['mlp_norm'], x))[0]
        return jnp.where(skipped, bare, kept), state, taps

    flags = jnp.isin(jnp.arange(cfg.num_layers), jnp.array(layers))
    return {'layer_fn': layer, 'extra': flags}


@pytest.mark.parametrize('gated_norm', (True, False))
def test_it_begins_as_the_model_without_these_attentions(cfg, base, gated_norm):
    """Bit for bit, and each mixer says exactly 0; with the conv bias zero too, or x zero alone, it is not the same."""
    rcfg = rad_config(cfg, gated_norm=gated_norm)
    rad = surgery.init_rad(cfg, rcfg, base, jax.random.key(0))
    u = jax.random.normal(jax.random.key(1), (2, 9, cfg.hidden_size))
    for i in range(2):
        mixer = jax.tree.map(lambda a, i=i: a[i], rad['mixers'])
        assert not mix(rcfg.ssm, mixer, u)[0].any()
        np.testing.assert_array_equal(mixer['out_proj']['kernel'], base['layers']['attn']['o']['kernel'][i + 1])
    got = jax.jit(lambda p: model.forward(cfg, rcfg, p, TOKENS))({'base': base, 'rad': rad})
    skipped = without_attention(cfg, rcfg.layers)
    want = jax.jit(lambda p: unembed(cfg, p, hidden_states(cfg, p, TOKENS, **skipped)))(base)
    np.testing.assert_array_equal(got, want)
    assert float(jnp.abs(want - jax.jit(lambda p: base_forward(cfg, p, TOKENS))(base)).max()) > 0.1


def in_parts(rcfg, kernel):
    z, x, b, c, _ = rcfg.ssm.parts
    return dict(zip('zxBCd', np.split(np.asarray(kernel), np.cumsum((z, x, b, c)), axis=-1), strict=True))


@pytest.mark.parametrize('gated_norm', (True, False))
def test_gradients_enter_by_the_gate_and_are_everywhere_a_step_later(cfg, base, gated_norm):
    """At step 0 the columns of z alone move; after it all of in_proj does, and after another one the convolution's
    taps, whose inputs were 0 till then. With a conv bias of zero nothing ever moves, and the check says so."""
    rcfg = rad_config(cfg, gated_norm=gated_norm)
    mixers = surgery.init_rad(cfg, rcfg, base, jax.random.key(0))['mixers']

    @jax.jit
    def gradient(mixers):
        def loss(mixers):
            logits = model.forward(cfg, rcfg, {'base': base, 'rad': {'mixers': mixers}}, TOKENS)
            return (jax.nn.logsumexp(logits[:, :-1], -1)
                    - jnp.take_along_axis(logits[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]).mean()
        return jax.grad(loss)(mixers)

    def step(mixers):
        found = gradient(mixers)
        return found, jax.tree.map(lambda a, g: a - 1e-3 * jnp.sign(g), mixers, found)

    surgery.check_alive(rcfg, mixers)
    first, mixers = step(mixers)
    moved = {name: (part != 0).mean() for name, part in in_parts(rcfg, first['in_proj']['kernel']).items()}
    assert moved['z'] > 0.99 and moved['x'] == moved['B'] == moved['C'] == moved['d'] == 0
    rest = {name: leaf for name, leaf in first.items() if name != 'in_proj'}
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(rest))
    second, mixers = step(mixers)
    assert all((part != 0).mean() > 0.9 for part in in_parts(rcfg, second['in_proj']['kernel']).values())
    assert not np.asarray(second['conv']['kernel']).any()
    everywhere = [np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(mixers))]
    assert all(everywhere)

    fresh = surgery.init_rad(cfg, rcfg, base, jax.random.key(0))['mixers']
    dead = fresh | {'conv': fresh['conv'] | {'bias': jnp.zeros_like(fresh['conv']['bias'])}}
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(dead)))
    with pytest.raises(ConfigError, match='rad.mixers of layer 1: in_proj is zero'):
        surgery.check_alive(rcfg, dead)
    half = fresh | {'out_proj': {'kernel': fresh['out_proj']['kernel'].at[1].set(0)}}
    with pytest.raises(ConfigError, match='rad.mixers of layer 2'):
        surgery.check_alive(rcfg, half)
    surgery.check_alive(rcfg, dead | {'in_proj': {'kernel': dead['in_proj']['kernel'] + 0.1}})


def test_the_usual_start(cfg):
    """Steps, decays and kernels lie where Mamba-2 has them."""
    rcfg = rad_config(cfg, range(4))
    found = surgery.init_mixers(cfg, rcfg, jax.random.key(0))
    dt, decay = jax.nn.softplus(found['dt_bias']), jnp.exp(found['A_log'])
    assert float(dt.min()) >= 1e-4 and 1e-3 < float(dt.mean()) < 0.1 and float(dt.max()) <= 0.1001
    assert float(decay.min()) >= 1 and float(decay.max()) <= 16 and float(decay.std()) > 1
    kernel, bias = found['conv']['kernel'], found['conv']['bias']
    assert 0.4 < float(jnp.abs(kernel).max()) <= 0.5 and float(jnp.abs(bias).min()) > 0
    assert len({str(a) for a in found['dt_bias']}) == 4  # one draw a layer
    none = surgery.init_rad(cfg, rad_config(cfg, ()), lively(cfg), jax.random.key(0))
    assert all(a.shape[0] == 0 for a in jax.tree.leaves(none))


def test_projections_are_taken_over_stored_or_packed(cfg, base):
    rcfg = rad_config(cfg, (0, 3))
    made = surgery.init_mamba_in_llama(cfg, rcfg, base, jax.random.key(0))['mixers']
    parts, attn = in_parts(rcfg, made['in_proj']['kernel']), base['layers']['attn']
    for i, l in enumerate(rcfg.layers):
        for name, source in zip('xBC', 'vkq', strict=True):
            np.testing.assert_array_equal(parts[name][i], attn[source]['kernel'][l])
        np.testing.assert_array_equal(made['out_proj']['kernel'][i], attn['o']['kernel'][l])
    assert parts['z'].any() and parts['d'].any()
    for native in (True, False):
        again = surgery.init_mamba_in_llama(cfg, rcfg, pack(base, native=native), jax.random.key(0))['mixers']
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match='must be .4, 2, 8, 8., as the attention is'):
        surgery.init_mamba_in_llama(cfg, rad_config(cfg, state_size=4), base, jax.random.key(0))


def test_linear_attention_exactly():
    """Without decay the recurrence is causal (Q K^T) V, each head with the keys and values of its group; tiled groups,
    the usual mistake, are not."""
    with jax.enable_x64(True):
        cfg = tiny_config(hidden=48, heads=6, kv_heads=2)
        base = jax.tree.map(lambda a: a.astype(float), lively(cfg))
        rcfg = rad_config(cfg, (1,))
        mixer = jax.tree.map(lambda a: a[0].astype(float),
                             surgery.init_linear_attention(cfg, rcfg, base)['mixers'])
        u = jax.random.normal(jax.random.key(1), (2, 21, 48), float)
        z, raw, dt = project(rcfg.ssm, mixer, u)
        np.testing.assert_allclose(dt, 1, atol=1e-7)  # the step is stored in float32
        _, x, b, c, _ = rcfg.ssm.parts
        before = jnp.zeros((2, rcfg.ssm.conv_width - 1, raw.shape[-1]))
        for got, want in zip(convolve(rcfg.ssm, mixer, raw, before), jnp.split(raw, (x, x + b), -1), strict=True):
            np.testing.assert_array_equal(got.reshape(want.shape), jax.nn.silu(want))  # it passes its input on
        v, k, q = (a.reshape(2, 21, -1, 8) for a in jnp.split(raw, (x, x + b), -1))
        y, _ = ssd(jnp.repeat(v, 3, 2), jnp.ones_like(dt), -jnp.exp(mixer['A_log']), k, q, mixer['D'], chunk=8)

        attn = jax.tree.map(lambda a: a[1], base['layers']['attn'])
        heads = lambda name: (u @ attn[name]['kernel']).reshape(2, 21, -1, 8)

        def attention(spread):
            keys, values = spread(heads('k')), spread(heads('v'))
            scores = jnp.einsum('bihd,bjhd->bhij', heads('q'), keys) * jnp.tril(jnp.ones((21, 21)))
            return jnp.einsum('bhij,bjhd->bihd', scores, values)

        np.testing.assert_allclose(y, attention(lambda a: jnp.repeat(a, 3, 2)), atol=1e-11)
        assert float(jnp.abs(y - attention(lambda a: jnp.tile(a, (1, 1, 3, 1)))).max()) > 1


@pytest.mark.parametrize('fields, message', [
    ({'layers': (2, 1)}, 'rad.layers must rise'), ({'layers': (1, 1)}, 'must rise'), ({'layers': (-1,)}, 'be negative'),
    ({'layers': (4,)}, r'\(4,\) are not all in 0..3'), ({}, 'rad.layers is missing'),
    ({'layers': (), 'depth': 1}, 'unknown field depth'), ({'layers': (1,), 'ssm': {'width': 4}}, 'ssm: unknown field'),
    ({'layers': (1,), 'ssm': {'num_heads': 8}}, '8 heads of 8 do not fit')])
def test_impossible_configs_are_refused(cfg, fields, message):
    with pytest.raises(ConfigError, match=message):
        RadConfig.of(cfg, fields)


def test_a_config_goes_through_a_dict(cfg):
    rcfg = rad_config(cfg, (0, 2), parallel=True, gated_norm=False, state_size=4)
    assert RadConfig.of(cfg, rcfg.to_dict()) == rcfg
    assert RadConfig.of(cfg, {'layers': [0, 2]}).ssm.num_groups == cfg.attention.num_kv_heads
