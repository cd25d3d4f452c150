"""Sparsity decided by the values themselves, while a layer runs: the methods that need no prediction.

    CATS   neurons with |act(gate)| > tau; the gate is read whole, up and down are not        (Lee et al., 2024)
    TEAL   entries |x| > tau of the input of every projection, that is, columns of all matrices   (Liu et al., 2024)

They see the exact magnitude, and pay with a decision that is known only when its layer runs: here what is dropped is
multiplied by zero, and the account (sparsity/account.py) says what would not have been read. Thresholds are quantiles
over sample text, one a layer (and input): params['sparsity'] from `calibrate`. arXiv 2404.08763, 2408.14690.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from backbone import layers
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context
from backbone.matmul import dense
from backbone.mlp import activate, glu
from backbone.model import embed, finish, run_layers, sequence_context, unembed
from sparsity import account
from sparsity.account import MATRICES, Reads
from sparsity.prompt import apart, join

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _ByValue:
    """In the place of a selector of a SparseTarget, of whose config it reads dense_first and dense_last alone."""

    reads_prompt = False

    def size(self, params: Any) -> int:
        return 0

    def one_token(self, t: Any, params: Any, tokens: Array, kv: Any, ctx: Context,
                  reads: Reads) -> tuple[Array, Any, Reads]:
        """As step.one_token, and keeps the account."""
        cfg, base, sparse = t.cfg, params['base'], t.s.sparse_layers(t.cfg)
        x = embed(cfg, base, tokens, ctx.positions)
        x, kv, _ = run_layers(cfg, base, x, kv, ctx, hi=sparse.start)
        state = join(kv, {name: jnp.ones((cfg.num_layers,)) for name in MATRICES})
        x, state, _ = run_layers(cfg, base, x, state, ctx, sparse.start, sparse.stop, layer_fn=self.layer,
                                 extra=params['sparsity']['thresholds'])
        kv, share = apart(state)
        x, kv, _ = run_layers(cfg, base, x, kv, ctx, lo=sparse.stop)
        reads = account.add(reads, share, jnp.ones((cfg.num_layers,)), ctx.positions[:, 0], jnp.zeros((), bool), 0)
        return unembed(cfg, base, finish(cfg, base, x)), kv, reads

    def layer(self, cfg, p, x, state, ctx, tau):
        """A layer function: state is (the layer's cache, its line in the account)."""
        share = {name: jnp.ones(()) for name in MATRICES}
        normed, share = self.at('attention', layers.norm(cfg, p['attn_norm'], x), tau, share, ('q', 'kv'))
        q, k, v = layers.qkv(cfg, p['attn'], normed, ctx)
        keys, values, kv = layers.read_write(state[0], k, v, ctx)
        heads = layers.attend(q, keys, values, ctx)
        flat, share = self.at('out', heads.reshape(*heads.shape[:2], -1), tau, share, ('o',))
        x = x + layers.out(cfg, p['attn'], flat.reshape(heads.shape))
        normed, share = self.at('mlp', layers.norm(cfg, p['mlp_norm'], x), tau, share, ('gate', 'up'))
        gate, up = _gate_up(cfg, p['mlp'], normed)
        if gate is not None:
            gate, share = self.at('gate', gate, tau, share, ('up', 'down'))
        h, share = self.at('down', up if gate is None else gate * up, tau, share, ('down',))
        return x + dense(p['mlp']['down'], h), (kv, share), {}

    def at(self, place: str, values: Array, tau: dict[str, Array], share: dict[str, Array],
           matrices: tuple[str, ...]) -> tuple[Array, dict[str, Array]]:
        """What is left of values [B, S, n] where this method looks at them, and what of the matrices is then needed."""
        if place not in tau:
            return values, share
        keep = jnp.abs(values) > tau[place]
        needed = keep.any((0, 1)).mean()
        return jnp.where(keep, values, 0), share | {name: needed for name in matrices}


@dataclasses.dataclass(frozen=True)
class Cats(_ByValue):
    """Contextually-aware thresholding: only neurons whose gate is open."""

    places = ('gate',)


@dataclasses.dataclass(frozen=True)
class Teal(_ByValue):
    """Training-free activation sparsity: only large inputs, of every projection."""

    places = ('attention', 'out', 'mlp', 'down')


def _gate_up(cfg: ModelConfig, p: dict, x: Array) -> tuple[Array | None, Array]:
    """The activated gate and up, or None and the activated up."""
    if not cfg.mlp.gated:
        return None, activate(cfg.mlp, dense(p['up'], x))
    if 'gate_up' in p:
        gate, up = jnp.split(dense(p['gate_up'], x), 2, axis=-1)
    else:
        gate, up = dense(p['gate'], x), dense(p['up'], x)
    return glu(cfg.mlp, gate, jnp.ones((), gate.dtype)), up


def calibrate(cfg: ModelConfig, base: dict, tokens: Array, method: Any, keep: float) -> dict[str, Any]:
    """params['sparsity'] of a method: of each layer and place the magnitude that a share `keep` of the values of the
    whole model exceeds, over rows of tokens [N, T] without padding.

    Errors: ConfigError for a keep outside (0, 1], and for Cats on a model without gates.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f'thresholds: keep must be above 0 and at most 1, got {keep}')
    if 'gate' in method.places and not cfg.mlp.gated:
        raise ConfigError('thresholds: Cats needs an MLP with a gate')
    names = {place: jnp.zeros((cfg.num_layers,)) for place in method.places}

    def run(base: dict, tokens: Array) -> Any:
        ctx = sequence_context(cfg, tokens.shape)
        x = embed(cfg, base, tokens, ctx.positions)
        layer = functools.partial(_watched, places=method.places, keep=keep)
        stacked = not isinstance(base['layers'], tuple)
        state = (None, names) if stacked else tuple((None, {}) for _ in range(cfg.num_layers))
        return apart(run_layers(cfg, base, x, state, ctx, layer_fn=layer)[1])[1]
    return {'thresholds': jax.jit(run)(base, tokens)}


def _watched(cfg, p, x, state, ctx, extra, *, places, keep):
    seen = {}

    class Watch(_ByValue):
        def at(self, place, values, tau, share, matrices):
            if place in places:
                wide = jnp.abs(values.astype(jnp.float32))
                seen[place] = jnp.quantile(wide, 1 - keep) if keep < 1 else jnp.float32(-1)
            return values, share

    x, _, found = Watch().layer(cfg, p, x, (None, None), ctx, {})
    return x, (None, seen), found
