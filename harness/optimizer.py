"""AdamW and its learning rate, from the `optimizer` part of a training config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from backbone.errors import ConfigError

SCHEDULES = ('cosine', 'wsd', 'constant')


def learning_rate(optimizer: Mapping[str, Any], num_steps: int) -> Callable[[Any], Any]:
    """step -> learning rate. Linear warm-up, then

    cosine    down to end_fraction of the peak at num_steps;
    wsd       the peak, then linearly down over the last decay_steps (warm-up, stable, decay: Hu et al., 2024);
    constant  the peak.
    """
    peak, warm_up, kind = optimizer['learning_rate'], optimizer['warmup_steps'], optimizer['schedule']
    end, decay = peak * optimizer['end_fraction'], optimizer['decay_steps']
    if kind not in SCHEDULES:
        raise ConfigError(f'optimizer.schedule: unknown {kind!r}, one of {", ".join(SCHEDULES)}')
    if not 0 <= warm_up <= num_steps:
        raise ConfigError(f'optimizer.warmup_steps {warm_up} is not within num_steps {num_steps}')
    if kind == 'wsd' and not 0 < decay <= num_steps - warm_up:
        raise ConfigError(f'optimizer.decay_steps {decay} is not within the {num_steps - warm_up} steps after warm-up')
    # The first step already moves: 1/warm_up of the peak, not zero.
    rise = optax.linear_schedule(peak / max(warm_up, 1), peak, max(warm_up - 1, 1))
    if kind == 'constant':
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warm_up])
    if kind == 'cosine':
        fall = optax.cosine_decay_schedule(peak, max(num_steps - warm_up, 1), optimizer['end_fraction'])
        return optax.join_schedules([rise, fall], [warm_up])
    fall = optax.linear_schedule(peak, end, decay)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warm_up, num_steps - decay])


def make(optimizer: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clipping, Adam's moments and decoupled decay over a flat tree {path: leaf}, *without* the learning rate.

    The step multiplies by -learning_rate(step) itself, so that the rate is a function of the step alone, whatever
    was skipped. Leaves whose path fully matches a regex of `no_decay` are not decayed.
    """
    patterns = tuple(optimizer['no_decay'])

    def decayed(params: Mapping[str, Any]) -> dict[str, bool]:
        return {path: not any(re.fullmatch(p, path) for p in patterns) for path in params}

    clip = optimizer['clip_norm']
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(optimizer['b1'], optimizer['b2'], optimizer['eps']),
        optax.add_decayed_weights(optimizer['weight_decay'], mask=decayed))


def average(ema: Any, params: Any, decay: float) -> Any:
    """Exponential moving average of parameters; exact at the first step, when both are equal."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)
