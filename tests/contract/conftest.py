import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.layout import pack
from backbone.model import PlainTarget
from harness.baselines import Autoregressive, EarlyExit, Lookahead, PromptLookup, TwoModel
from harness.decode import generate
from m2r2.config import M2R2Config
from m2r2.drafter import M2R2Drafter
from m2r2.gates import GateConfig
from rad import drafter as rad
from rad.skip import SkipConfig, SkipDrafter
from sparsity import drafter as sparsity
from tensorhead.config import TensorHeadConfig
from tensorhead.drafter import TensorHeadDrafter

NEW = 24


@pytest.fixture(scope='session')
def target(cfg):
    return PlainTarget(cfg)


@pytest.fixture(scope='session')
def params(params, drafters):
    made = {'tensorhead': drafters['tensorhead'].init_params(jax.random.key(2)),
            'm2r2': drafters['m2r2'].init_params(jax.random.key(3)),
            'sparsity': drafters['sparsity'].init_params(jax.random.key(4)),
            'rad': drafters['rad'].init_params(jax.random.key(5))}
    return params | jax.tree.map(lambda a: a + 0.05 if a.ndim > 1 else a, made)


@pytest.fixture(scope='session')
def packed(cfg, params):
    """The same model as it decodes: unstacked and fused. (target, params)"""
    return PlainTarget(cfg, stacked=False), params | {'base': pack(params['base'])}


@pytest.fixture(scope='session')
def drafters(cfg, small_cfg):
    thin = {'heads': 0.5, 'neurons': 0.5, 'block': 4, 'refresh': 2}
    sees = {'width_heads': 8, 'width_neurons': 8, 'block': 4}
    return {'prompt_lookup': PromptLookup(4), 'lookahead': Lookahead(5, 3), 'early_exit': EarlyExit(cfg, 2, 3),
            'two_model': TwoModel(small_cfg, 3), 'skip': SkipDrafter(cfg, SkipConfig((1, 2), (3,)), 3),
            'm2r2': M2R2Drafter(cfg, M2R2Config.of(cfg, {'exits': (2,), 'rank': 4, 'qo_rank': 2, 'carry': 8}), 3,
                                doubt=50, gate=GateConfig('arla_tokens', 4)),
            'sparsity': sparsity.build(cfg, thin, predictor=sees, block=3),
            'rad': rad.build(cfg, {'layers': (1, 3)}, block=3),
            'tensorhead': TensorHeadDrafter(TensorHeadConfig(cfg.hidden_size, cfg.vocab_size, 4, 3, inner_rank=8))}


@pytest.fixture(scope='session')
def plain(target, params, prompts):
    """What plain decoding says: the reference of every identity below."""
    return generate(target, Autoregressive(), params, prompts, max_new_tokens=NEW).tokens


@pytest.fixture(scope='session')
def script(prompts, plain):
    rows = [p + t for p, t in zip(prompts, plain, strict=True)]
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        table[row, :len(ids)] = ids
    return jnp.array(table)
