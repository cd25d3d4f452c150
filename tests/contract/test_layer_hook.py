"""A two-stream toy method: proof that a method composes its layer from the parts and copies no block.

A fast stream runs beside the slow one in the same layers and reads the slow stream's keys and values. The slow
stream must not notice: its logits and its cache are the base model's.
"""

import jax
import jax.numpy as jnp
import numpy as np

from backbone import cache as caches
from backbone.layers import attend, block, mlp, norm, out, qkv
from backbone.model import cache_context, embed, finish, run_layers, unembed


def two_streams(cfg, p, streams, state, ctx, extra):
    """The toy layer: `extra['scale']` is the method's own parameter, one a layer."""
    slow, fast = streams
    new_slow, state, taps = block(cfg, p, slow, state, ctx)
    q, _, _ = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], fast), ctx)
    fast = fast + extra['scale'] * out(cfg, p['attn'], attend(q, state.k, state.v, ctx))
    fast = fast + mlp(cfg, p['mlp'], norm(cfg, p['mlp_norm'], fast))
    return (new_slow, fast), state, taps


def run(cfg, base, tokens, cache, scale):
    ctx = cache_context(cfg, cache, tokens.shape[1])
    x = embed(cfg, base, tokens, ctx.positions)
    (slow, fast), layers, _ = run_layers(cfg, base, (x, x), cache.layers, ctx, layer_fn=two_streams,
                                         extra={'scale': scale})
    head = lambda h: unembed(cfg, base, finish(cfg, base, h))
    return head(slow), head(fast), layers


def test_slow_stream_is_the_base_and_the_fast_one_sees_it(target, packed, cfg, params):
    tokens = jnp.array([[4, 8, 15, 16, 23], [1, 1, 2, 3, 5]])
    for model, tree in ((target, params), packed):
        want = model.forward(tree, tokens, model.init_cache(2, 16, 0))
        ones, zeros = jnp.ones(cfg.num_layers), jnp.zeros(cfg.num_layers)
        slow, fast, layers = run(cfg, tree['base'], tokens, model.init_cache(2, 16, 0), ones)
        np.testing.assert_allclose(slow, want.logits, atol=1e-6)
        for a, b in zip(jax.tree.leaves(layers), jax.tree.leaves(want.cache.layers), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        # At scale 1 from the same start the fast stream is the slow one; at 0 it has no attention.
        np.testing.assert_allclose(fast, want.logits, atol=1e-5)
        assert float(jnp.abs(run(cfg, tree['base'], tokens, model.init_cache(2, 16, 0), zeros)[1] - fast).max()) > 1e-2


def test_the_methods_parameters_train_and_the_base_is_left_alone(cfg, params, target):
    tokens = jnp.array([[4, 8, 15, 16, 23]])

    def loss(scale, base):
        slow, fast, _ = run(cfg, base, tokens, target.init_cache(1, 8, 0), scale)
        return ((fast - jax.lax.stop_gradient(slow)) ** 2).sum()

    gradient = jax.grad(loss)(jnp.full(cfg.num_layers, 0.5), params['base'])
    assert (jnp.abs(gradient) > 1e-4).all()


def test_layers_run_in_slices(cfg, params, target):
    """lo..hi in two calls equals one; a skipped layer is gone, statically or by a traced vector."""
    tokens = jnp.array([[4, 8, 15, 16, 23]])
    for tree in (params['base'], params['base'] | {'layers': _unstack(params['base']['layers'])}):
        ctx = cache_context(cfg, caches.init_cache((), 1, 5), 5)
        x = embed(cfg, tree, tokens, ctx.positions)
        go = lambda x, tree=tree, ctx=ctx, **kw: run_layers(cfg, tree, x, None, ctx, **kw)[0]
        np.testing.assert_allclose(go(go(x, hi=1), lo=1), go(x), atol=1e-5)
        want = go(go(go(x, hi=1), lo=2, hi=3), lo=3)
        np.testing.assert_allclose(go(x, skip=(1,)), want, atol=1e-5)
        np.testing.assert_allclose(go(x, skip=jnp.array([False, True, False, False])), want, atol=1e-5)


def _unstack(layers):
    return tuple(jax.tree.map(lambda a: a[l], layers) for l in range(4))


def test_taps_agree_between_layouts(cfg, params, target, packed):
    names = ('hidden:0', 'hidden:2', 'hidden:4', 'hidden:last', 'attention:0', 'attention:3', 'mixer:1')
    tokens = jnp.array([[4, 8, 15, 16, 23]])
    one = target.forward(params, tokens, target.init_cache(1, 8, 0), taps=names)
    two = packed[0].forward(packed[1], tokens, packed[0].init_cache(1, 8, 0), taps=names)
    assert set(one.taps) == set(two.taps) == set(names)
    for name in names:
        np.testing.assert_allclose(one.taps[name], two.taps[name], rtol=1e-4, atol=1e-4)
    head = unembed(cfg, params['base'], one.taps['hidden:last'])
    np.testing.assert_allclose(head, one.logits, atol=1e-5)
    np.testing.assert_allclose(finish(cfg, params['base'], one.taps['hidden:4']), one.taps['hidden:last'], atol=1e-5)


def test_masks_silence_heads_and_neurons(cfg, params, target):
    """A masked head is the head whose rows of the output projection are zero; a neuron likewise."""
    tokens = jnp.array([[4, 8, 15, 16, 23]])
    heads = jnp.ones((4, 4)).at[1, 2].set(0)
    neurons = jnp.ones((4, 48)).at[3, 7].set(0)
    got = target.forward(params, tokens, target.init_cache(1, 8, 0), masks={'heads': heads, 'neurons': neurons}).logits
    layers = params['base']['layers']
    cut = layers | {'attn': layers['attn'] | {'o': {'kernel': layers['attn']['o']['kernel'].at[1, 16:24].set(0)}},
                    'mlp': layers['mlp'] | {'down': {'kernel': layers['mlp']['down']['kernel'].at[3, 7].set(0)}}}
    want = target.forward({'base': params['base'] | {'layers': cut}}, tokens, target.init_cache(1, 8, 0)).logits
    np.testing.assert_allclose(got, want, atol=1e-5)
    per_token = {'heads': jnp.broadcast_to(heads[:, None, None], (4, 1, 5, 4)),
                 'neurons': jnp.broadcast_to(neurons[:, None, None], (4, 1, 5, 48))}
    again = target.forward(params, tokens, target.init_cache(1, 8, 0), masks=per_token).logits
    np.testing.assert_allclose(again, want, atol=1e-5)
