"""Shared by every test: eight fake CPU devices, float32 products at full precision, tiny models made once."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import jax
import pytest

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.model import init_params

jax.config.update('jax_default_matmul_precision', 'highest')
# What a test calls may turn the persistent cache on for all that follow, and now and then XLA:CPU dies of writing a
# program to it.
jax.config.update('jax_enable_compilation_cache', False)


def tiny_config(vocab=97, hidden=32, layers=4, heads=4, kv_heads=2, max_seq_len=96, **changes) -> ModelConfig:
    return ModelConfig('llama', vocab, hidden, layers, max_seq_len,
                       AttentionConfig(heads, kv_heads, hidden // heads), MlpConfig(3 * hidden // 2), **changes)


def lively(cfg: ModelConfig, seed: int = 0) -> dict:
    """Random parameters scaled up, so that the next token really depends on the context."""
    return jax.jit(lambda key: jax.tree.map(lambda a: 1.5 * a, init_params(cfg, key)))(jax.random.key(seed))


@pytest.fixture(scope='module')
def quick_compile():
    """For modules that compile much and compute little: the same programs, a third less work for LLVM on them.

    Not for what is held to the bit against another process, and not where a real model runs."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def cfg():
    return tiny_config()


@pytest.fixture(scope='session')
def small_cfg():
    """A cheaper model of the same vocabulary, for two-model drafting."""
    return tiny_config(hidden=16, layers=1, heads=2, kv_heads=2)


@pytest.fixture(scope='session')
def params(cfg, small_cfg):
    return {'base': lively(cfg), 'draft': lively(small_cfg, 1)}


@pytest.fixture(scope='session')
def prompts():
    """Uneven: a repeat for prompt lookup, a single token, one past a bucket's edge, an ordinary one."""
    return [[1, 2, 3, 4, 5, 1, 2], [7], list(range(5, 22)), [9, 9, 30, 9]]
