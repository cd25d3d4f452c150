"""The mixture in closed form: every query of q(x_1..x_n) = sum_a w_a prod_s p_a^(s)(x_s) that decoding needs.

Pure functions, no parameters. Shapes: n positions, r components, W words; leading axes are free. `log_w` [..., r] is
the log of the mixture weights (normalised, as a gate's log_softmax is); `logp` holds log p_a^(s), either of given
tokens, [..., n, r], or of every word, [..., n, r, W]. The model: Basharin et al., 2024, arXiv 2410.17765.

Everything is a sum of r terms per position because a component is a product: a prefix only re-weights the components,

    log q(x_1..x_k)   = logsumexp_a pre[k, a]        pre[k, a] = log w_a + sum_{s<=k} log p_a^(s)(x_s)
    q(x_k | x_<k)     = sum_a omega^(k)_a p_a^(k)    omega^(k) = softmax_a pre[k-1, a]

and a position is summed out by leaving its factor out (log p = 0).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone.sampling import draw, fold_in, split

Array = jax.Array


def prefix_log(log_w: Array, logp: Array) -> Array:
    """log_w [..., r], logp [..., n, r] of the tokens -> pre [..., n+1, r]; pre[0] = log_w."""
    seen = jnp.concatenate([jnp.zeros_like(logp[..., :1, :]), jnp.cumsum(logp, axis=-2)], axis=-2)
    return log_w[..., None, :] + seen


def log_prefix(pre: Array) -> Array:
    """pre [..., n+1, r] -> A [..., n+1], log q(x_1..x_k) for k = 0..n; A[0] = 0."""
    return jax.nn.logsumexp(pre, axis=-1)


def log_joint(log_w: Array, logp: Array) -> Array:
    """log q(x_1..x_n): log_w [..., r], logp [..., n, r] -> [...]."""
    return jax.nn.logsumexp(log_w + logp.sum(-2), axis=-1)


def conditionals(log_w: Array, logp: Array) -> Array:
    """log q(x_k | x_<k) for k = 1..n: log_w [..., r], logp [..., n, r] -> [..., n]. They sum to the joint."""
    return jnp.diff(log_prefix(prefix_log(log_w, logp)), axis=-1)


def mixture_weights(pre: Array) -> Array:
    """pre [..., n+1, r] -> log omega, the weights after 0..n tokens, normalised over r."""
    return jax.nn.log_softmax(pre, axis=-1)


def condition_on(log_w: Array, logp_s: Array) -> Array:
    """Weights once a token is seen: log_w [..., r], logp_s [..., r], its log-probability by component -> [..., r]."""
    return jax.nn.log_softmax(log_w + logp_s, axis=-1)


def row(log_w: Array, logp_s: Array) -> Array:
    """The law of one position: log_w [..., r], logp_s [..., r, W] -> log q [..., W]."""
    if logp_s.shape[-2] == 1:  # spares an exponential of every word
        return log_w + logp_s[..., 0, :]
    return jax.nn.logsumexp(log_w[..., None] + logp_s, axis=-2)


def next_token(log_w: Array, logp_1: Array) -> Array:
    """log q(x_1), the mixture's own next-token law: log_w [..., r], logp_1 [..., r, W] -> [..., W]."""
    return row(log_w, logp_1)


def walk(log_w: Array, logp: Array, choose: Callable[[int, Array], tuple[Array, Any]]) -> tuple[Array, list[Any]]:
    """Position by position, each from the exact conditional given the tokens chosen before it.

    choose(s, log q [..., W]) -> (token [...], anything). Returns tokens [..., n] and what `choose` gave beside them.
    """
    tokens, beside = [], []
    for s in range(logp.shape[-3]):
        table = logp[..., s, :, :]
        token, extra = choose(s, row(log_w, table))
        tokens.append(token)
        beside.append(extra)
        log_w = condition_on(log_w, jnp.take_along_axis(table, token[..., None, None], axis=-1)[..., 0])
    return jnp.stack(tokens, axis=-1), beside


def seq_greedy(log_w: Array, logp: Array) -> Array:
    """The likeliest word of each conditional in turn: log_w [..., r], logp [..., n, r, W] -> int32 [..., n].

    What greedy verification wants; it need not be the likeliest sequence.
    """
    return walk(log_w, logp, lambda s, log_q: (log_q.argmax(-1).astype(jnp.int32), None))[0]


def sample_sequential(log_w: Array, logp: Array, rng: Array) -> Array:
    """A draw from the joint, one position after the other: log_w [B, r], logp [B, n, r, W] -> int32 [B, n].

    rng: one key, or one a row.
    """
    return walk(log_w, logp, lambda s, log_q: (draw(jnp.exp(log_q), fold_in(rng, s)), None))[0]


def sample_ancestral(log_w: Array, logp: Array, rng: Array) -> Array:
    """A draw from the same joint, by way of a component: then all positions at once. Shapes as `sample_sequential`."""
    component_rng, token_rng = split(rng)
    component = draw(jnp.exp(log_w), component_rng)
    chosen = jnp.take_along_axis(logp, component[..., None, None, None], axis=-2)[..., 0, :]
    return draw(jnp.exp(chosen), token_rng)


def expert_argmax(log_w: Array, logp: Array) -> tuple[Array, Array]:
    """Each component's likeliest word at every position, and what the mixture thinks of that sequence.

    log_w [..., r], logp [..., n, r, W] -> tokens int32 [..., r, n], log q of each [..., r].
    """
    best = logp.argmax(-1).astype(jnp.int32)  # [..., n, r candidates]
    gold = jnp.take_along_axis(logp, best[..., None, :], axis=-1)  # [..., n, r, r candidates]
    return best.swapaxes(-1, -2), log_joint(log_w[..., None, :], gold.transpose(*range(gold.ndim - 3), -1, -3, -2))


def map_exact(log_w: np.ndarray, logp: np.ndarray) -> tuple[tuple[int, ...], float]:
    """The likeliest sequence and its log-probability: log_w [r], logp [n, r, W]. On the host; for small W and n.

    Best first over prefixes, with the bound that lets every component finish with its own best words: never below the
    best completion, so the first whole sequence taken from the queue is the answer.
    """
    log_w, logp = np.asarray(log_w, np.float64), np.asarray(logp, np.float64)
    n = logp.shape[0]
    rest = np.concatenate([np.cumsum(logp.max(-1)[::-1], axis=0)[::-1], np.zeros((1, len(log_w)))])  # [n+1, r]
    queue = [(-np.logaddexp.reduce(log_w + rest[0]), (), log_w)]
    while True:
        bound, prefix, weights = heapq.heappop(queue)
        k = len(prefix)
        if k == n:
            return prefix, -bound
        longer = weights[:, None] + logp[k]  # [r, W]
        bounds = np.logaddexp.reduce(longer + rest[k + 1][:, None], axis=0)
        for word, value in enumerate(bounds):
            heapq.heappush(queue, (-value, (*prefix, word), longer[:, word]))
