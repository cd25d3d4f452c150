"""Mamba-2 in the shape of a grouped attention: the state space recurrence in four forms, and the mixer around it.

    z, x, B, C, dt = split(u W_in)                      v = silu(causal depthwise conv(x | B | C))
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t    y_t = S_t C_t + D x_t
    out = norm(y silu(z)) W_out

Dao and Gu, 2024 (arXiv 2405.21060), with expansion 1 and x and B shared by groups of heads as keys and values are (Wang
et al., 2024, arXiv 2408.15237): head h reads group h // (H / G), and W_out has the shape of an attention's output
projection. Letters: B rows, S tokens, H heads, G groups, P head width, N state size, W convolution taps, R log slots.

A mixer's parameters, kernels [in, out]: {'in_proj': {'kernel': [d, HP + GP + GN + HN + H]}, 'conv': {'kernel': [W, ch],
'bias': [ch]}, 'dt_bias': [H], 'A_log': [H], 'D': [H], 'norm': {'scale': [HP]}, 'out_proj': {'kernel': [HP, d]}}.

Steps, sums of log decays and states are at least float32. Exponents are masked before exp: under a strong decay exp of
what lies above the diagonal is infinite, and a mask that comes after it leaves NaN in the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.cache import SsmLog, SsmState
from backbone.config import SsmConfig
from backbone.errors import ConfigError
from backbone.matmul import dense

Array = jax.Array
FORMS = ('chunked', 'sequential', 'associative')

# --- the recurrence ---------------------------------------------------------------------------------------------------


def ssd(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, state: Array | None = None, *,
        form: str = 'chunked', chunk: int = 64, resets: Array | None = None) -> tuple[Array, Array]:
    """x [B, S, H, P], dt [B, S, H] after softplus, A [H] < 0, B [B, S, G, N], C [B, S, H, N], D [H], state [B, H, P, N]
    before the first token (None: zero) -> (y [B, S, H, P], state after the last), at least float32.

    form: 'chunked' trains; 'sequential' is a loop over tokens; 'associative' a parallel prefix with a state for every
    token, for short sequences. A token with dt = 0 leaves the state as it is (padding). resets [B, S]: True where the
    state is emptied before the token (a document begins). Errors: ConfigError for an unknown form.
    """
    if form not in FORMS:
        raise ConfigError(f'ssd form: unknown {form!r}, one of {", ".join(FORMS)}')
    x, dt, A, B, C, D = (_wide(a) for a in (x, dt, A, B, C, D))
    if state is None:
        state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]), x.dtype)
    state = _wide(state)
    if resets is None:
        resets = jnp.zeros(x.shape[:2], bool)
    scan = {'chunked': _chunked, 'sequential': _sequential, 'associative': _associative}[form]
    settings = {'chunk': min(chunk, x.shape[1])} if form == 'chunked' else {}
    y, state = scan(x * dt[..., None], dt * A, B, C, state, resets, **settings)
    return y + D[:, None] * x, state


def ssd_step(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, state: Array) -> tuple[Array, Array]:
    """One token of `ssd`: the same without the axis of tokens."""
    x, dt, A, B, C, D, state = (_wide(a) for a in (x, dt, A, B, C, D, state))
    state = _advance(state, x * dt[..., None], dt * A, B)
    return jnp.einsum('bhpn,bhn->bhp', state, C) + D[:, None] * x, state


def _advance(state: Array, u: Array, la: Array, B: Array) -> Array:
    """S_t from S_{t-1}; u [B, H, P] is dt x, la [B, H] dt A, B [B, G, N]."""
    return jnp.exp(la)[..., None, None] * state + u[..., None] * by_head(B, u.shape[1])[..., None, :]


def by_head(grouped: Array, heads: int) -> Array:
    """[..., G, N] -> [..., H, N]: head h reads group h // (H / G)."""
    return jnp.repeat(grouped, heads // grouped.shape[-2], axis=-2)


def _sequential(u, la, B, C, state, resets):
    def step(state, token):
        u, la, B, C, reset = token
        state = _advance(jnp.where(reset[:, None, None, None], 0, state), u, la, B)
        return state, jnp.einsum('bhpn,bhn->bhp', state, C)

    tokens = jax.tree.map(lambda a: a.swapaxes(0, 1), (u, la, B, C, resets))
    state, y = jax.lax.scan(step, state, tokens)
    return y.swapaxes(0, 1), state


def _associative(u, la, B, C, state, resets):
    decay = jnp.where(resets[..., None], 0, jnp.exp(la))[..., None, None]
    new = u[..., None] * by_head(B, u.shape[2])[..., None, :]

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, new = jax.lax.associative_scan(join, (decay, new), axis=1)
    states = decay * state[:, None] + new
    return jnp.einsum('bshpn,bshn->bshp', states, C), states[:, -1]


def _chunked(u, la, B, C, state, resets, chunk):
    """Within a chunk as attention under a mask of decays, from chunk to chunk by one state."""
    batch, size, heads, width = u.shape
    groups, each = B.shape[2], heads // B.shape[2]
    pad = -size % chunk
    cut = lambda a: jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2))).reshape(batch, -1, chunk, *a.shape[2:])
    split = lambda a, axis: a.reshape(*a.shape[:axis], groups, each, *a.shape[axis + 1:])
    u, la, C = (split(cut(a), 3) for a in (u, la, C))  # [B, chunks, Q, G, H / G, ...]
    B, resets = cut(B), cut(resets)
    total = jnp.cumsum(la, axis=2)
    begun = jnp.cumsum(resets, axis=2)  # documents begun in this chunk, up to this token

    causal = jnp.tril(jnp.ones((chunk, chunk), bool)) & (begun[:, :, :, None] == begun[:, :, None])
    exponent = total[:, :, :, None] - total[:, :, None]  # [B, chunks, i, j, G, H / G]
    decays = jnp.exp(jnp.where(causal[..., None, None], exponent, -jnp.inf))
    weights = decays * jnp.einsum('bcigrn,bcjgn->bcijgr', C, B)
    y = jnp.einsum('bcijgr,bcjgrp->bcigrp', weights, u)

    lasts = (begun == begun[:, :, -1:])[..., None, None] * jnp.exp(total[:, :, -1:] - total)
    added = jnp.einsum('bcjgrp,bcjgn->bcgrpn', u * lasts[..., None], B)
    kept = (begun[:, :, -1] == 0)[..., None, None] * jnp.exp(total[:, :, -1])

    def carry(state, of_chunk):
        kept, added = of_chunk
        return kept[..., None, None] * state + added, state

    by_chunk = (kept.swapaxes(0, 1), added.swapaxes(0, 1))
    state, entries = jax.lax.scan(carry, split(state, 1), by_chunk)
    fades = (begun == 0)[..., None, None] * jnp.exp(total)
    y = y + jnp.einsum('bcigrn,cbgrpn->bcigrp', C * fades[..., None], entries)
    y = y.reshape(batch, -1, heads, width)[:, :size]
    return y, state.reshape(batch, heads, width, -1)


# --- the mixer --------------------------------------------------------------------------------------------------------


def mix(cfg: SsmConfig, mixer: dict, u: Array, state: SsmState | None = None, *, pos: Array | None = None,
        last: Array | None = None, valid: Array | None = None, segments: Array | None = None,
        form: str | None = None) -> tuple[Array, SsmState | None]:
    """u [B, S, d] -> (out [B, S, d], state), in u's dtype.

    Without a state: whole sequences from nothing, in `form` of `ssd` (default chunked). valid [B, S]: False marks
    padding at the end of a row. segments [B, S]: document ids; a new one empties state and convolution.
    With one: a block at positions pos[b].. (default: where the state is), which fills the log and leaves the state to
    `cache.commit`. A block longer than the log is a prompt: `last` [B], its last token that is no padding, says how
    much of it will be committed, and the state is brought there at once.
    Errors: ConfigError for such a block without `last`.
    """
    out, state, _ = mix_and_heads(cfg, mixer, u, state, pos=pos, last=last, valid=valid, segments=segments, form=form)
    return out, state


def mix_and_heads(cfg: SsmConfig, mixer: dict, u: Array, state: SsmState | None = None, *, pos: Array | None = None,
                  last: Array | None = None, valid: Array | None = None, segments: Array | None = None,
                  form: str | None = None) -> tuple[Array, SsmState | None, Array]:
    """`mix`, and what its output projection reads [B, S, H, P]."""
    z, raw, dt = project(cfg, mixer, u)
    if state is None:
        y = _whole(cfg, mixer, raw, dt, valid, segments, form or 'chunked')
    elif valid is not None or segments is not None:
        raise ConfigError('mix: valid and segments are for whole sequences, a block with a state has pos and last')
    elif u.shape[1] > state.log.dt.shape[1]:
        if last is None:
            raise ConfigError(f'a block of {u.shape[1]} tokens is longer than the log of {state.log.dt.shape[1]}: give '
                              'its last token (logits_at), or a cache for longer blocks')
        y, state = _prompt(cfg, mixer, raw, dt, state, state.at if pos is None else pos, last, form or 'chunked')
    else:
        y, state = _block(cfg, mixer, raw, dt, state, state.at if pos is None else pos)
    heads = gate(cfg, mixer, y, z).astype(u.dtype)
    return dense(mixer['out_proj'], heads.reshape(*u.shape[:2], -1)), state, heads


def project(cfg: SsmConfig, mixer: dict, u: Array) -> tuple[Array, Array, Array]:
    """u [B, S, d] -> z [B, S, HP], the convolution's inputs [B, S, ch], dt after softplus [B, S, H], all wide."""
    z, x, b, c, dt = cfg.parts
    z, raw, dt = jnp.split(_wide(dense(mixer['in_proj'], u)), (z, z + x + b + c), axis=-1)
    return z, raw, jax.nn.softplus(dt + mixer['dt_bias'])


def convolve(cfg: SsmConfig, mixer: dict, raw: Array, before: Array, documents: Array | None = None
             ) -> tuple[Array, Array, Array]:
    """raw [B, S, ch] behind `before` [B, W-1, ch] -> x [B, S, G, P], B [B, S, G, N], C [B, S, H, N].

    documents [B, S]: a token sees inputs of its own document only (then `before` belongs to none of them)."""
    size, taps, kernel = raw.shape[1], cfg.conv_width, mixer['conv']['kernel']
    joined = jnp.concatenate([before, raw], axis=1)
    v = mixer['conv']['bias']
    for i in range(taps):
        back = taps - 1 - i
        column = joined[:, i:i + size]
        if documents is not None and back:
            same = documents[:, back:] == documents[:, :-back]
            column = jnp.where(jnp.pad(same, ((0, 0), (min(back, size), 0)))[..., None], column, 0)
        v = v + kernel[i] * column
    _, x, b, _, _ = cfg.parts
    x, B, C = jnp.split(jax.nn.silu(v), (x, x + b), axis=-1)
    return tuple(a.reshape(*a.shape[:2], n, -1)
                 for a, n in ((x, cfg.num_groups), (B, cfg.num_groups), (C, cfg.num_heads)))


def gate(cfg: SsmConfig, mixer: dict, y: Array, z: Array) -> Array:
    """y [B, S, H, P], z [B, S, HP] -> what the output projection reads; the norm is behind the gate, over each head."""
    y = y * jax.nn.silu(z).reshape(y.shape)
    if not cfg.gated_norm:
        return y
    scale = mixer['norm']['scale'].reshape(y.shape[2:])
    return y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + cfg.norm_eps) * scale


def _whole(cfg, mixer, raw, dt, valid, segments, form):
    empty = jnp.zeros((raw.shape[0], cfg.conv_width - 1, raw.shape[2]), raw.dtype)
    resets = documents = None
    if segments is not None:
        resets = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        documents = jnp.cumsum(resets, axis=1)
    x, B, C = convolve(cfg, mixer, raw, empty, documents)
    if valid is not None:
        dt = jnp.where(valid[..., None], dt, 0)
    return ssd(by_head(x, cfg.num_heads), dt, -jnp.exp(_wide(mixer['A_log'])), B, C, mixer['D'], form=form,
               chunk=cfg.chunk, resets=resets)[0]


def _prompt(cfg, mixer, raw, dt, state, pos, last, form):
    """All of the block but what is behind `last` goes into state and tail, after what the log held."""
    state = caches.replay(state, pos)
    x, B, C = convolve(cfg, mixer, raw, state.tail)
    dt = jnp.where((jnp.arange(raw.shape[1]) <= last[:, None])[..., None], dt, 0)
    y, new = ssd(by_head(x, cfg.num_heads), dt, -jnp.exp(_wide(mixer['A_log'])), B, C, mixer['D'], state.state,
                 form=form, chunk=cfg.chunk)
    tail = caches.window_from(jnp.concatenate([state.tail, raw], axis=1), last + 1, state.tail.shape[1])
    return y, state.replace(state=new.astype(state.state.dtype), tail=tail.astype(state.tail.dtype), at=pos + last + 1)


def _block(cfg, mixer, raw, dt, state, pos):
    """The block into the log, and what its tokens read of state and log: no state in between is ever made."""
    log, size, slots = state.log, raw.shape[1], state.log.dt.shape[1]
    # Where the block begins in the log: above 0 behind tokens that are not committed yet. A block of the whole log
    # begins it, and is the new log.
    first = None if size == slots else pos - state.at
    put = lambda old, new: new.astype(old.dtype) if first is None else _put(old, new, first)
    conv = put(log.conv, raw)
    before = state.tail
    if first is not None:
        before = caches.window_from(jnp.concatenate([state.tail, conv], axis=1), first, state.tail.shape[1])
    x, B, C = convolve(cfg, mixer, raw, before)
    la = dt * -jnp.exp(_wide(mixer['A_log']))
    log = SsmLog(put(log.x, x), put(log.B, B), put(log.dt, dt), put(log.la, la), conv)
    y = _read(state.state, log, C, first) + mixer['D'][:, None] * by_head(x, cfg.num_heads)
    return y, state.replace(log=log)


def _read(state: Array, log: SsmLog, C: Array, first: Array | None) -> Array:
    """S_t C_t [B, S, H, P] of the tokens in log slots first[b].. (None: all of them), whose C is [B, S, H, N]. state:
    the one before slot 0."""
    batch, size, heads, _ = C.shape
    slots = jnp.arange(log.dt.shape[1])
    at = jnp.arange(size) + (jnp.zeros((batch, 1), int) if first is None else first[:, None])
    u, B, la = caches.held_inputs(log, slots <= at[:, -1:], heads)  # what is behind the block may hold anything
    total = jnp.cumsum(la, axis=1)  # [B, R, H]
    here = total if first is None else jnp.take_along_axis(total, at[..., None], axis=1)  # [B, S, H]
    causal = (slots <= at[..., None])[..., None]  # [B, S, R, 1]
    decays = jnp.exp(jnp.where(causal, here[:, :, None] - total[:, None], -jnp.inf))
    grouped = C.reshape(batch, size, B.shape[2], -1, C.shape[-1])
    scores = jnp.einsum('bigrn,bjgn->bijgr', grouped, B).reshape(decays.shape)
    y = jnp.einsum('bijh,bjhp->bihp', decays * scores, u)
    return y + jnp.exp(here)[..., None] * jnp.einsum('bhpn,bihn->bihp', state, C)


def _put(buffer: Array, new: Array, first: Array) -> Array:
    rows, slots = jnp.arange(new.shape[0])[:, None], first[:, None] + jnp.arange(new.shape[1])
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode='drop')


def _wide(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))
