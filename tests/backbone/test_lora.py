"""Low-rank adapters: nothing at first, exactly W + alpha/r A B later, and only they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import lora
from backbone.errors import ConfigError
from backbone.formats.tensors import flatten
from backbone.model import forward

TOKENS = jnp.array([[4, 8, 15, 16, 23, 42]])


def filled(adapters: dict) -> dict:
    """As after training: no factor is zero."""
    return jax.tree.map(lambda a: a + jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) / 4, adapters)


@pytest.fixture(scope='module')
def base(params):
    return params['base']


def test_nothing_changes_at_first(cfg, base):
    adapters = lora.init(base, jax.random.key(0), rank=3)
    assert flatten(adapters)['layers/attn/q/kernel/a'].shape == (4, 32, 3)
    assert flatten(adapters)['layers/attn/k/kernel/b'].shape == (4, 3, 16)
    run = jax.jit(lambda p: forward(cfg, p, TOKENS))
    np.testing.assert_array_equal(run(lora.merge(base, adapters, 16.0)), run(base))
    assert float(jnp.abs(run(lora.merge(base, filled(adapters), 16.0)) - run(base)).max()) > 1e-2


@pytest.mark.parametrize('last', (None, 1))
def test_merging_is_adding_the_product(base, last):
    """x W' = x W + alpha/r (x A) B in each layer, at most rank r away, other leaves the same objects' values."""
    adapters = filled(lora.init(base, jax.random.key(1), 2, (r'layers/mlp/.*/kernel', 'embed/tokens'), last))
    merged, plain, parts = flatten(lora.merge(base, adapters, 6.0)), flatten(base), flatten(adapters)
    assert merged.keys() == plain.keys()
    path = 'layers/mlp/up/kernel'
    a, b = parts[f'{path}/a'], parts[f'{path}/b']
    first = 0 if last is None else 3
    assert len(a) == 4 - first
    x = jax.random.normal(jax.random.key(2), (5, 32))
    for layer in range(4):
        want = x @ plain[path][layer]
        if layer >= first:
            want = want + 6.0 / 2 * (x @ a[layer - first]) @ b[layer - first]
        np.testing.assert_allclose(x @ merged[path][layer], want, rtol=1e-5, atol=1e-5)
        scale = np.linalg.svd(np.float64(merged[path][layer]) - np.float64(plain[path][layer]), compute_uv=False)
        assert (scale > 1e-4).sum() == (2 if layer >= first else 0)
    changed = {name for name in plain if (merged[name] != plain[name]).any()}
    assert changed == {f'layers/mlp/{name}/kernel' for name in ('gate', 'up', 'down')} | {'embed/tokens'}


def test_only_the_adapters_learn(cfg, base):
    params = {'base': base, 'lora': filled(lora.init(base, jax.random.key(3), 2))}

    def loss(adapters, base):
        return (forward(cfg, lora.merge(base, adapters, 4.0), TOKENS) ** 2).mean()

    gradient = flatten(jax.jit(jax.grad(loss))(params['lora'], params['base']))
    assert gradient.keys() == {f'layers/attn/{name}/kernel/{part}' for name in 'qkvo' for part in 'ab'}
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in gradient.values())


def test_bad_requests_are_named(base):
    for arguments, named in ((dict(rank=0), 'rank 0 is outside 1..16'), (dict(rank=17), 'rank 17'),
                             (dict(rank=1, targets=('layers/atn/.*',)), "'layers/atn/.*' matches no parameter"),
                             (dict(rank=1, targets=('layers/attn_norm/scale',)), 'attn_norm/scale .* not a matrix'),
                             (dict(rank=1, last=5), 'last 5 is outside 1..4')):
        with pytest.raises(ConfigError, match=named):
            lora.init(base, jax.random.key(0), **arguments)
    with pytest.raises(ConfigError, match='layers/attn/x/kernel belongs to no parameter'):
        lora.merge(base, {'layers': {'attn': {'x': {'kernel': {'a': TOKENS, 'b': TOKENS}}}}}, 1.0)
