"""One position's law under a mixture, from its components' logits: what a CP head drafts by."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cp_row(log_w: Array, z: Array) -> Array:
    """log_w [B, r], z [B, r, W] -> log sum_a exp(log_w_a) softmax(z_a) [B, W]; all float32 inside.

    log_w is the log of the mixture's weights given the tokens before; a weight may be 0, a logit -inf.
    """
    logp = jax.nn.log_softmax(z.astype(jnp.float32), axis=-1)
    return jax.nn.logsumexp(log_w.astype(jnp.float32)[..., None] + logp, axis=-2)
