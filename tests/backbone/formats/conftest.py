"""Checkpoints that the format tests share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import catalogue, formats, model
from backbone.errors import FetchError

TINY = Path(__file__).resolve().parents[2] / 'golden' / 'tiny'
NAMES = ('llama', 'llama3', 'llama_bias', 'qwen2', 'opt', 'opt_post', 'gemma', 'mixtral', 'olmoe')


def logits(loaded, tokens) -> np.ndarray:
    """Float32 logits [B, S, V] at the highest matrix precision."""
    with jax.default_matmul_precision('highest'):
        run = jax.jit(model.forward, static_argnums=0)
        return np.asarray(run(loaded.config, jax.tree.map(jnp.asarray, loaded.params), jnp.asarray(tokens)))


def equal(one, other) -> None:
    """Same configuration, same parameters bit for bit, same hash."""
    assert one.config == other.config
    assert one.base_hash == other.base_hash
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.fixture(scope='session', params=NAMES)
def tiny(request):
    """(name, loaded checkpoint, tokens [2, 24], logits [2, 24, 64] by transformers)."""
    folder = TINY / request.param
    golden = np.load(folder / 'golden.npz')
    return request.param, formats.load(folder), golden['tokens'], golden['logits']


@pytest.fixture(scope='session')
def stories_dir():
    try:
        return catalogue.fetch('stories-15m', progress=False)
    except FetchError as error:
        pytest.skip(f'stories-15m: {error}')


@pytest.fixture(scope='session')
def smollm2_path():
    try:
        return catalogue.fetch('smollm2-135m', progress=False)
    except FetchError as error:
        pytest.skip(f'smollm2-135m: {error}')


@pytest.fixture(scope='session')
def smollm2(smollm2_path):
    return formats.load(smollm2_path)
