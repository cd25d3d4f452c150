"""From scores to what is kept: 0/1 by unit, masks, and ids of static shape.

    scores  {'heads': [B, L, H'], 'neurons': [B, L, NB]}     higher = keep
    units   the same shapes, bool: what is kept
    masks   {'heads': [B, L, H], 'neurons': [B, L, F]} of 0 and 1, for the plain layer
    ids     [K] ascending, the rest filled with the last one that counts, and how many count

Local, global and hybrid ranking follow the code of Akhauri et al., 2024 (arXiv 2406.16635), but for two things: layers
that stay dense take no part in the ranking (there they are filled up afterwards, so that less is dropped than was
said), and `hybrid` gives a layer its best back before the others are ranked. `allocate` is ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig
from sparsity.config import PARTS, SparsityConfig, kept

Array = jax.Array
Scores = dict[str, Array]
Units = dict[str, Array]
FEWEST = {'heads': 1, 'neurons': 1 / 32}  # under hybrid no layer keeps less: a number, or a share (256 of 8192)


def pool(scores: Array, size: int) -> Array:
    """[..., n] -> [..., n / size]: a block's score is the sum of what is in it."""
    return scores.reshape(*scores.shape[:-1], -1, size).sum(-1)


def best(scores: Array, k: int) -> Array:
    """scores [..., n] -> bool [..., n], exactly k of each row True: of equal ones the first, and NaN last."""
    ids = jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), k)[1]
    flat = ids.reshape(-1, k)
    marks = jnp.zeros((flat.shape[0], scores.shape[-1]), bool)
    return marks.at[jnp.arange(flat.shape[0])[:, None], flat].set(True).reshape(scores.shape)


def choose(cfg: ModelConfig, s: SparsityConfig, scores: Scores) -> Units:
    """What every row keeps, each by its own scores: {'heads': bool [B, L, H'], 'neurons': bool [B, L, NB]}.

    Dense layers, and a part of which all is kept, are all True whatever the scores say (they may then be missing).
    """
    return {part: _choose(cfg, s, part, scores) for part in PARTS}


def _choose(cfg: ModelConfig, s: SparsityConfig, part: str, scores: Scores) -> Array:
    counts, size, sparse = s.counts_of(cfg, part), s.sizes(cfg)[part], s.sparse_layers(cfg)
    batch = jax.tree.leaves(scores)[0].shape[0]
    units = jnp.ones((batch, cfg.num_layers, size), bool)
    if all(n == size for n in counts) or not sparse:
        return units
    mine = scores[part]
    if s.ranking == 'local':
        return jnp.stack([best(mine[:, l], n) if n < size else units[:, l] for l, n in enumerate(counts)], axis=1)
    of_sparse = mine[:, sparse.start:sparse.stop]
    chosen = rank_together(of_sparse, getattr(s, part), fewest(part, size) if s.ranking == 'hybrid' else 0)
    return units.at[:, sparse.start:sparse.stop].set(chosen)


def fewest(part: str, size: int) -> int:
    share = FEWEST[part]
    return share if isinstance(share, int) else max(1, int(share * size))


def rank_together(scores: Array, share: float, least: int = 0) -> Array:
    """scores [B, L, n] of several layers -> bool [B, L, n]: the best `share` of all L n, at least `least` a layer."""
    batch, layers, size = scores.shape
    count = kept(layers * size, share)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if least:  # the best of each layer come before everything else
        scores = jnp.where(best(scores, min(least, count // layers)), jnp.inf, scores)
    return best(scores.reshape(batch, -1), count).reshape(scores.shape)


def union(units: Units) -> Units:
    """What any row keeps, for every row."""
    return {part: jnp.broadcast_to(a.any(0, keepdims=True), a.shape) for part, a in units.items()}


def expand(cfg: ModelConfig, s: SparsityConfig, units: Units) -> dict[str, Array]:
    """Masks of 0 and 1 by query head and by neuron: {'heads': [B, L, H], 'neurons': [B, L, F]} float32."""
    wide = {'heads': cfg.attention.num_heads // s.units(cfg), 'neurons': s.block}
    return {part: jnp.repeat(a.astype(jnp.float32), wide[part], axis=-1) for part, a in units.items()}


def to_ids(units: Array, k: int) -> tuple[Array, Array]:
    """bool [..., n] -> ids [..., k] int32, ascending and in range, and how many of them count [...].

    At most k may be True. What is left of the k is filled with the last id that counts (0 where none does): a kernel
    that finds the same block again need not fetch it.
    """
    n = units.shape[-1]
    flat = units.reshape(-1, n)
    last = jnp.where(flat, jnp.arange(n), 0).max(-1, keepdims=True)
    place = jnp.where(flat, flat.cumsum(-1) - 1, k)  # cheaper than to sort; what has no place is dropped
    ids = jnp.broadcast_to(last, (flat.shape[0], k)).at[jnp.arange(flat.shape[0])[:, None], place].set(
        jnp.broadcast_to(jnp.arange(n), flat.shape), mode='drop')
    active = jnp.minimum(units.sum(-1), k).astype(jnp.int32)
    return ids.reshape(*units.shape[:-1], k).astype(jnp.int32), active


# --- offline --------------------------------------------------------------------------------------------------------


def allocate(cfg: ModelConfig, s: SparsityConfig, part: str, scores: Array) -> tuple[int, ...]:
    """Units of `part` to keep in each of the L layers, for local ranking: as many as ranking all layers together keeps
    there on average over scores [N, L, n] of N examples, at least one each.

    Their sum over the sparse layers is what the share asks for. Scores of different layers have to be comparable: not
    those that were normalised layer by layer. -> SparsityConfig.counts or head_counts.
    """
    sparse, size = s.sparse_layers(cfg), s.sizes(cfg)[part]
    rank = jax.jit(rank_together, static_argnums=1)
    chosen = rank(jnp.asarray(scores)[:, sparse.start:sparse.stop], getattr(s, part))
    counts = _rounded(np.asarray(chosen.sum(-1).mean(0), np.float64), kept(len(sparse) * size, getattr(s, part)), size)
    return tuple(counts[l - sparse.start] if l in sparse else size for l in range(cfg.num_layers))


def _rounded(wanted: np.ndarray, total: int, size: int) -> list[int]:
    """Whole numbers in 1..size near `wanted` that sum to max(total, one each): the largest remainders go up."""
    counts = np.clip(np.floor(wanted).astype(int), 1, size)
    while counts.sum() != max(total, len(counts)):
        step = 1 if counts.sum() < total else -1
        room = (counts < size) if step > 0 else (counts > 1)
        counts[np.argmax(np.where(room, step * (wanted - counts), -np.inf))] += step
    return counts.tolist()
