"""The decode loop: prefill once, then rounds of draft, forward, verify, commit, in one jitted while_loop.

Prompts are right-padded to a power-of-two bucket and the cache to a bucket of slots, so one compilation
serves every prompt of a bucket. The state is donated: the cache is updated in place.
`on_tokens` streams: one round is jitted instead of the loop, and Python sees each round's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from backbone import cache as caches
from backbone.contract import Drafter, Output, Target
from backbone.errors import RequestError
from backbone.sampling import GREEDY, Sampling, choose, split
from harness.verify import verify

Array = jax.Array
SLOT_BUCKET = 64  # cache capacities are multiples of this


@struct.dataclass
class DecodeState:
    """Everything that changes between rounds. B rows, K drafted tokens.

    rng: one key, or one a row [B]. limit [B]: slots a row may fill. finished [B]. rounds [B]: target passes a row
    took part in. drafted, accepted [K+1]: row-rounds by draft length, and by drafts kept.
    """

    cache: caches.Cache
    drafter: Any
    rng: Array
    limit: Array
    finished: Array
    rounds: Array
    drafted: Array
    accepted: Array


@dataclasses.dataclass(frozen=True)
class Generation:
    """tokens: new ids a row, a stop token included. Times in seconds.

    accepted_hist[i]: row-rounds that kept i drafts; drafted_hist[i]: that proposed i. `warm_up` first to
    keep compilation out of the times.
    """

    tokens: list[list[int]]
    rounds: np.ndarray
    accepted_hist: np.ndarray
    drafted_hist: np.ndarray
    prefill_s: float
    decode_s: float

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens committed a round and row, bonus included: plain decoding is 1.00."""
        rounds = int(self.accepted_hist.sum())
        if rounds == 0:
            return 1.0
        return float((self.accepted_hist * (1 + np.arange(len(self.accepted_hist)))).sum() / rounds)

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: the first token of each row belongs to prefill."""
        return (self.num_tokens - len(self.tokens)) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def acceptance_by_position(self) -> np.ndarray:
        """[K]: of the rounds that proposed a draft at position i, the share that kept it."""
        kept = self.accepted_hist[::-1].cumsum()[::-1][1:]
        proposed = self.drafted_hist[::-1].cumsum()[::-1][1:]
        return np.divide(kept, proposed, out=np.zeros(len(kept)), where=proposed > 0)


def bucket(n: int, smallest: int = 16) -> int:
    """The power of two a prompt of n tokens is padded to."""
    return max(smallest, 1 << (n - 1).bit_length())


def capacity_for(prompt: int, max_new_tokens: int, max_seq_len: int) -> int:
    """Cache slots for a padded prompt and its continuation, never more than the model's context."""
    slots = -(-(prompt + max_new_tokens) // SLOT_BUCKET) * SLOT_BUCKET
    return min(slots, max_seq_len)


def check_request(target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Errors: RequestError names the row of an empty prompt, an id outside the vocabulary, a request too long."""
    if not prompts:
        raise RequestError('no prompt given')
    if max_new_tokens < 1:
        raise RequestError(f'max_new_tokens must be at least 1, got {max_new_tokens}')
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise RequestError(f'prompt {row} is empty')
        if min(prompt) < 0 or max(prompt) >= target.vocab_size:
            raise RequestError(f'prompt {row} holds a token id outside 0..{target.vocab_size - 1}')
        if len(prompt) + max_new_tokens > target.max_seq_len:
            raise RequestError(f'prompt {row}: {len(prompt)} tokens + {max_new_tokens} new ones exceed '
                               f'the context of {target.max_seq_len}')


def generate(target: Target, drafter: Drafter, params: Any, prompts: Sequence[Sequence[int]], *,
             max_new_tokens: int, sampling: Sampling = GREEDY, stop_tokens: Sequence[int] = (), seed: int | Array = 0,
             on_tokens: Callable[[int, list[int]], None] | None = None,
             on_state: Callable[[DecodeState], None] | None = None) -> Generation:
    """Continues every prompt by up to max_new_tokens ids, or to the first stop token (kept).

    params: {'base': ...} and what the drafter needs. on_tokens(row, ids) streams each round.
    on_state(state): sees the state after the last round, for logs that a target keeps in its cache.
    seed: an integer, or one key a row [B]: then what a row draws does not depend on the rows beside it.
    Errors: RequestError, before anything is compiled.
    """
    request = prepare(target, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens)
    if hasattr(target, 'host_loop'):
        return _by_host(target, drafter, params, prompts, max_new_tokens, sampling, stop_tokens, seed, on_tokens)
    begin = time.perf_counter()
    state = start(target, drafter, params, request, seed)
    middle = time.perf_counter()
    if on_tokens is None:
        state = decode(target, drafter, params, state, **request.rounds)
    else:
        state = _stream(target, drafter, params, state, request, on_tokens)
    jax.block_until_ready(state)
    end = time.perf_counter()
    if on_state is not None:
        on_state(state)

    ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
    new = [ids[row, n:pos[row] + 1].tolist() for row, n in enumerate(request.lengths)]
    return Generation(new, np.asarray(state.rounds), np.asarray(state.accepted), np.asarray(state.drafted),
                      middle - begin, end - middle)


def _by_host(target, drafter, params, prompts, max_new_tokens, sampling, stop_tokens, seed, on_tokens) -> Generation:
    if drafter.block:
        raise RequestError(f'{type(drafter).__name__} drafts for the jitted loop, {type(target).__name__} decodes '
                           'outside of it')
    out = target.host_loop(params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens,
                           seed=seed, on_tokens=on_tokens)
    rounds = np.array([len(ids) - 1 for ids in out.tokens])
    alone = rounds.sum(keepdims=True)
    return Generation(out.tokens, rounds, alone, alone, out.prefill_s, out.decode_s)


def warm_up(target: Target, drafter: Drafter, params: Any, prompts: Sequence[Sequence[int]], *,
            max_new_tokens: int, sampling: Sampling = GREEDY, stop_tokens: Sequence[int] = (),
            stream: bool = False) -> float:
    """Compiles what the same call of `generate` will run, and runs one round of it. Returns seconds."""
    if hasattr(target, 'host_loop'):
        out = generate(target, drafter, params, prompts, max_new_tokens=min(2, max_new_tokens), sampling=sampling)
        return out.prefill_s + out.decode_s
    request = prepare(target, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens)
    request = dataclasses.replace(request, max_new_tokens=min(2, max_new_tokens))  # the capacity stays
    begin = time.perf_counter()
    state = start(target, drafter, params, request)
    jax.block_until_ready((decode_one if stream else decode)(target, drafter, params, state, **request.rounds))
    return time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts padded to their bucket [B, P], their lengths [B], and what the programs are compiled for.

    capacity: slots of the cache. rounds: the static arguments of `decode` and `decode_one`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: int
    capacity: int
    rounds: dict[str, Any]


def prepare(target: Target, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling = GREEDY,
            stop_tokens: Sequence[int] = ()) -> Request:
    """Errors: RequestError, as `check_request`."""
    check_request(target, prompts, max_new_tokens)
    lengths = np.array([len(p) for p in prompts], np.int32)
    size = min(bucket(int(lengths.max())), target.max_seq_len)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = prompt
    rounds = {'sampling': sampling, 'stops': tuple(sorted({int(t) for t in stop_tokens}))}
    return Request(tokens, lengths, max_new_tokens, capacity_for(size, max_new_tokens, target.max_seq_len), rounds)


def start(target: Target, drafter: Drafter, params: Any, request: Request, seed: int | Array = 0) -> DecodeState:
    """The state after the prompts, ready for the first round. seed: as in `generate`."""
    rng = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    limit = request.lengths + request.max_new_tokens
    return jax.block_until_ready(prefill(target, drafter, params, request.tokens, request.lengths, limit, rng,
                                         capacity=request.capacity, **request.rounds))


_STATIC = ('target', 'drafter', 'sampling', 'stops')


def prefill(target: Target, drafter: Drafter, params: Any, tokens: Array, lengths: Array, limit: Array, rng: Array, *,
            capacity: int, sampling: Sampling, stops: tuple[int, ...]) -> DecodeState:
    """Runs prompts [B, P] of lengths [B] and chooses each row's first new token. limit [B]: total ids a row."""
    batch = tokens.shape[0]
    cache = target.init_cache(batch, capacity, drafter.block)
    output = run_prompt(target, drafter.needs, params, tokens, cache, lengths)
    state = drafter.init_state(batch, capacity)
    return _first_state(drafter, params, output.cache, output.replace(cache=None), state, lengths, limit, rng,
                        sampling, stops)


@functools.partial(jax.jit, static_argnames=('target', 'taps'), donate_argnames='cache')
def run_prompt(target: Target, taps: tuple[str, ...], params: Any, tokens: Array, cache: caches.Cache,
               lengths: Array) -> Output:
    """The target's pass over the prompts, with the logits of their last tokens. One program for all drafters."""
    return target.forward(params, tokens, cache, taps=taps, logits_at=lengths - 1)


@functools.partial(jax.jit, static_argnames=('drafter', 'sampling', 'stops'), donate_argnames=('cache', 'state'))
def _first_state(drafter: Drafter, params: Any, cache: caches.Cache, output: Output, state: Any, lengths: Array,
                 limit: Array, rng: Array, sampling: Sampling, stops: tuple[int, ...]) -> DecodeState:
    rng, first_rng = split(rng)
    first = choose(output.logits[:, 0], first_rng, sampling)
    cache = caches.commit(cache, lengths - 1, first)
    state = drafter.prefill(params, state, output.replace(cache=cache), lengths - 1)
    finished = _is_stop(first, stops) | (lengths + 1 >= limit)
    zeros = jnp.zeros((drafter.block + 1,), jnp.int32)
    return DecodeState(cache, state, rng, limit, finished, jnp.zeros_like(lengths), zeros, zeros)


def decode_round(target: Target, drafter: Drafter, params: Any, s: DecodeState, sampling: Sampling,
                 stops: tuple[int, ...]) -> DecodeState:
    """One round for every row; a finished row keeps its cache position and its tokens."""
    rng, draft_rng, verify_rng = split(s.rng, 3)
    draft, cache, state = drafter.draft(params, s.cache, s.drafter, draft_rng, sampling)
    block = jnp.concatenate([cache.pending[:, None], draft.tokens], axis=1)
    output = target.forward(params, block, cache, resume=draft.resume, taps=drafter.needs)
    accepted = verify(output.logits, draft, verify_rng, sampling)
    n, next_token, finished = _cut(accepted.n, accepted.next_token, draft.tokens, cache.pos, s, stops)
    cache = caches.commit(output.cache, n, next_token)
    state = drafter.commit(params, state, output.replace(cache=cache), n)
    live = (~s.finished).astype(jnp.int32)
    return DecodeState(cache, state, rng, s.limit, finished, s.rounds + live,
                       s.drafted.at[draft.length].add(live), s.accepted.at[jnp.maximum(n, 0)].add(live))


def _cut(n, next_token, drafted, pos, s: DecodeState, stops):
    """Ends a row inside its block: at the first stop token, or where its limit is reached.

    Keeping j drafts and making draft j the next token commits the same ids as stopping after it.
    """
    block = drafted.shape[1]
    chain = jnp.concatenate([drafted, next_token[:, None]], axis=1)
    chain = chain.at[jnp.arange(len(n)), n].set(next_token)  # committed ids are chain[:n+1]
    keep = jnp.minimum(n, s.limit - pos - 2)  # ids after this round: pos + 1 (pending) + n + 1 <= limit
    hits = _is_stop(chain, stops) & (jnp.arange(block + 1) <= keep[:, None])
    stopped = hits.any(1)
    keep = jnp.where(stopped, hits.argmax(1), keep)
    next_token = jnp.take_along_axis(chain, jnp.maximum(keep, 0)[:, None], axis=1)[:, 0]
    finished = s.finished | stopped | (pos + keep + 2 >= s.limit)
    return jnp.where(s.finished, -1, keep), next_token, finished


def _is_stop(tokens: Array, stops: tuple[int, ...]) -> Array:
    return jnp.isin(tokens, jnp.array(stops, jnp.int32)) if stops else jnp.zeros(tokens.shape, bool)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames='state')
def decode(target: Target, drafter: Drafter, params: Any, state: DecodeState, *, sampling: Sampling,
           stops: tuple[int, ...]) -> DecodeState:
    """Rounds until every row is finished."""
    return jax.lax.while_loop(lambda s: ~s.finished.all(),
                              lambda s: decode_round(target, drafter, params, s, sampling, stops), state)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames='state')
def decode_one(target: Target, drafter: Drafter, params: Any, state: DecodeState, *, sampling: Sampling,
               stops: tuple[int, ...]) -> DecodeState:
    """A single round, for streaming and for looking at the state between rounds."""
    return decode_round(target, drafter, params, state, sampling, stops)


def _stream(target, drafter, params, state, request, on_tokens):
    seen = np.array(request.lengths)
    while True:
        ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
        for row in range(len(seen)):
            if pos[row] + 1 > seen[row]:
                on_tokens(row, ids[row, seen[row]:pos[row] + 1].tolist())
        seen = pos + 1
        if np.asarray(state.finished).all():
            return state
        state = decode_one(target, drafter, params, state, **request.rounds)
