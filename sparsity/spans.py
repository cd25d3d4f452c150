"""For which tokens a score is asked, and whose losses it answers for.

A predictor is asked at one token, of which it sees the context of layer 0, and its answer serves that token and those
after it. A span is such a token and the tokens whose scores are added up for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from backbone.errors import ConfigError

Array = jax.Array
LABELS = ('rest', 'ahead', 'prompt')


@struct.dataclass
class Spans:
    """C spans in each of B rows of T tokens.

    at [B, C]: the token that asks. counted [B, C, T], 0 or 1: the tokens whose scores are summed. loss [B, T]: weight
    of each token's loss; a row's losses are averaged. known [B, C], 0 or 1: spans that mean something.
    """

    at: Array
    counted: Array
    loss: Array
    known: Array


def whole(batch: Mapping[str, Array]) -> Spans:
    """One span a row: all its tokens but the pads, asked at the last one that is no pad. batch: see docs/data.md."""
    real = batch['segments'] > 0
    last = jnp.maximum(real.sum(-1) - 1, 0)
    return Spans(last[:, None], real[:, None].astype(jnp.float32), batch['weights'],
                 (batch['weights'].sum(-1, keepdims=True) > 0).astype(jnp.float32))


def windows(batch: Mapping[str, Array], window: int, length: int = 0) -> Spans:
    """Every `window` tokens one that asks, for itself and the window - 1 after it, within its document: what a mask
    refreshed so often is used for while decoding (ours). One backward pass serves all of them: the losses are those of
    the whole row, and a token touches no loss before its own. length: only so many tokens of each window count; 0: all.
    Errors: ConfigError where no window fits."""
    size = batch['tokens'].shape[1]
    if not 1 <= window <= size or not 0 <= length <= window:
        raise ConfigError(f'window must be in 1..{size}, the tokens of a row, and length in 0..window, got {window} '
                          f'and {length}')
    at = jnp.broadcast_to(jnp.arange(size // window) * window, (len(batch['tokens']), size // window))
    ahead = jnp.arange(size) - jnp.arange(0, size - window + 1, window)[:, None]  # [C, T] from each one that asks
    inside = (ahead >= 0) & (ahead < (length or window))
    same = jnp.take_along_axis(batch['segments'], at, 1)[..., None] == batch['segments'][:, None]
    counted = inside & same & (batch['segments'] > 0)[:, None]
    known = jnp.take_along_axis(batch['weights'], at, 1) > 0
    return Spans(at, counted.astype(jnp.float32), batch['weights'], known.astype(jnp.float32))


def one(spans: Spans, c: Array | int) -> Spans:
    """Span c alone, with the loss of its own tokens only: the next window's, whatever comes later."""
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, c, 1, 1)
    counted = take(spans.counted)
    return Spans(take(spans.at), counted, spans.loss * counted[:, 0], take(spans.known))


def prompt(batch: Mapping[str, Array], cut: int) -> Spans:
    """The paper's label, made causal: the document at `cut` counts whole, its loss from there on, and it is asked at
    `cut`, not at the end of a continuation that is yet to come. Errors: ConfigError."""
    rows, size = batch['tokens'].shape
    if not 0 <= cut < size:
        raise ConfigError(f'cut must be in 0..{size - 1}, got {cut}')
    same = (batch['segments'] == batch['segments'][:, cut:cut + 1]) & (batch['segments'] > 0)
    loss = batch['weights'] * same * (jnp.arange(size) >= cut)
    known = (loss.sum(-1, keepdims=True) > 0).astype(jnp.float32)
    return Spans(jnp.full((rows, 1), cut), same[:, None].astype(jnp.float32), loss, known)
