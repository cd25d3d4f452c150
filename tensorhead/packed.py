"""The head as it decodes: matrices turned to [out, in], factor 1 apart from the others, the words' rows gathered once.

Few rows against many weights is what a draft is, and what the C product of backbone/matmul.py is for. The factors are
split because they are used at different times: factor 1 says which components the pending token speaks for, factors
2..n draft, perhaps by those components alone. tensorhead/head.py has the same head as it trains.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone.matmul import contract_packed, dense
from tensorhead import head as heads
from tensorhead.config import TensorHeadConfig

Array = jax.Array


def pack(cfg: TensorHeadConfig, head: dict, base: dict, dtype: Any = None, drafts: int | None = None) -> dict:
    """A head's parameters -> the same for the functions below, in `dtype` (default: as they are). Packed ones stay.

    base: params['base'], packed for decoding or not. 'unembed' [W, d] is the base's own array where it has one of that
    type and there is no draft vocabulary. Gate and biases stay float32. drafts: factors 2..drafts+1 only.
    """
    if 'later' in head:
        return head
    narrow = lambda leaf: jnp.asarray(leaf, dtype or leaf.dtype)
    turned = {name + '_t' if name in ('kernel', 'down') else name:
              jnp.asarray(leaf) if name == 'bias' else narrow(jnp.swapaxes(leaf, -1, -2) if name != 'up' else leaf)
              for name, leaf in head['factors'].items()}
    packed = {'gate': {'kernel_t': jnp.asarray(head['gate']['kernel']).T, 'bias': jnp.asarray(head['gate']['bias'])},
              'first': {name: leaf[:1] for name, leaf in turned.items()},
              'later': {name: leaf[1:None if drafts is None else drafts + 1] for name, leaf in turned.items()}}
    if 'pending' in head:  # few rows through [d, m]: as the other matrices
        packed['pending'] = {name: leaf if name == 'bias' else narrow(leaf) for name, leaf in head['pending'].items()}
    if 'draft_ids' in head:
        packed['draft_ids'] = jnp.asarray(head['draft_ids'])
    if cfg.mode != 'full':
        packed['unembed'] = narrow(heads.unembedding(base, packed))
    return packed


def log_weights(packed: dict, e: Array) -> Array:
    """e [B, d] -> log w [B, r], at least float32."""
    logits = dense(packed['gate'], e.astype(jnp.promote_types(e.dtype, jnp.float32)))
    return jax.nn.log_softmax(logits, axis=-1)


def features(cfg: TensorHeadConfig, part: dict, e: Array) -> Array:
    """The m factors of packed['first'] or ['later'] at e [B, d] -> h [B, m, r, d]; mode full: logits [B, m, r, W]."""
    name = 'down_t' if cfg.mode == 'lowrank_shared' else 'kernel_t'
    m, r, out, d = part[name].shape
    change = contract_packed(e, part[name].reshape(m * r * out, d)).reshape(-1, m, r, out)
    if cfg.mode == 'full':
        return change
    if cfg.mode == 'lowrank_shared':
        change = jnp.einsum('bsrk,srkd->bsrd', change.astype(part['up'].dtype), part['up'],
                            preferred_element_type=change.dtype)
    if cfg.mode == 'medusa_shared':
        change = jax.nn.silu(change + part['bias'])
    return e[:, None, None] + change


def features_of(cfg: TensorHeadConfig, part: dict, e: Array, components: Array) -> Array:
    """`features` of components [B, c] only -> [B, m, c, d or W]."""
    batch, count = components.shape
    if batch * count >= cfg.rank:  # to pick afterwards reads no more weights
        return jnp.take_along_axis(features(cfg, part, e), components[:, None, :, None], axis=2)
    one = lambda b, j: features(cfg, _component(part, components[b, j]), e[b:b + 1])
    return jnp.concatenate([jnp.concatenate([one(b, j) for j in range(count)], axis=2) for b in range(batch)])


def _component(part: dict, a: Array) -> dict:
    """One component's leaves [m, 1, ...]. Slices, not a gather: XLA:CPU gathers bfloat16 by way of a float32 copy."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, a, 1, axis=1), part)


def logits(cfg: TensorHeadConfig, packed: dict, h: Array) -> Array:
    """What `features` gave -> logits [..., W], at least float32: the one product with the vocabulary."""
    return h if cfg.mode == 'full' else contract_packed(h, packed['unembed'])
