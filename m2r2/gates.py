"""Whether a token may leave at an exit: a confidence in 0..1 for each token, from what is known there.

    c_i = n(p_i) D + e_i                        the token's fast stream at every depth i of its interval, made small
    z   = softmax(c_N Q (c_i K)^T / sqrt(r)) (c_i V)                             over depth, or over earlier tokens' c_N
    exit if sigmoid(scale (w . SiLU([c_N; z] M)) + bias) >= threshold

The gates that need no unembedding cost a few thousand products; the others read the exit's logits, which at a small
model are worth layers. Our reading of the latent attention of Bhendawade et al., 2025 (arXiv 2502.02040): what attends
to what is not public. Confidence from logits: Schuster et al., 2022 (arXiv 2207.07061).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone.errors import ConfigError
from m2r2.config import M2R2Config
from m2r2.streams import Ending

Array = jax.Array
HEAD = ('max_prob', 'margin', 'entropy')
LATENT = ('arla_depth', 'arla_tokens')
KINDS = (*LATENT, 'mlp', 'linear_p', 'linear_h', *HEAD)


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """kind: 'arla_depth' attends over the depths of the token's own fast stream, 'arla_tokens' over the tokens up to
    it, 'mlp' and 'linear_p' read p where the interval ends, 'linear_h' the slow stream there; 'max_prob', 'margin' (of
    the two likeliest words) and 'entropy' (1 - H / log W) read the exit's logits and have nothing to train.
    size: width of the latents, and of the network's hidden layer.
    """

    kind: str = 'arla_depth'
    size: int = 32

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f'gate.kind: unknown {self.kind!r}, one of {", ".join(KINDS)}')
        if self.size < 1:
            raise ConfigError(f'gate.size must be at least 1, got {self.size}')

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> GateConfig:
        """Errors: ConfigError for an unknown field."""
        if unknown := [key for key in fields if key not in ('kind', 'size')]:
            raise ConfigError(f'gate: unknown field {", ".join(unknown)}, known: kind, size')
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def needs_head(self) -> bool:
        """Whether `score` reads the exit's logits."""
        return self.kind in HEAD

    @property
    def needs_path(self) -> bool:
        """Whether `score` reads Ending.path."""
        return self.kind == 'arla_depth'


def init_params(gate: GateConfig, m: M2R2Config, rng: Array) -> dict:
    """{'exit_1': {...}, ...}; an exit's dict is empty where there is nothing to train."""
    return {f'exit_{j + 1}': _init_exit(gate, m, j, key)
            for j, key in enumerate(jax.random.split(rng, len(m.exits)))}


def _init_exit(gate: GateConfig, m: M2R2Config, j: int, rng: Array) -> dict:
    if gate.needs_head:
        return {}
    keys = iter(jax.random.split(rng, 7))
    matrix = lambda rows, *columns: {'kernel': jax.random.normal(next(keys), (rows, *columns)) * rows ** -0.5}
    d, r = m.hidden_size, gate.size
    params: dict[str, Any] = {'scale': jnp.ones(()), 'bias': jnp.zeros(())}
    if gate.kind.startswith('linear'):
        return params | {'read': matrix(d)}
    params |= {'down': matrix(d, r), 'read': matrix(r)}
    if gate.kind in LATENT:
        params |= {'q': matrix(r, r), 'k': matrix(r, r), 'v': matrix(r, r), 'mix': matrix(2 * r, r)}
    if gate.needs_path:
        depths = 1 + (m.exits[j] - m.starts[j] if m.stream == 'fast' else 1)
        params['depth'] = jax.random.normal(next(keys), (depths, r)) * r ** -0.5
    return params


def init_memory(gate: GateConfig, m: M2R2Config, batch: int, capacity: int) -> Any:
    """What 'arla_tokens' remembers of earlier tokens, (): nothing. By exit: latents [B, C, r], and whether a slot
    holds one [B, C]: a token that left at an earlier exit leaves a hole, over which nobody attends."""
    if gate.kind != 'arla_tokens':
        return ()
    return {f'exit_{j + 1}': {'latents': jnp.zeros((batch, capacity, gate.size)),
                              'filled': jnp.zeros((batch, capacity), bool)} for j in range(len(m.exits))}


def score(gate: GateConfig, m: M2R2Config, params_j: dict, j: int, ending: Ending, logits: Array | None = None,
          memory: Any = None, pos: Array | None = None, mask: Array | None = None) -> tuple[Array, Any]:
    """(confidence [B, S] in 0..1, at least float32; memory) at exit j = 0..J-1.

    params_j: of that exit. logits [B, S, W]: of the exit, for gates that need the head. memory, pos [B] or [B, S]: of
    all exits, and the slots of the block (its first one, or each), when decoding; slots outside are not written.
    Without memory the block is whole sequences, whose tokens attend as mask [B, S, S] allows (None: to all before).
    """
    if gate.needs_head:
        return from_logits(gate.kind, logits), memory
    logit, memory = evidence(gate, m, params_j, j, ending, memory, pos, mask)
    return jax.nn.sigmoid(logit), memory


def evidence(gate: GateConfig, m: M2R2Config, params_j: dict, j: int, ending: Ending, memory: Any = None,
             pos: Array | None = None, mask: Array | None = None) -> tuple[Array, Any]:
    """(logit of the confidence [B, S], memory), of a gate that has parameters. Arguments as `score`."""
    params_j = jax.tree.map(_wide, params_j)
    if gate.kind == 'arla_depth':
        latents = _times(_unit(ending.path), params_j['down']) + params_j['depth']
        latent = latents[..., -1, :]
        seen = _attend(params_j, latent[..., None, :], latents, None)[..., 0, :]
        return _decide(params_j, latent, seen), memory
    unit = _unit(ending.slow if gate.kind == 'linear_h' else ending.fast)
    if gate.kind.startswith('linear'):
        return _evidence(params_j, unit), memory
    latent = latents = _times(unit, params_j['down'])
    if gate.kind == 'mlp':
        return _evidence(params_j, jax.nn.silu(latent)), memory
    if memory:
        memory, latents, mask = _remember(m, memory, j, latent, pos)
    elif mask is None:
        mask = jnp.tril(jnp.ones((latent.shape[1],) * 2, bool))
    return _decide(params_j, latent, _attend(params_j, latent, latents, mask)), memory


def from_logits(kind: str, logits: Array) -> Array:
    """[..., W] -> confidence [...]."""
    if kind == 'entropy':
        logp = jax.nn.log_softmax(_wide(logits))
        return 1 + (jnp.exp(logp) * logp).sum(-1) / math.log(logits.shape[-1])
    probs = jax.nn.softmax(_wide(logits))
    best = probs.max(-1)
    if kind == 'max_prob':
        return best
    # The second one by another maximum: top_k of a whole vocabulary is a sort on a CPU, and took longer than the model.
    rest = jnp.where(jnp.arange(probs.shape[-1]) == probs.argmax(-1, keepdims=True), -1.0, probs)
    return best - rest.max(-1)


def _attend(p: dict, q: Array, latents: Array, mask: Array | None) -> Array:
    """q [..., S, r] over latents [..., C, r]. The latents are what is kept: K goes into the query, V comes after."""
    scores = jnp.einsum('...sr,...cr->...sc', _times(_times(q, p['q']), {'kernel': p['k']['kernel'].T}), latents)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
        latents = jnp.where(mask.any(-2)[..., None], latents, 0)  # what nobody may read may be anything, even NaN
    return _times(jnp.einsum('...sc,...cr->...sr', jax.nn.softmax(scores, axis=-1), latents), p['v'])


def _remember(m: M2R2Config, memory: dict, j: int, latent: Array, pos: Array) -> tuple[dict, Array, Array]:
    """Writes latent [B, S, r]; gives memory, the exit's latents [B, C, r], and which of them each token reads."""
    slots = pos if pos.ndim == 2 else pos[:, None] + jnp.arange(latent.shape[1])
    mine = memory[f'exit_{j + 1}']
    capacity = mine['filled'].shape[1]
    rows, at = jnp.arange(slots.shape[0])[:, None], jnp.where(slots < 0, capacity, slots)
    put = lambda a, new: a.at[rows, at].set(jnp.asarray(new, a.dtype), mode='drop')
    mine = {'latents': put(mine['latents'], latent), 'filled': put(mine['filled'], True)}
    # What a later exit holds here is of a token that was taken back: this one may not get so far.
    later = {f'exit_{i + 1}': memory[f'exit_{i + 1}'] | {'filled': put(memory[f'exit_{i + 1}']['filled'], False)}
             for i in range(j + 1, len(m.exits))}
    mask = mine['filled'][:, None] & (jnp.arange(capacity) <= slots[..., None])
    # A slot outside has no latent of its own: it reads the first, and nobody reads the answer.
    mask = mask.at[..., 0].set(mask[..., 0] | ~mask.any(-1))
    return memory | {f'exit_{j + 1}': mine} | later, mine['latents'], mask


def _decide(p: dict, latent: Array, seen: Array) -> Array:
    return _evidence(p, jax.nn.silu(_times(jnp.concatenate([latent, seen], -1), p['mix'])))


def _evidence(p: dict, x: Array) -> Array:
    return p['scale'] * (x @ p['read']['kernel']) + p['bias']


def _times(x: Array, p: dict) -> Array:
    return x @ p['kernel']


def _wide(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _unit(x: Array) -> Array:
    """x / rms(x): streams of different depth differ most in size."""
    wide = _wide(x)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
