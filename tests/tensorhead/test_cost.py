"""scripts/tensorhead_cost.py: its counts against figures worked out by hand, and against what a traced draft reads."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from backbone.model import PlainTarget, abstract_params
from backbone.presets import preset
from backbone.sampling import GREEDY
from harness.roofline import matmul_bytes
from tensorhead import head as heads
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter
from tests.conftest import tiny_config

SCRIPT = pathlib.Path(__file__).parents[2] / 'scripts' / 'tensorhead_cost.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('tensorhead_cost', SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(('n', 'r', 'mode', 'params'), [
    (4, 1, 'full', 2.1e9), (4, 4, 'full', 8.4e9), (4, 1, 'linear_shared', 67e6), (4, 4, 'linear_shared', 268e6),
    (4, 1, 'lowrank_shared', 2.1e6), (4, 4, 'lowrank_shared', 8.4e6)])
def test_parameters_at_the_shape_of_llama_8b(script, n, r, mode, params):
    cfg = preset('llama-3.1-8b')
    assert script.cost(cfg, TensorHeadConfig(4096, 128256, n, r, mode)).params == pytest.approx(params, rel=0.01)


@pytest.mark.parametrize('mode', ('lowrank_shared', 'linear_shared', 'full'))
@pytest.mark.parametrize('rank', (1, 3))
def test_bytes_and_flops_of_a_draft(script, mode, rank):
    """All weights of a traced draft's products, and not much else; of a draft vocabulary, too."""
    cfg = tiny_config(vocab=768, hidden=128)
    head = TensorHeadConfig(128, 768, 2, rank, mode, 16, draft_vocab=512)
    drafter, base = TensorHeadDrafter(head), abstract_params(cfg, jnp.bfloat16)
    tree = jax.eval_shape(lambda: heads.init(head, jax.random.key(0), jnp.arange(512, dtype=jnp.int32)))
    ready = jax.eval_shape(lambda t, b: drafter.ready(t, b, jnp.dtype('bfloat16')), tree, base)
    state = jax.eval_shape(lambda: drafter.init_state(1, 8))
    cache = jax.eval_shape(lambda: PlainTarget(cfg).init_cache(1, 8, 1))
    read = matmul_bytes(lambda p, c, s: drafter.draft(p, c, s, jax.random.key(0), GREEDY)[0].tokens,
                        {'base': base, 'tensorhead': ready}, cache, state)
    found = script.cost(cfg, head)
    assert found.read <= read < 1.08 * found.read
    unembed = 0 if mode == 'full' else 512 * 128
    own = {'lowrank_shared': 2 * 128 * 16, 'linear_shared': 128 * 128, 'full': 512 * 128}[mode]
    rows = 1 if rank == 1 else 2 * rank
    assert found.flops == 2 * (128 * rank + rank + rows * (own + unembed))

