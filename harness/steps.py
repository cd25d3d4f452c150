"""Times the pieces of a decoding round by themselves: a forward of k tokens, a draft, a verification.

Each piece runs `trips` times inside one jitted loop with a donated cache, as decoding runs it: a Python call an
iteration would add its dispatch, which is longer than a prompt lookup. Every iteration feeds on the one before,
so that the compiler can neither drop nor hoist the work.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backbone.cache import Cache
from backbone.contract import Drafter, Resume, Target
from backbone.model import PlainTarget
from backbone.sampling import GREEDY
from harness.roofline import cache_scalars, matmul_bytes

TARGET_S = 0.1  # a measurement lasts about this long
MAX_TRIPS = 2000


class Timer:
    """Seconds of one iteration of loop(trips, carry) -> carry; the carry is donated and the last one kept."""

    def __init__(self, loop: Callable[[jax.Array, Any], Any], carry: Any):
        self._loop, self.carry, self.trips = loop, carry, 1
        self._time()  # compiles
        for _ in range(3):  # the first calls after compiling are slow, and would settle on too few trips
            self.trips = int(min(max(TARGET_S / self._time(), 2), MAX_TRIPS))

    def _time(self) -> float:
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self._loop(jnp.int32(self.trips), self.carry))
        return (time.perf_counter() - start) / self.trips

    def __call__(self) -> float:
        return self._time()


def copy(tree: Any) -> Any:
    """Fresh buffers, because a timer donates its own."""
    return jax.tree.map(jnp.copy, tree)


def forward_timer(target: Target, params: Any, cache: Cache, tokens: jax.Array, resume: Resume | None = None,
                  taps: tuple[str, ...] = ()) -> Timer:
    """One target pass over tokens [B, S] at cache.pos, logits of every position and their argmax included."""

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(trips, carry, params, hidden):
        def body(_, carry):
            cache, tokens, nudge = carry
            at = None if hidden is None else Resume(hidden + nudge, resume.layer)
            output = target.forward(params, tokens, cache, resume=at, taps=taps)
            best = output.logits.argmax(-1).astype(tokens.dtype)
            return output.cache, best, (0 * output.logits[0, 0, 0]).astype(nudge.dtype)
        return jax.lax.fori_loop(0, trips, body, carry)

    hidden = None if resume is None else resume.hidden
    nudge = jnp.zeros((), jnp.float32 if hidden is None else hidden.dtype)
    return Timer(lambda trips, carry: loop(trips, carry, params, hidden), (copy(cache), copy(tokens), nudge))


def draft_timer(drafter: Drafter, params: Any, cache: Cache, state: Any) -> Timer:
    """One draft at cache.pos. The draft becomes the next pending token, and moves the drafter's state by nothing that a
    compiler could know to be nothing: what depends on the state alone is work of every draft, and stays in the loop.

    Its carry is (cache, state, draft): something to verify.
    """
    rng = jax.random.key(0)
    shape = jax.eval_shape(lambda p, c, s: drafter.draft(p, c, s, rng, GREEDY)[0], params, cache, state)
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(trips, carry, params):
        def body(i, carry):
            cache, state, draft = carry
            rows = jnp.arange(cache.pos.shape[0])
            cache = cache.replace(tokens=cache.tokens.at[rows, cache.pos].set(draft.tokens[:, 0]))
            nudge = jnp.minimum(draft.tokens[0, 0], 0)  # ids are not negative
            vector = lambda a: a.ndim <= 2 and jnp.issubdtype(a.dtype, jnp.floating)  # not a cache, which is large
            state = jax.tree.map(lambda a: a + nudge.astype(a.dtype) if vector(a) else a, state)
            draft, cache, state = drafter.draft(params, cache, state, jax.random.fold_in(rng, i), GREEDY)
            return cache, state, draft
        return jax.lax.fori_loop(0, trips, body, carry)

    return Timer(lambda trips, carry: loop(trips, carry, params), (copy(cache), copy(state), empty))


def kv_bytes(target: Target, cache: Cache) -> tuple[float, float | None]:
    """(bytes a row's cache holds for each token it has room for, the same by formula where the target has one).

    Counted on the cache's own leaves, spare room of rings included. A target that is not the plain model may have
    `kv_bytes_formula(tokens) -> bytes` of a row with so many tokens.
    """
    batch, room = cache.tokens.shape[0], cache.tokens.shape[1] - 1
    measured = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) / batch / room
    if isinstance(target, PlainTarget):
        return measured, cache_scalars(target.cfg) * float(jnp.dtype(target.cache_dtype).itemsize)
    formula = getattr(target, 'kv_bytes_formula', None)
    return measured, formula(room) / room if formula else None


def round_bytes(target: Target, drafter: Drafter, params: Any, cache: Cache, state: Any) -> tuple[float, float]:
    """(bytes read by one draft, by its verification), counted on the traced functions; nothing runs."""
    rng = jax.random.key(0)

    def draft_fn(params, cache, state):
        return drafter.draft(params, cache, state, rng, GREEDY)

    draft, drafted_cache, _ = jax.eval_shape(draft_fn, params, cache, state)

    def verify_fn(params, cache, draft):
        block = jnp.concatenate([cache.pending[:, None], draft.tokens], axis=1)
        return target.forward(params, block, cache, resume=draft.resume, taps=drafter.needs).logits

    return matmul_bytes(draft_fn, params, cache, state), matmul_bytes(verify_fn, params, drafted_cache, draft)
