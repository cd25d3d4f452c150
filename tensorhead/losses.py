"""Losses of a CP head, from the log-probabilities of the gold tokens by factor and component alone.

    pre[k, a] = log w_a + sum_{s<=k} logp[s, a],   A_k = logsumexp_a pre[k, a],   log q(x_k | x_<k) = A_k - A_{k-1}

The model: Basharin et al., 2024, arXiv 2410.17765. Shapes: leading axes [...] are windows (a row's position t and the n
tokens after it); n factors, r components, W draft words. Every loss is a mean over windows by `weight` [...], in nats a
window; under jit on a mesh the means are over the global batch. Where a window ends early (`windows`) logp is 0, which
sums those positions out exactly.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from backbone.errors import ConfigError
from backbone.matmul import product
from backbone.mesh import constrain, ways
from tensorhead import cp
from tensorhead.config import TensorHeadConfig
from tensorhead.head import Factors, logits
from tensorhead.lse import linear_lse

Array = jax.Array


def windows(targets: Array, segments: Array, weights: Array, n: int) -> tuple[Array, Array, Array]:
    """A batch's windows: targets, segments, weights [B, S] (docs/data.md) -> (future [B, S, n], valid, weight [B, S]).

    future[t, s] is the token s + 1 after position t; valid[t, s] says that it and all before it count, in the document
    of t and in the row: what is not valid is a suffix. weight is t's own, so 0 where not even its first token counts.
    """
    size = targets.shape[1]
    ahead = lambda a: jnp.stack([jnp.pad(a, ((0, 0), (0, n - 1)))[:, s:s + size] for s in range(n)], axis=-1)
    counts = (ahead(weights) > 0) & (ahead(segments) == segments[..., None])
    valid = jnp.cumprod(counts, axis=-1).astype(bool)
    return ahead(targets), valid, weights


def gold_logp(cfg: TensorHeadConfig, head: dict, mixture: Factors, U: Array, index: Array, valid: Array,
              chunk: int = 0, frozen: bool = False) -> Array:
    """logp [..., n, r] of draft words index [..., n]; 0 where not valid [..., n]. U [W, d] (mode full: not looked at).

    chunk, frozen: see lse.linear_lse. Only the log-sum-exp is of the vocabulary's size; the gold logit is a gather.
    """
    if cfg.mode != 'full':
        U = jax.lax.stop_gradient(U) if frozen else U
        gold, lse = gold_logit(cfg, mixture, U, index), linear_lse(mixture.h, U, chunk, frozen)
    elif chunk:
        own = lambda words: linear_lse(mixture.e, words, chunk)
        lse = jax.vmap(jax.vmap(own, 0, -1), 0, -2)(mixture.kernel.swapaxes(-1, -2))
        gold = gold_logit(cfg, mixture, U, index)
    else:
        z = logits(cfg, head, mixture)
        here = jnp.arange(z.shape[-1]) == index[..., None, None]
        gold, lse = jnp.where(here, z, 0).sum(-1), jax.nn.logsumexp(z, axis=-1)
    return jnp.where(valid[..., None], gold - lse, 0)


def gold_logit(cfg: TensorHeadConfig, mixture: Factors, U: Array, index: Array) -> Array:
    """The logits [..., n, r] of words index [..., n], by a gather of their vectors."""
    if cfg.mode == 'full':
        columns = jax.vmap(lambda own, i: own[..., i], (0, -1), -1)(mixture.kernel, index)  # [r, d, ..., n]
        return product('...d,rd...s->...sr', mixture.e, columns)
    return product('...srd,...sd->...sr', mixture.h, U[index])


def _mean(values: Array, weight: Array) -> Array:
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def joint_nll(log_w: Array, logp: Array, weight: Array) -> Array:
    """-log q(x_1..x_n): log_w [..., r], logp [..., n, r], weight [...] -> scalar."""
    return _mean(-cp.log_joint(log_w, logp), weight)


def discounted_nll(log_w: Array, logp: Array, weight: Array, discount: Array) -> Array:
    """-sum_k c_k log q(x_k | x_<k): as joint_nll, with any weights c = discount [n]; all ones is the joint.

    c_1 = 0 leaves the first token as evidence of the component only.
    """
    return _mean(_discounted(log_w, logp, jnp.asarray(discount, log_w.dtype)), weight)


@jax.custom_vjp
def _discounted(log_w: Array, logp: Array, c: Array) -> Array:
    return _discounted_save(log_w, logp, c)[0]


def _discounted_save(log_w, logp, c):
    # -sum_k c_k (A_k - A_{k-1}) = -sum_{k=0..n} (c_k - c_{k+1}) A_k with c_0 = c_{n+1} = 0.
    drop = -jnp.diff(jnp.pad(c, 1))
    ahead = cp.log_prefix(cp.prefix_log(log_w, logp))
    return -(ahead * drop).sum(-1), (log_w, logp, c)


def _discounted_backward(saved, g):
    """dA_k / dpre[k] is a softmax, and pre[k] holds every logp[s <= k]: a sum over k from s on."""
    log_w, logp, c = saved
    drop = -jnp.diff(jnp.pad(c, 1))
    share = jax.nn.softmax(cp.prefix_log(log_w, logp), axis=-1) * (-drop[:, None] * g[..., None, None])
    onward = jax.lax.cumsum(share, axis=share.ndim - 2, reverse=True)
    return onward[..., 0, :], onward[..., 1:, :], jnp.zeros_like(c)


_discounted.defvjp(_discounted_save, _discounted_backward)


def kl_full(cfg: TensorHeadConfig, head: dict, mixture: Factors, U: Array, teacher: Array, logp: Array, index: Array,
            valid: Array, weight: Array, discount: Array, chunk: int = 0) -> Array:
    """sum_k c_k KL(teacher_k || q(. | gold x_<k)) over the draft words -> scalar.

    teacher [..., n, d]: the base's hidden state before each token of the window; its law is softmax(U teacher) over the
    W words, and gets no gradient. logp, index, valid: those of `gold_logp`. q is the exact conditional: univariate
    marginals sum_a w_a p_a would see no dependence between tokens. `chunk` words at a time (0: all); the backward pass
    makes each chunk again.
    """
    del head
    teacher = jax.lax.stop_gradient(teacher)
    norm = linear_lse(teacher, jax.lax.stop_gradient(U), chunk, True)
    # gold - logp is a factor's log-sum-exp at no further pass; where it is not valid the result is masked.
    shift = _weights_before(mixture, logp) + logp - gold_logit(cfg, mixture, U, index)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total, part):
        words, own, real = part
        log_p = product('...d,pvd->...pv', teacher, jax.lax.stop_gradient(words)) - norm[..., None, None]
        z = product('...d,pvd->...pv', mixture.h, words) if own is None else \
            product('...d,srpvd->...srpv', mixture.e, own)
        log_q = jax.nn.logsumexp(z + shift[..., None, None], axis=-3)
        return total + jnp.where(real, jnp.exp(log_p) * (log_p - log_q), 0).sum((-1, -2)), None

    own = mixture.kernel if cfg.mode == 'full' else None
    total, _ = jax.lax.scan(add, jnp.zeros(norm.shape, shift.dtype), _parts(U, own, chunk))
    return _mean((total * valid * discount).sum(-1), weight)


def kl_bernoulli(cfg: TensorHeadConfig, head: dict, mixture: Factors, U: Array, teacher: Array, logp: Array,
                 index: Array, valid: Array, weight: Array, discount: Array, chunk: int = 0) -> Array:
    """As kl_full, of the laws collapsed to {gold, any other word}: a lower bound of it, at no pass for the head."""
    del cfg, head
    teacher, U = jax.lax.stop_gradient((teacher, U))
    log_p = product('...d,...d->...', teacher, U[index]) - linear_lse(teacher, U, chunk, True)
    log_q = cp.conditionals(mixture.log_w, logp)
    # Rounding may put a log-probability at or above 0, where the other word has none.
    log_p, log_q = (jnp.minimum(x, -1e-6) for x in (log_p, log_q))
    p = jnp.exp(log_p)
    total = p * (log_p - log_q) + (1 - p) * (_log1mexp(log_p) - _log1mexp(log_q))
    return _mean((total * valid * discount).sum(-1), weight)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0."""
    return jnp.where(x > -0.7, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def _weights_before(mixture: Factors, logp: Array) -> Array:
    """log omega [..., n, r]: the component weights once x_<k are seen."""
    return cp.mixture_weights(cp.prefix_log(mixture.log_w, logp))[..., :-1, :]


def _parts(U: Array, own: Array | None, chunk: int) -> tuple[Array, Array | None, Array]:
    """Chunks of the vocabulary with the leading axis of a scan: U as [c, pieces, size, d], own [n, r, d, W] as
    [c, n, r, pieces, size, d], and bool [c, size]: not padding. Pieces: of the mesh in force, as in lse.py."""
    pieces = ways('vocab', len(U))
    each = len(U) // pieces
    size = min(chunk or each, each)
    count = -(-each // size)

    def cut(words: Array) -> Array:
        """[..., W, d] -> [c, ..., pieces, size, d]."""
        words = words.reshape(*words.shape[:-2], pieces, each, words.shape[-1])
        words = jnp.pad(words, [(0, 0)] * (words.ndim - 2) + [(0, count * size - each), (0, 0)])
        return jnp.moveaxis(words.reshape(*words.shape[:-2], count, size, words.shape[-1]), -3, 0)

    return (constrain(cut(U), None, 'vocab', None, None), None if own is None else cut(own.swapaxes(-1, -2)),
            (jnp.arange(count * size) < each).reshape(count, size))


def balance(log_w: Array, weight: Array, kind: str) -> Array:
    """What keeps all components in use, from their mean weights P and shares of argmax f: log_w [..., r] -> scalar.

    switch: r sum_a f_a P_a (Fedus et al., 2021; f gets no gradient), 1 when even. cv2: r sum_a P_a^2 - 1, and
    neg_entropy: log r + sum_a P_a log P_a, 0 when even. The means are over the batch as jit sees it: the global one.
    Errors: ConfigError for another kind.
    """
    P, f = _usage(log_w, weight)
    r = log_w.shape[-1]
    if kind == 'switch':
        return r * (jax.lax.stop_gradient(f) * P).sum()
    if kind == 'cv2':
        return r * (P * P).sum() - 1
    if kind == 'neg_entropy':
        return jnp.log(r) - _entropy(P)
    raise ConfigError(f'balance: unknown {kind!r}, one of switch, cv2, neg_entropy')


def _usage(log_w: Array, weight: Array) -> tuple[Array, Array]:
    """Mean weights P [r] and shares of argmax f [r]."""
    over = lambda a: jax.vmap(_mean, (-1, None))(a, weight)
    return over(jnp.exp(log_w)), over(jax.nn.one_hot(log_w.argmax(-1), log_w.shape[-1], dtype=log_w.dtype))


def _entropy(p: Array) -> Array:
    """Of p [..., r], in nats; the gradient is finite at 0 too."""
    return -(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))).sum(-1)


def usage(log_w: Array, after: Array, weight: Array) -> dict[str, Array]:
    """How the components share the work. log_w [..., r]; after [..., r]: log weights once the window is seen, up to a
    constant. usage_entropy: of the mean weights; row_entropy: mean of the windows' own (nats); share_a: windows in
    which component a has the largest weight; responsibility: mean of the largest one after the window."""
    P, f = _usage(log_w, weight)
    best = jax.nn.softmax(after, axis=-1).max(-1)
    return {'usage_entropy': _entropy(P), 'row_entropy': _mean(_entropy(jnp.exp(log_w)), weight),
            'responsibility': _mean(best, weight)} | {f'share_{a + 1}': f[a] for a in range(len(f))}
