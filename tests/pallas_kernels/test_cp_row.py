"""What is cp_row's own: that it is the head's law of a position, and zeros among weights and words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cp_row import OP
from pallas_kernels.modes import interpreter
from tensorhead import cp


def data():
    rng = np.random.default_rng(0)
    w, z = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 3), (2, 3, 128)))
    return jax.nn.log_softmax(w), z


def test_it_is_the_row_of_the_mixture():
    log_w, z = data()
    want = cp.row(log_w, jax.nn.log_softmax(z))
    np.testing.assert_allclose(OP.ref(log_w, z), want, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(want).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize('platform', ('tpu', 'gpu'))
def test_components_and_words_that_cannot_be(platform):
    """A weight of 0 (the component's words have no say) and words that no component gives."""
    log_w, z = data()
    log_w, z = log_w.at[:, 1].set(-jnp.inf), z.at[:, :, 100:].set(-jnp.inf)
    y = np.asarray(OP.kernel(platform).run(log_w, z, interpret=interpreter(platform)))
    want = OP.ref(log_w[:, ::2], z[:, ::2, :100])
    np.testing.assert_allclose(y[:, :100], want, atol=1e-5)
    assert np.isneginf(y[:, 100:]).all()
