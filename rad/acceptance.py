"""How many drafts a greedy target would keep, from every place a draft may start at, in one pass and exactly.

The target's own greedy continuation is made once, with its keys and values. A draft is kept only as long as it repeats
that continuation, so all that decides its length has the continuation's own tokens as input: the K steps from all
starts are one pass. Position i of the draft from slot s sees

    the TARGET's keys and values of slots < s          what verification left there
    the draft's own of slots s .. s + i                its window

which is what a draft on the target's cache sees when decoding (rad/skip.py). One teacher-forced pass of the draft model
over the continuation is something else: there the keys and values of the slots < s are the draft's too, and the count
it gives is that of a drafter with a cache of its own (`kept_with_own_cache`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone import cache as caches
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, make_rope
from backbone.model import embed, finish, unembed
from rad.skip import SkipConfig, run_skipping

Array = jax.Array


@struct.dataclass
class Continuation:
    """What greedy decoding made of B prompts, `size` tokens each, and the cache it left.

    tokens [B, C]: prompt and continuation; first [B]: where the continuation begins. layers: the cache's states, valid
    in the slots below first + size - 1.
    """

    tokens: Array
    first: Array
    layers: Any
    size: int = struct.field(pytree_node=False)

    def starts(self, block: int) -> Array:
        """[B, S]: slots of the pending token from which a draft of `block` tokens ends within the continuation."""
        if not 1 <= block < self.size:
            raise ConfigError(f'block {block}: from 1 to {self.size - 1}, the continuation has {self.size} tokens')
        return self.first[:, None] + jnp.arange(self.size - block)


def continuation(target: Any, params: Any, prompts: Sequence[Sequence[int]], size: int) -> Continuation:
    """Plain greedy decoding of any Target, `size` tokens a prompt whatever they are (a stop token ends nothing).

    Errors: ConfigError where a prompt is empty or the context too short.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if size < 2 or not len(lengths) or lengths.min() < 1 or lengths.max() + size > target.max_seq_len:
        raise ConfigError(f'prompts of {lengths.tolist()} tokens and {size} more: wanted are prompts that are not '
                          f'empty, at least 2 more, and at most {target.max_seq_len} altogether')
    table = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        table[row, :len(prompt)] = prompt
    cache = _decode(target, size, params, jnp.asarray(table), jnp.asarray(lengths))
    return Continuation(cache.tokens[:, :-1], jnp.asarray(lengths), cache.layers, size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(target: Any, size: int, params: Any, prompts: Array, lengths: Array) -> caches.Cache:
    batch, room = prompts.shape
    output = target.forward(params, prompts, target.init_cache(batch, room + size, 0), logits_at=lengths - 1)
    cache = caches.commit(output.cache, lengths - 1, output.logits[:, 0].argmax(-1).astype(jnp.int32))

    def step(_, cache):
        output = target.forward(params, cache.pending[:, None], cache)
        return caches.commit(output.cache, jnp.zeros_like(lengths), output.logits[:, 0].argmax(-1).astype(jnp.int32))
    return jax.lax.fori_loop(0, size - 1, step, cache)


def kept(cfg: ModelConfig, base: dict, cont: Continuation, skip: SkipConfig | Mapping[str, Array],
         block: int) -> Array:
    """[B, S]: how many drafts of `block` are kept from each of cont.starts(block), drafting on the target's cache.

    skip: what the draft leaves out, static or traced (rad/skip.py). cont: of PlainTarget(cfg).
    """
    starts = cont.starts(block)
    batch, count = starts.shape
    at = starts[..., None] + jnp.arange(block + 1)
    ids = jnp.take_along_axis(cont.tokens, at.reshape(batch, -1), axis=1).reshape(at.shape)
    positions = at[..., :-1].reshape(batch, -1)
    slots, before = jnp.arange(cont.tokens.shape[1]), jnp.repeat(starts, block, axis=1)[..., None]
    mask = slots < before
    if cfg.attention.window is not None:
        mask &= slots > positions[..., None] - cfg.attention.window
    ctx = Context(positions, mask, make_rope(cfg, positions))
    x = embed(cfg, base, ids[..., :-1].reshape(batch, -1), positions)
    x, _ = run_skipping(cfg, base, x, cont.layers, ctx, skip, functools.partial(windows, block, cfg.attention.window))
    words = unembed(cfg, base, finish(cfg, base, x)).argmax(-1).reshape(batch, count, block)
    return leading(words == ids[..., 1:])


def windows(block: int, reach: int | None, q: Array, k: Array, v: Array, state: Any,
            ctx: Context) -> tuple[Array, Any]:
    """Attention of S drafts of `block` tokens side by side: each over the cache under ctx.mask and its own tokens.

    q [B, S*block, H, hd]; k, v [B, S*block, KH, hd], which are not written. reach: of a sliding window, or None.
    """
    b, n, h, hd = q.shape
    groups, room, count = k.shape[2], state.k.shape[2], n // block
    dtype, wide = q.dtype, jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (a.astype(state.k.dtype) for a in (q, k, v))
    q = q.reshape(b, n, groups, -1, hd).transpose(0, 2, 3, 1, 4)  # [B, KH, r, n, hd]
    old = jnp.einsum('bgmh,bgch->bgmc', q.reshape(b, groups, -1, hd), state.k, preferred_element_type=wide)
    old = jnp.where(ctx.mask[:, None, None], old.reshape(b, groups, -1, n, room) * hd**-0.5, -jnp.inf)
    # The windows are small, and XLA:CPU has no narrow product in their shape: rounded as the cache is, then wide.
    q = q.astype(wide).reshape(*q.shape[:3], count, block, hd)
    k, v = (a.astype(wide).reshape(b, count, block, groups, hd) for a in (k, v))
    new = jnp.einsum('bgrsih,bsjgh->bgrsij', q, k) * hd**-0.5
    i = jnp.arange(block)
    own = i <= i[:, None] if reach is None else (i <= i[:, None]) & (i > i[:, None] - reach)
    new = jnp.where(own, new, -jnp.inf).reshape(*old.shape[:-1], block)
    weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(state.v.dtype)
    seen = weights[..., :room].reshape(b, groups, -1, room)
    heads = jnp.einsum('bgmc,bgch->bgmh', seen, state.v, preferred_element_type=wide).reshape(b, groups, -1, n, hd)
    mine = weights[..., room:].astype(wide).reshape(*old.shape[:3], count, block, block)
    heads += jnp.einsum('bgrsij,bsjgh->bgrsih', mine, v).reshape(heads.shape)
    return heads.transpose(0, 3, 1, 2, 4).reshape(b, n, h, hd).astype(dtype), state


def kept_with_own_cache(words: Array, cont: Continuation, block: int) -> Array:
    """[B, S]: the same for a drafter that keeps its own state of the committed tokens (another model, a hybrid).

    words [B, C]: what it says after each slot of cont.tokens, from one pass over them. Exact for such a drafter, since
    up to its first mistake it has run the continuation's own tokens; for one that reads the target's cache it is not.
    """
    at = cont.starts(block)[..., None] + jnp.arange(block)
    batch = at.shape[0]
    pick = lambda a, i: jnp.take_along_axis(a, i.reshape(batch, -1), axis=1).reshape(at.shape)
    return leading(pick(words, at) == pick(cont.tokens, at + 1))


def leading(right: Array) -> Array:
    """[..., K] bool -> how many are right before the first that is not."""
    return jnp.cumprod(right.astype(jnp.int32), axis=-1).sum(-1)


def histogram(found: np.ndarray, block: int) -> list[int]:
    """[block + 1]: starts by how many drafts they keep."""
    return np.bincount(np.asarray(found).reshape(-1), minlength=block + 1).tolist()


def walk(found: np.ndarray, block: int) -> list[int]:
    """[block + 1]: rounds by drafts kept, of the starts that decoding really comes by: s, then s + kept(s) + 1.

    found [B, S]: of `kept`. Rounds that begin behind the last start are not counted.
    """
    rounds = [0] * (block + 1)
    for row in np.asarray(found).tolist():
        at = 0
        while at < len(row):
            rounds[row[at]] += 1
            at += row[at] + 1
    return rounds


def by_position(counts: Sequence[int]) -> list[float]:
    """[K]: of the starts that keep the first i drafts, the share that keeps the next; 0 where there are none."""
    alive = np.cumsum(counts[::-1])[::-1]
    return np.divide(alive[1:], alive[:-1], out=np.zeros(len(counts) - 1), where=alive[:-1] > 0).tolist()


def tokens_a_round(counts: Sequence[int], block: int) -> float:
    """Mean, the target's own token included, of drafts of `block` <= K tokens; plain decoding is 1."""
    counts = np.asarray(counts)
    return float(1 + (np.minimum(np.arange(len(counts)), block) * counts).sum() / counts.sum())


def rate(counts: Sequence[int]) -> float:
    """Drafts kept over drafts proposed, the target's own token in neither."""
    return (tokens_a_round(counts, len(counts) - 1) - 1) / (len(counts) - 1)


def counter(cfg: ModelConfig, base: dict, parts: Sequence[Continuation], block: int
            ) -> Callable[[SkipConfig], tuple[list[int], list[int]]]:
    """f(SkipConfig) -> (histogram over all starts, rounds by drafts kept): one compiled function for every choice."""
    run = jax.jit(lambda base, cont, flags: kept(cfg, base, cont, flags, block))

    def count(skip: SkipConfig) -> tuple[list[int], list[int]]:
        skip.check(cfg)
        flags = skip.flags(cfg.num_layers)
        rows = [np.asarray(run(base, part, flags)) for part in parts]
        add = lambda of: np.sum([of(row, block) for row in rows], axis=0).tolist()
        return add(histogram), add(walk)
    return count
