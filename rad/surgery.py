"""Mixers for the places of attentions that are taken out.

    init_rad             W_out <- W_O, W_in = 0: the block says exactly 0, so the hybrid begins as the model that skips
                         these attentions (Hoshino et al., 2025, arXiv 2505.22135: the caption of its first figure names
                         the copy and the zeros; that all of W_in is zero is our reading)
    init_mamba_in_llama  W_out <- W_O, x <- W_V, B <- W_K, C <- W_Q, the rest as Mamba-2 begins (Wang et al., 2024,
                         arXiv 2408.15237): a warm start, not an equivalence, for W_Q and W_K grew up with softmax and
                         rotations
    init_linear_attention  the same with constant steps and no decay, for tests: `ssd` is then causal (Q K^T) V

Of W_O's and the projections' biases, where a base has them, none is kept. All are pure, and give params['rad'].
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig, SsmConfig
from backbone.errors import ConfigError
from backbone.mamba2 import by_head, convolve, ssd
from rad.config import RadConfig

Array = jax.Array
DT_RANGE, DT_FLOOR, A_RANGE = (1e-3, 1e-1), 1e-4, (1.0, 16.0)


def init_rad(cfg: ModelConfig, rcfg: RadConfig, base: dict, rng: Array) -> dict:
    """{'mixers': ...} for rcfg.layers of base, stored or packed. Errors: ConfigError, see RadConfig.check."""
    mixers = init_mixers(cfg, rcfg, rng)
    zero = {'kernel': jnp.zeros_like(mixers['in_proj']['kernel'])}
    return {'mixers': mixers | {'in_proj': zero, 'out_proj': _projection(cfg, rcfg, base, 'o')}}


def init_mamba_in_llama(cfg: ModelConfig, rcfg: RadConfig, base: dict, rng: Array) -> dict:
    """As `init_rad`. Errors: ConfigError where groups, widths or states are not those of the attention."""
    mixers = init_mixers(cfg, rcfg, rng)
    z, dt = _ends(rcfg, mixers['in_proj']['kernel'])
    return {'mixers': mixers | {'in_proj': _from_attention(cfg, rcfg, base, z, dt),
                                'out_proj': _projection(cfg, rcfg, base, 'o')}}


def init_linear_attention(cfg: ModelConfig, rcfg: RadConfig, base: dict) -> dict:
    """Steps of 1, no decay, no D, a convolution that passes its input on: but for silu, gate and norm it is linear
    attention."""
    mixers = init_mixers(cfg, rcfg, jax.random.key(0))
    z, dt = (jnp.zeros_like(a) for a in _ends(rcfg, mixers['in_proj']['kernel']))
    full = lambda name, value: jnp.full_like(mixers[name], value)
    conv = {'kernel': jnp.zeros_like(mixers['conv']['kernel']).at[:, -1].set(1),
            'bias': jnp.zeros_like(mixers['conv']['bias'])}
    return {'mixers': mixers | {
        'in_proj': _from_attention(cfg, rcfg, base, z, dt), 'out_proj': _projection(cfg, rcfg, base, 'o'), 'conv': conv,
        'dt_bias': full('dt_bias', math.log(math.e - 1)), 'A_log': full('A_log', -jnp.inf), 'D': full('D', 0)}}


def init_mixers(cfg: ModelConfig, rcfg: RadConfig, rng: Array) -> dict:
    """Mixers [k, ...] that have nothing of a base, see `init_mixer`. Errors: ConfigError, see RadConfig.check."""
    rcfg.check(cfg)
    return jax.vmap(lambda key: init_mixer(rcfg.ssm, cfg.hidden_size, key))(jax.random.split(rng, len(rcfg.layers)))


def init_mixer(ssm: SsmConfig, hidden_size: int, rng: Array) -> dict:
    """One mixer as Mamba-2 and linear layers begin (Dao and Gu, 2024, and their code): uniform kernels and conv bias,
    log-uniform steps in DT_RANGE, uniform -A in A_RANGE, D and the norm's scale 1."""
    keys = jax.random.split(rng, 6)
    uniform = lambda key, shape, fan_in: jax.random.uniform(key, shape, minval=-fan_in ** -0.5, maxval=fan_in ** -0.5)
    width, channels, heads = ssm.conv_width, ssm.conv_channels, ssm.num_heads
    low, high = (math.log(edge) for edge in DT_RANGE)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(keys[3], (heads,), minval=low, maxval=high)), DT_FLOOR)
    mixer = {'in_proj': {'kernel': uniform(keys[0], (hidden_size, sum(ssm.parts)), hidden_size)},
             'conv': {'kernel': uniform(keys[1], (width, channels), width),
                      'bias': uniform(keys[2], (channels,), width)},
             'dt_bias': dt + jnp.log(-jnp.expm1(-dt)),  # the inverse of softplus
             'A_log': jnp.log(jax.random.uniform(keys[4], (heads,), minval=A_RANGE[0], maxval=A_RANGE[1])),
             'D': jnp.ones(heads),
             'out_proj': {'kernel': uniform(keys[5], (ssm.inner, hidden_size), ssm.inner)}}
    return mixer | ({'norm': {'scale': jnp.ones(ssm.inner)}} if ssm.gated_norm else {})


def check_alive(rcfg: RadConfig, mixers: dict) -> None:
    """Refuses mixers that cannot learn: where W_in is zero the only way in for a gradient is the gate, and that is shut
    too where no bias lets anything through the convolution to it. mixers: stored, concrete arrays.

    Errors: ConfigError names the layer.
    """
    for i, l in enumerate(rcfg.layers):
        mixer = jax.tree.map(lambda a, i=i: a[i], mixers)
        if np.any(np.asarray(mixer['in_proj']['kernel'])):
            continue
        after = np.asarray(mixer['out_proj']['kernel'])
        if rcfg.ssm.gated_norm:
            after = after * np.asarray(mixer['norm']['scale'])[:, None]
        if not np.any(np.asarray(_silent(rcfg.ssm, mixer))) or not np.any(after):
            raise ConfigError(f'rad.mixers of layer {l}: in_proj is zero and nothing reaches its gate (a zero conv '
                              'bias?), so no gradient ever will')


def _silent(ssm: SsmConfig, mixer: dict) -> Array:
    """y [1, W, H, P] of a mixer whose in_proj says 0."""
    size = ssm.conv_width
    x, B, C = convolve(ssm, mixer, jnp.zeros((1, size, ssm.conv_channels)), jnp.zeros((1, size - 1, ssm.conv_channels)))
    dt = jnp.broadcast_to(jax.nn.softplus(mixer['dt_bias']), (1, size, ssm.num_heads))
    return ssd(by_head(x, ssm.num_heads), dt, -jnp.exp(mixer['A_log']), B, C, mixer['D'], form='sequential')[0]


def _ends(rcfg: RadConfig, kernel: Array) -> tuple[Array, Array]:
    """Columns of z and of dt [k, d, ...]."""
    parts = rcfg.ssm.parts
    return kernel[..., :parts[0]], kernel[..., -parts[-1]:]


def _from_attention(cfg: ModelConfig, rcfg: RadConfig, base: dict, z: Array, dt: Array) -> dict:
    att, ssm = cfg.attention, rcfg.ssm
    wanted, found = (att.num_heads, att.num_kv_heads, att.head_dim, att.head_dim), (
        ssm.num_heads, ssm.num_groups, ssm.head_dim, ssm.state_size)
    if wanted != found:
        raise ConfigError(f'rad.ssm (heads, groups, head_dim, state_size) must be {wanted}, as the attention is, to '
                          f'take its projections over, got {found}')
    middle = [_projection(cfg, rcfg, base, name)['kernel'] for name in ('v', 'k', 'q')]
    return {'kernel': jnp.concatenate([z, *middle, dt], axis=-1)}


def _projection(cfg: ModelConfig, rcfg: RadConfig, base: dict, name: str) -> dict:
    """{'kernel': [k, in, out]} of the replaced attentions' q, k, v or o, at least float32."""
    att = cfg.attention
    heads, kv = att.num_heads * att.head_dim, att.num_kv_heads * att.head_dim
    shape = (len(rcfg.layers), *((heads, cfg.hidden_size) if name == 'o' else
                                 (cfg.hidden_size, heads if name == 'q' else kv)))
    if not rcfg.layers:
        return {'kernel': jnp.zeros(shape)}
    layers = base['layers']
    if not isinstance(layers, (tuple, list)):
        kernel = layers['attn'][name]['kernel'][np.array(rcfg.layers)]
    else:  # packed, see backbone/layout.py
        kernel = jnp.stack([_unfused(layers[l]['attn'], name, heads, kv) for l in rcfg.layers])
    return {'kernel': jnp.asarray(kernel, jnp.promote_types(kernel.dtype, jnp.float32))}


def _unfused(attn: dict, name: str, heads: int, kv: int) -> Array:
    part: Any = attn.get(name, attn.get('qkv'))
    kernel = part['kernel'] if 'kernel' in part else part['kernel_t'].T
    if name in attn:
        return kernel
    first, size = {'q': (0, heads), 'k': (heads, kv), 'v': (heads + kv, kv)}[name]
    return kernel[:, first:first + size]
