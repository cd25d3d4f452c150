"""The order of neurons is nobody's business, and a good one puts together what is active together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import ConfigError
from backbone.mlp import neurons
from backbone.model import forward, init_params
from sparsity import layout, methods
from sparsity.target import SparseTarget
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, hidden=16, layers=2, heads=2, kv_heads=1)
OPT = ModelConfig('opt', 41, 16, 2, 48, AttentionConfig(2, 2, 8, qkv_bias=True, out_bias=True, position='learned'),
                  MlpConfig(24, 'relu', gated=False, bias=True), norm='layer', tie_embeddings=True, position_offset=2)


@pytest.mark.parametrize('cfg', (CFG, OPT), ids=('swiglu', 'relu'))
def test_another_order_is_the_same_model(cfg):
    base = init_params(cfg, jax.random.key(0))
    base = jax.tree.map(lambda a: a + 0.1 * jnp.arange(a.size).reshape(a.shape) / a.size, base)
    orders = jnp.stack([jax.random.permutation(jax.random.key(l), 24) for l in range(2)])
    turned = layout.permute(base, orders)
    tokens, run = jnp.arange(1, 9)[None], jax.jit(lambda base: forward(cfg, base, tokens))
    np.testing.assert_allclose(run(turned), run(base), rtol=1e-5, atol=1e-5)
    x = jax.random.normal(jax.random.key(5), (3, 16))
    hidden = lambda base, l: neurons(cfg, jax.tree.map(lambda a: a[l], base['layers']['mlp']), x)
    for l in range(2):
        np.testing.assert_allclose(hidden(turned, l), hidden(base, l)[:, orders[l]], rtol=1e-6, atol=1e-6)
    down = turned['layers']['mlp'] | {'down': base['layers']['mlp']['down']}  # all but one matrix moved: another model
    assert float(jnp.abs(run(turned | {'layers': turned['layers'] | {'mlp': down}}) - run(base)).max()) > 1e-3
    packed = layout.permute_packed(layout.pack(base), orders)
    jax.tree.map(np.testing.assert_array_equal, packed, layout.pack(turned))
    assert layout.has_rows(packed) and not layout.has_rows(base)
    np.testing.assert_allclose(run(packed), run(base), rtol=1e-5, atol=1e-5)


def test_neurons_that_are_active_together_share_blocks():
    """Eight groups of four, scattered: found again, and worth more than the order they came in."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(8), 4))
    active = rng.random((200, 8)) < 0.3
    activity = active[:, group] * rng.uniform(0.5, 1, (200, 32))
    order = layout.order(activity, 4)
    assert sorted(order.tolist()) == list(range(32))
    assert all(len(set(group[block])) == 1 for block in order.reshape(8, 4))
    assert layout.together(activity, order, 4) > layout.together(activity, np.arange(32), 4) + 0.1
    assert layout.order(activity, 1).tolist() == list(range(32))
    with pytest.raises(ConfigError, match='sparsity.block 5 does not divide 32'):
        layout.order(activity, 5)


def test_by_name():
    """What a card holds gives the target and its parameters, in the order it was made for."""
    kwargs = {'model': CFG.to_dict(), 'sparsity': {'neurons': 0.5, 'block': 4}, 'selector': 'static'}
    target = methods.build(**kwargs)
    assert isinstance(target, SparseTarget) and (target.compute, target.stacked) == ('gathered', False)
    assert methods.build(**kwargs | {'selector': 'teal'}).compute == 'masked'
    base = init_params(CFG, jax.random.key(0))
    orders = jnp.stack([jnp.arange(24)[::-1]] * 2)
    mean = {'mean': {'heads': jnp.ones((2, 1)), 'neurons': jnp.ones((2, 6))}}
    params = methods.pack({'base': base, 'sparsity': mean, 'order': orders}, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, params['base'], layout.pack(layout.permute(base, orders)))
    cache = target.init_cache(1, 8, 0)
    assert target.forward(params, jnp.ones((1, 1), jnp.int32), cache).logits.shape == (1, 1, 41)
