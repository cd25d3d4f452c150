"""Contract test 8: eight fake devices equal one; and the published shapes shard without being made."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import presets
from backbone.errors import ConfigError
from backbone.mesh import AXES, make_mesh, shardings
from backbone.model import PlainTarget, abstract_params, forward
from harness.baselines import Autoregressive, EarlyExit, PromptLookup
from harness.decode import generate
from tests.conftest import lively, tiny_config


@pytest.fixture(scope='module')
def wide():
    cfg = tiny_config(vocab=96, hidden=32, heads=8, kv_heads=4)
    return cfg, lively(cfg)


@pytest.mark.parametrize('shape', ({'data': 8}, {'data': 2, 'model': 4}, {'model': 8}))
@pytest.mark.filterwarnings('ignore:.*replicated')  # 4 kv heads over 8 devices, on purpose
def test_eight_devices_equal_one(wide, shape):
    cfg, base = wide
    mesh = make_mesh(**shape)
    spread = jax.device_put(base, shardings(cfg, base, mesh, fsdp=True))
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, cfg.vocab_size)
    placed = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')))
    got = jax.jit(lambda p, t: forward(cfg, p, t))(spread, placed)
    np.testing.assert_allclose(got, forward(cfg, base, tokens), atol=1e-5)
    sharded = [a for a in jax.tree.leaves(spread) if not a.sharding.is_fully_replicated]
    assert len(sharded) >= 7  # it really is spread: embedding, head, q, o and the MLP at the least


@pytest.mark.parametrize('make', (lambda cfg: Autoregressive(), lambda cfg: PromptLookup(3),
                                  lambda cfg: EarlyExit(cfg, 2, 3)), ids=('plain', 'lookup', 'early_exit'))
def test_decoding_on_eight_devices_equals_one(wide, make):
    cfg, base = wide
    prompts = [[1, 2, 3, 1, 2], [7], [5, 6], [8] * 9]
    mesh = make_mesh(data=2, model=4)
    spread = jax.device_put(base, shardings(cfg, base, mesh))
    run = lambda p: generate(PlainTarget(cfg), make(cfg), {'base': p}, prompts, max_new_tokens=12).tokens
    assert run(spread) == run(base)


def test_axes_are_always_there():
    assert make_mesh(data=4).axis_names == AXES
    with pytest.raises(ConfigError, match='needs 16 devices, 8'):
        make_mesh(data=16)


@pytest.mark.parametrize('name', sorted(presets.PRESETS))
def test_published_shapes_shard(name):
    """Every preset on data=2 x model=4: what the axes divide is split, and no array is made."""
    cfg = presets.PRESETS[name]
    tree = abstract_params(cfg, jnp.bfloat16)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        placed = shardings(cfg, tree, make_mesh(data=2, model=4), fsdp=True)
    local = lambda a, s: int(np.prod(s.shard_shape(a.shape)))
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True))
    whole = sum(a.size for a, _ in pairs)
    mine = sum(local(a, s) for a, s in pairs)
    assert whole / 8 <= mine < (0.2 if not notes else 1.0) * whole
