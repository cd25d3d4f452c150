"""A plain layer's MLP: its parameters (Linen) and its forward pass."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from backbone.config import MlpConfig, ModelConfig
from backbone.matmul import dense

Array = jax.Array


class Dense(nn.Module):
    """y = x @ kernel + bias; kernel [in, out]."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        params = {'kernel': self.param('kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features))}
        if self.use_bias:
            params['bias'] = self.param('bias', nn.initializers.zeros, (self.features,))
        return dense(params, x)


class Mlp(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate. Hidden width F."""

    cfg: MlpConfig
    hidden_size: int

    def setup(self):
        cfg = self.cfg
        if cfg.gated:
            self.gate = Dense(cfg.intermediate_size, cfg.bias)
        self.up = Dense(cfg.intermediate_size, cfg.bias)
        self.down = Dense(self.hidden_size, cfg.bias)

    def neurons(self, x: Array) -> Array:
        """[..., d] -> [..., F]: the activated hidden units."""
        return glu(self.cfg, self.gate(x), self.up(x)) if self.cfg.gated else activate(self.cfg, self.up(x))

    def __call__(self, x: Array) -> Array:
        return self.down(self.neurons(x))


def activate(cfg: MlpConfig, x: Array) -> Array:
    return {'silu': jax.nn.silu, 'relu': jax.nn.relu, 'gelu': lambda a: jax.nn.gelu(a, approximate=False),
            'gelu_tanh': jax.nn.gelu}[cfg.activation](x)


def glu(cfg: MlpConfig, gate: Array, up: Array) -> Array:
    return activate(cfg, gate) * up


def neurons(cfg: ModelConfig, p: dict, x: Array) -> Array:
    """x [..., d] -> the activated hidden units [..., F]. p: as of `mlp`."""
    if 'gate_up' in p:
        return glu(cfg.mlp, *jnp.split(dense(p['gate_up'], x), 2, axis=-1))
    if 'kernel_t' in p['up']:
        return activate(cfg.mlp, dense(p['up'], x))
    return Mlp(cfg.mlp, cfg.hidden_size).apply({'params': p}, x, method='neurons')


def mlp(cfg: ModelConfig, p: dict, x: Array, neuron_mask: Array | None = None) -> Array:
    """x [..., d] -> [..., d]; neuron_mask broadcasts to [..., F]. p: a layer's 'mlp', or a mixture's shared expert."""
    hidden = neurons(cfg, p, x)
    if neuron_mask is not None:
        hidden = hidden * neuron_mask.astype(hidden.dtype)
    return dense(p['down'], hidden)
