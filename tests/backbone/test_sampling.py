"""The sampling processors against plain numpy, and their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.sampling import GREEDY, Sampling, choose, law


def reference(logits, temperature, top_k, top_p):
    """One row, token by token."""
    scaled = logits / temperature
    order = np.argsort(-scaled, kind='stable')
    keep = order[:top_k] if top_k else order
    probs = np.exp(scaled[keep] - scaled[keep].max())
    probs /= probs.sum()
    out, mass = np.zeros_like(logits), 0.0
    for token, p in zip(keep, probs, strict=True):
        if mass >= top_p:
            break
        out[token], mass = p, mass + p
    return out / out.sum()


@pytest.mark.parametrize('temperature', (0.3, 1.0, 2.5))
@pytest.mark.parametrize('top_k', (0, 1, 5, 200))
@pytest.mark.parametrize('top_p', (0.2, 0.9, 1.0))
def test_law_matches_the_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float64)
    got = law(jnp.array(logits), Sampling(temperature, top_k, top_p))
    want = [reference(row, temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize('sampling', (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.6)))
def test_equal_logits_stay_together(sampling):
    """Also -0 and 0; what is impossible already stays so."""
    logits = jnp.array([[0.0, 1.0, -0.0, -jnp.inf, -5.0], [2.0, -3.0, -3.0, -3.0, 9.0]])
    kept = law(logits, sampling) > 0
    assert kept[0].tolist() == [True, True, True, False, False]
    assert kept[1].tolist() == [sampling.top_k == 2, False, False, False, True]


def test_temperature_zero_is_the_first_maximum():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0]])
    assert choose(logits, jax.random.key(0), GREEDY).tolist() == [1]
    assert law(logits, GREEDY).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize('bad', ({'temperature': -0.1}, {'top_p': 0.0}, {'top_p': 1.1}, {'top_k': -1},
                                 {'temperature': float('nan')}))
def test_out_of_range_is_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
