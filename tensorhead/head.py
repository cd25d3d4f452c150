"""The CP head: one hidden state -> the weights and factors of a rank-r joint law of the next n tokens.

    q(x_1..x_n | e) = sum_a w_a(e) prod_s p_a^(s)(x_s | e)        w = softmax(G e + b),  p_a^(s) = softmax(z_a^(s))

(Basharin et al., 2024, arXiv 2410.17765.) Nothing here is of the size of the vocabulary until `logits` asks for it: the
loss needs a gather and a log-sum-exp only (losses.py, lse.py), a draft a few rows at a time (packed.py).

Shapes: d hidden, n horizon, r rank, W words of the draft vocabulary. Factor index s is 0-based: it predicts x_{t+1+s}.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone import draft_vocabulary
from backbone.errors import ConfigError
from backbone.matmul import dense, product
from backbone.mesh import constrain
from tensorhead.config import TensorHeadConfig

Array = jax.Array


@struct.dataclass
class Factors:
    """A mixture before its logits. The shared modes fill h; mode full fills e and kernel, whose logits are e @ kernel.

    log_w [..., r], normalised, at least float32. h [..., n, r, d]. e [..., d]; kernel [n, r, d, W].
    """

    log_w: Array
    h: Array | None = None
    e: Array | None = None
    kernel: Array | None = None


def init(cfg: TensorHeadConfig, rng: Array, draft_ids: Array | None = None) -> dict:
    """A head's parameters (float32), pure. draft_ids int32 [W]: ascending base ids of the draft vocabulary.

    Every component starts near the base's own next-token law (h = e plus noise): equal ones would stay equal for ever,
    since a component learns in proportion to its responsibility and those would all be 1/r.
    Errors: ConfigError where draft_ids and cfg.draft_vocab do not fit together.
    """
    if draft_ids is not None or cfg.draft_vocab:
        _check_ids(cfg, draft_ids)
    n, r, d, k = cfg.horizon, cfg.rank, cfg.hidden_size, cfg.inner_rank
    keys = jax.random.split(rng, 3)
    noise = lambda key, *shape: cfg.init_std * jax.random.normal(key, shape)
    head = {'gate': {'kernel': noise(keys[0], d, r), 'bias': jnp.zeros((r,))}}
    if cfg.mode == 'full':
        head['factors'] = {'kernel': noise(keys[1], n, r, d, cfg.words)}
    elif cfg.mode == 'lowrank_shared':
        # Scaled so that the product's entries have the deviation init_std, as the full matrices' have.
        down, up = d ** -0.5 * jax.random.normal(keys[1], (n, r, d, k)), noise(keys[2], n, r, k, d) * (d / k) ** 0.5
        head['factors'] = {'down': down, 'up': up}
    else:
        head['factors'] = {'kernel': noise(keys[1], n, r, d, d)}
        if cfg.mode == 'medusa_shared':
            head['factors']['bias'] = jnp.zeros((n, r, d))
    if m := cfg.pending_size:
        two = jax.random.split(keys[0])  # an `up` of 0 leaves e as it is at first
        head['pending'] = {'from_e': d ** -0.5 * jax.random.normal(two[0], (d, m)), 'bias': jnp.zeros((m,)),
                           'from_x': d ** -0.5 * jax.random.normal(two[1], (d, m)), 'up': jnp.zeros((m, d))}
    return head if draft_ids is None else head | {'draft_ids': jnp.asarray(draft_ids, jnp.int32)}


def _check_ids(cfg: TensorHeadConfig, ids: Array | None) -> None:
    given = 0 if ids is None else len(ids)
    if given != cfg.draft_vocab:
        raise ConfigError(f'tensorhead.draft_vocab is {cfg.draft_vocab}, {given} draft_ids were given')
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    if ids[0] < 0 or ids[-1] >= cfg.vocab_size or (np.diff(ids) <= 0).any():
        raise ConfigError(f'tensorhead.draft_vocab: draft_ids must ascend within 0..{cfg.vocab_size - 1}')


def read_pending(head: dict, e: Array, embedding: Array) -> Array:
    """What factors 2..n start from in place of e [..., d] where they read x_1: e and its embedding [..., d], mixed.

    The base's embeddings are of any scale: they are brought to a root mean square of 1.
    """
    p = head['pending']
    wide = embedding.astype(jnp.promote_types(embedding.dtype, jnp.float32))
    unit = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-12)
    inner = dense({'kernel': p['from_e']}, e) + dense({'kernel': p['from_x'], 'bias': p['bias']}, unit.astype(e.dtype))
    return (e + dense({'kernel': p['up']}, jax.nn.silu(inner))).astype(e.dtype)


def factors(cfg: TensorHeadConfig, head: dict, e: Array, x_1: Array | None = None) -> Factors:
    """The mixture at hidden states e [..., d] (after the final norm). x_1 [..., d]: embedding of the token that
    follows, where the head reads it.

    h is in e's dtype; products are accumulated and log_w is taken in at least float32.
    """
    log_w = jax.nn.log_softmax(product('...d,dr->...r', e, head['gate']['kernel']) + head['gate']['bias'], axis=-1)
    p = head['factors']
    if cfg.mode == 'full':
        return Factors(log_w, e=e, kernel=p['kernel'])
    if not cfg.pending_size:
        return Factors(log_w, h=_pin(_states(cfg, p, e)))
    first, later = (jax.tree.map(lambda leaf: leaf[part], p) for part in (slice(1), slice(1, None)))
    h = jnp.concatenate([_states(cfg, first, e), _states(cfg, later, read_pending(head, e, x_1))], axis=-3)
    return Factors(log_w, h=_pin(h))


def _states(cfg: TensorHeadConfig, p: dict, e: Array) -> Array:
    """h [..., m, r, d] of the m factors of p, in e's dtype."""
    if cfg.mode == 'lowrank_shared':
        inner = product('...d,srdk->...srk', e, p['down']).astype(p['up'].dtype)
        # In the operands' own dtype: XLA:CPU has no batched product of bfloat16 into float32.
        change = jnp.einsum('...srk,srkd->...srd', inner, p['up'])
    else:
        change = product('...d,srdc->...src', e, p['kernel'])
        if cfg.mode == 'medusa_shared':
            change = jax.nn.silu(change + p['bias'])
    return (e[..., None, None, :] + change).astype(e.dtype)


def _pin(h: Array) -> Array:
    """h [..., n, r, d]: batch over `data`, components over `expert`, where a mesh is in force."""
    leading = ('batch',) + (None,) * (h.ndim - 4) if h.ndim > 3 else ()
    return constrain(h, *leading, None, 'component', None)


def unembedding(base: dict, head: dict) -> Array:
    """U [W, d] of the head's words, as draft_vocabulary.unembedding. base: params['base']."""
    return draft_vocabulary.unembedding(base, head.get('draft_ids'))


def logits(cfg: TensorHeadConfig, head: dict, mixture: Factors, U: Array | None = None) -> Array:
    """Dense logits [..., n, r, W], at least float32. U [W, d]; mode full needs none. To decode: packed.py."""
    del head
    if cfg.mode == 'full':
        return product('...d,srdw->...srw', mixture.e, mixture.kernel)
    return product('...d,wd->...w', mixture.h, U)


def index_of(head: dict, tokens: Array) -> tuple[Array, Array]:
    """As draft_vocabulary.index_of, among the head's words."""
    return draft_vocabulary.index_of(head.get('draft_ids'), tokens)
