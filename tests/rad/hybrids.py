"""Tiny hybrids whose states remember: with the usual decay a test by tokens does not notice a state gone wrong."""

import jax
import jax.numpy as jnp

from backbone.config import SsmConfig
from rad import surgery
from rad.config import RadConfig
from tests.conftest import lively, tiny_config


def rad_config(cfg, layers=(1, 2), parallel=False, **ssm) -> RadConfig:
    return RadConfig(tuple(layers), SsmConfig.like(cfg, **{'chunk': 8, **ssm}), parallel)


def mixers(cfg, rcfg, slow=True, seed=3) -> dict:
    """Random ones, every part of them nonzero. slow: -A below 1 and steps of about softplus(-2..1); else as Mamba-2
    begins."""
    made = surgery.init_mixers(cfg, rcfg, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 8))
    noisy = lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape)
    made |= {'D': noisy(made['D']), 'out_proj': {'kernel': 2 * made['out_proj']['kernel']}}
    if rcfg.ssm.gated_norm:
        made['norm'] = {'scale': noisy(made['norm']['scale'])}
    if slow:
        shape = made['A_log'].shape
        made |= {'A_log': jnp.log(jax.random.uniform(next(keys), shape, minval=0.02, maxval=1.0)),
                 'dt_bias': jax.random.uniform(next(keys), shape, minval=-2.0, maxval=1.0),
                 'in_proj': {'kernel': 2 * made['in_proj']['kernel']}}
    return made


def hybrid(layers=(1, 2), slow=True, seed=0, parallel=False, ssm=None, num_layers=4, **model):
    """(cfg, rcfg, {'base', 'rad'})."""
    cfg = tiny_config(layers=num_layers, **model)
    rcfg = rad_config(cfg, layers, parallel, **(ssm or {}))
    return cfg, rcfg, {'base': lively(cfg, seed), 'rad': {'mixers': mixers(cfg, rcfg, slow, seed + 3)}}
