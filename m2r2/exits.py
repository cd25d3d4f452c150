"""From the fast stream at an exit to words: the base's own final norm and unembedding, of all words or of some."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.draft_vocabulary import unembedding
from backbone.layout import transpose
from backbone.matmul import contract_packed, product
from backbone.model import finish, unembed
from m2r2.config import M2R2Config

Array = jax.Array


def logits(cfg: ModelConfig, base: dict, mine: dict, p: Array) -> Array:
    """p [..., d] -> logits [..., W], at least float32. W: the draft vocabulary, or all words."""
    return words(cfg, base, mine, finish(cfg, base, p))


def words(cfg: ModelConfig, base: dict, mine: dict, hidden: Array) -> Array:
    """The same of a hidden state after the final norm."""
    if 'unembed' in mine:
        return contract_packed(hidden, mine['unembed'])
    if 'draft_ids' in mine:
        return product('...d,wd->...w', hidden, unembedding(base, mine['draft_ids']))
    return unembed(cfg, base, hidden)


def pack(m: M2R2Config, mine: dict, base: dict, dtype: Any = jnp.float32, native: bool | None = None) -> dict:
    """params['m2r2'] for decoding beside a base packed by backbone/layout.py: one tree a layer, the draft's words
    gathered once ('unembed' [W, d]), matrices in `dtype`; a drafter's gate as it is. native: as the base is packed;
    None: see for itself. One that is packed stays as it is.
    """
    if isinstance(mine.get('layers', mine.get('exits')), tuple) or not mine:
        return mine
    native = 'kernel_t' in base.get('lm_head', {}) if native is None else native
    narrow = lambda a: jnp.asarray(a, dtype if a.ndim > 1 else jnp.float32)
    packed: dict[str, Any] = {}
    for name in ('layers', 'exits'):
        if name in mine:
            count = jax.tree.leaves(mine[name])[0].shape[0]
            packed[name] = tuple(jax.tree.map(lambda a, l=l: narrow(a[l]), mine[name]) for l in range(count))
    if 'carry' in mine:
        packed['carry'] = jax.tree.map(narrow, mine['carry'])
    if native:
        packed = transpose(packed)
    if 'draft_ids' in mine:
        packed['draft_ids'] = jnp.asarray(mine['draft_ids'], jnp.int32)
        packed['unembed'] = narrow(unembedding(base, packed['draft_ids']))
    if 'gate' in mine:
        packed['gate'] = jax.tree.map(jnp.asarray, mine['gate'])
    return packed
