"""A draft may know fewer words than the model: ids chosen from data, ascending. Exactness stays with the verifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone.errors import ConfigError
from backbone.matmul import product

Array = jax.Array


@struct.dataclass
class DraftedLaw:
    """A DraftLaw (backbone/contract.py) over W words. probs [B, K, W], gold [B, K]; ids [W]: the words' ids in the
    model's vocabulary, None for all V.

    `row` widens only the row that is asked for: the verifier wants one a round.
    """

    probs: Array
    gold: Array
    ids: Array | None
    vocab_size: int = struct.field(pytree_node=False)

    def row(self, i: Array) -> Array:
        """Law of draft position i[B] -> [B, V]; words that are not among the ids have probability 0."""
        row = jax.vmap(lambda table, k: table[k])(self.probs, i)
        if self.ids is None:
            return row
        return jnp.zeros((row.shape[0], self.vocab_size), row.dtype).at[:, self.ids].set(row)


def unembedding(base: dict, ids: Array | None = None) -> Array:
    """U [W, d]: the rows of the model's own unembedding that `ids` name, all for None; logits are h @ U.T.

    base: params['base'], whose head is untied ([d, V], or packed [V, d]) or its embedding.
    """
    own = base.get('lm_head', {})
    table = own.get('kernel_t', own.get('kernel', base['embed']['tokens']))
    axis = int('kernel' in own)  # of the vocabulary
    if ids is not None:
        table = jnp.take(table, ids, axis=axis)
    U = table.T if axis else table
    if 'project_out' in base['embed']:  # logits = (h P) T' = h (T P')'
        U = product('we,de->wd', U, base['embed']['project_out']['kernel']).astype(U.dtype)
    return U


def index_of(ids: Array | None, tokens: Array) -> tuple[Array, Array]:
    """The model's ids [...] -> (indices [...] in 0..W-1, bool [...]: is it a word of the draft vocabulary?).

    The index of an unknown token is some word's: mask it.
    """
    if ids is None:
        return tokens, jnp.ones(tokens.shape, bool)
    index = jnp.minimum(jnp.searchsorted(ids, tokens), len(ids) - 1).astype(jnp.int32)
    return index, ids[index] == tokens


def read_ids(path: str, words: int, vocab_size: int) -> np.ndarray:
    """int32 [W] ascending, from a .npy file. Errors: ConfigError where it does not hold such ids of the vocabulary."""
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f'draft_ids: {path} cannot be read ({error})') from None
    if ids.shape != (words,) or (np.diff(ids) <= 0).any() or not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ConfigError(f'draft_ids: {path} does not hold {words} ascending ids below {vocab_size}')
    return ids.astype(np.int32)
