"""The drafters every method is compared with. All are lossless: the verifier has the last word.

`Autoregressive` is plain decoding (block 0). `PromptLookup` copies from prompt and output. `Lookahead`
keeps Jacobi guesses and a pool of n-grams. `EarlyExit` runs the target's own first layers. `TwoModel`
runs a smaller model of the same vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone import cache as caches
from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.contract import DenseLaw, Draft, Output, Resume
from backbone.errors import ConfigError
from backbone.model import PlainTarget, cache_context, embed, finish, run_layers, unembed
from backbone.sampling import Sampling, draw, fold_in, law

Array = jax.Array


class Stateless:
    """What a drafter without parameters or memory of its own inherits."""

    needs: tuple[str, ...] = ()

    def init_params(self, rng: Array) -> dict:
        del rng
        return {}

    def init_state(self, batch: int, max_len: int) -> Any:
        del batch, max_len
        return ()

    def prefill(self, params: Any, state: Any, output: Output, n: Array) -> Any:
        return state

    def commit(self, params: Any, state: Any, output: Output, n: Array) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class Autoregressive(Stateless):
    """Plain decoding: an empty draft, one token a round."""

    block: int = 0

    def draft(self, params, cache: Cache, state, rng, sampling: Sampling):
        batch = cache.pos.shape[0]
        return Draft(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch,), jnp.int32)), cache, state


@dataclasses.dataclass(frozen=True)
class PromptLookup(Stateless):
    """Copies what followed the latest earlier occurrence of the current n-gram (Saxena, 2023).

    The longest match of min_ngram..max_ngram tokens wins, then the latest. A match that runs into the
    present repeats its own period. No match: length 0, plain decoding this round.
    """

    block: int = 8
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self):
        if self.block < 1 or not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(f'PromptLookup needs block >= 1 and 1 <= min_ngram <= max_ngram, got {self}')

    def draft(self, params, cache: Cache, state, rng, sampling: Sampling):
        tokens, length = jax.vmap(self._lookup)(cache.tokens, cache.pos)
        return Draft(tokens, length), cache, state

    def _lookup(self, tokens: Array, pos: Array) -> tuple[Array, Array]:
        """tokens [C+1], pos: slot of the pending token -> draft [K], length."""
        slots = jnp.arange(tokens.shape[0])
        back = jnp.arange(self.max_ngram)
        recent = jnp.where(pos - back >= 0, tokens[pos - back], -1)
        at = slots[:, None] - back
        same = (tokens[at] == recent) & (at >= 0)  # [C+1, max_ngram], from the last token backwards
        matched = jnp.cumprod(same, axis=1).sum(1)
        matched = jnp.where((slots < pos) & (matched >= self.min_ngram), matched, 0)
        best = jnp.argmax(matched * tokens.shape[0] + slots * (matched > 0))
        period = jnp.maximum(pos - best, 1)
        draft = tokens[best + 1 + jnp.arange(self.block) % period]
        return draft, jnp.where(matched[best] > 0, self.block, 0)


@struct.dataclass
class NgramPool:
    """guesses [B, K]: Jacobi guesses for the slots after the pending one. grams [B, M, N], newest last."""

    guesses: Array
    grams: Array


@dataclasses.dataclass(frozen=True)
class Lookahead(Stateless):
    """Jacobi guesses and the n-grams they pass through (Fu et al., 2024), as a chain.

    Every pass gives the model's own next guess behind each drafted token; those runs enter a per-row pool,
    and the next draft is the pool's newest continuation of the pending token, then of what it ended on;
    where the pool knows nothing the Jacobi guesses stand in. The published form verifies several
    candidates beside its window under a tree mask; this one is a single chain in the same contract.
    """

    block: int = 6
    ngram: int = 4
    pool: int = 256

    def __post_init__(self):
        if not 2 <= self.ngram <= self.block + 1 or self.pool < 1:
            raise ConfigError(f'Lookahead needs 2 <= ngram <= block + 1 and pool >= 1, got {self}')

    def init_state(self, batch: int, max_len: int) -> NgramPool:
        return NgramPool(jnp.zeros((batch, self.block), jnp.int32),
                         jnp.full((batch, self.pool, self.ngram), -1, jnp.int32))

    def prefill(self, params, state: NgramPool, output: Output, n: Array) -> NgramPool:
        """The first guesses are the prompt's own last tokens: any will do."""
        at = jnp.maximum(output.cache.pos[:, None] - self.block + jnp.arange(self.block), 0)
        return state.replace(guesses=jnp.take_along_axis(output.cache.tokens, at, axis=1))

    def draft(self, params, cache: Cache, state: NgramPool, rng, sampling: Sampling):
        tokens = jax.vmap(self._chain)(state.grams, state.guesses, cache.pending)
        return Draft(tokens, jnp.full(tokens.shape[:1], self.block, jnp.int32)), cache, state

    def _chain(self, grams: Array, guesses: Array, pending: Array) -> Array:
        order = jnp.arange(self.pool)
        chain, last = guesses, pending
        for start in range(0, self.block, self.ngram - 1):
            hit = grams[:, 0] == last
            found = grams[jnp.argmax(jnp.where(hit, order + 1, 0)), 1:]
            stop = min(start + self.ngram - 1, self.block)
            part = jnp.where(hit.any(), found[:stop - start], chain[start:stop])
            chain, last = chain.at[start:stop].set(part), part[-1]
        return chain

    def commit(self, params, state: NgramPool, output: Output, n: Array) -> NgramPool:
        best = output.logits.argmax(-1).astype(jnp.int32)  # [B, K+1]: the guess after each block position
        return jax.vmap(self._learn)(state, output.tokens, best, n)

    def _learn(self, state: NgramPool, tokens: Array, best: Array, n: Array) -> NgramPool:
        width = self.ngram - 1
        starts = jnp.arange(self.block + 2 - width)  # positions with a whole run of guesses behind them
        runs = jnp.concatenate([tokens[starts][:, None], best[starts[:, None] + jnp.arange(width)]], axis=1)
        ahead = jnp.minimum(n + 1 + jnp.arange(self.block), self.block)
        grams = jnp.concatenate([state.grams, runs])[-self.pool:]
        live = n >= 0
        return NgramPool(jnp.where(live, best[ahead], state.guesses), jnp.where(live, grams, state.grams))


@dataclasses.dataclass(frozen=True)
class EarlyExit(Stateless):
    """Drafts with the target's first `layer` layers and its own norm and head, untrained.

    Verification resumes at `layer`: the drafted positions have run the layers below (LayerSkip's re-use,
    Elhoushi et al., 2024). One cache serves both.
    """

    cfg: ModelConfig
    layer: int
    block: int = 4

    def __post_init__(self):
        if not 1 <= self.layer < self.cfg.num_layers or self.block < 1:
            raise ConfigError(f'EarlyExit needs 1 <= layer < {self.cfg.num_layers} and block >= 1, '
                              f'got layer {self.layer}, block {self.block}')

    def draft(self, params, cache: Cache, state, rng, sampling: Sampling):
        cfg, base = self.cfg, params['base']

        def early(cache: Cache, token: Array, i) -> tuple[Cache, Array]:
            ctx = cache_context(cfg, caches.ahead(cache, i), 1)
            x = embed(cfg, base, token[:, None], ctx.positions)
            x, layers, _ = run_layers(cfg, base, x, cache.layers, ctx, hi=self.layer)
            return cache.replace(layers=layers), x[:, 0]

        def step(carry, i):
            cache, token = carry
            cache, hidden = early(cache, token, i)
            token, probs = _propose(unembed(cfg, base, finish(cfg, base, hidden)), fold_in(rng, i), sampling)
            return (cache, token), (hidden, token, probs)

        (cache, last), (hidden, tokens, probs) = jax.lax.scan(step, (cache, cache.pending), jnp.arange(self.block))
        cache, final = early(cache, last, self.block)
        hidden = jnp.concatenate([hidden, final[None]]).swapaxes(0, 1)
        return _chain_draft(tokens, probs, Resume(hidden, self.layer)), cache, state


@dataclasses.dataclass(frozen=True)
class TwoModel(Stateless):
    """Drafts with a smaller model of the same vocabulary (Leviathan et al., 2023): params['draft'].

    Its cache is this drafter's state and stays in step with the target's.
    """

    cfg: ModelConfig
    block: int = 4
    cache_dtype: str = 'float32'
    stacked: bool = True

    def _model(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype, self.stacked)

    def init_state(self, batch: int, max_len: int) -> Cache:
        return self._model().init_cache(batch, max_len, self.block)

    def prefill(self, params, state: Cache, output: Output, n: Array) -> Cache:
        seen = self._run(params, output.tokens, state)
        return self.commit(params, seen.cache, output, n)

    def _run(self, params, tokens: Array, cache: Cache) -> Output:
        last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
        return self._model().forward({'base': params['draft']}, tokens, cache, logits_at=last)

    def draft(self, params, cache: Cache, state: Cache, rng, sampling: Sampling):
        def step(carry, i):
            own, token = carry
            output = self._run(params, token[:, None], caches.ahead(own, i))
            token, probs = _propose(output.logits[:, 0], fold_in(rng, i), sampling)
            return (output.cache.replace(pos=own.pos), token), (token, probs)

        # One step more than the block: the last draft is run too, so its slot is there if all are kept.
        (state, _), (tokens, probs) = jax.lax.scan(step, (state, cache.pending), jnp.arange(self.block + 1))
        probs = None if probs is None else probs[:-1]
        return _chain_draft(tokens[:-1], probs), cache, state

    def commit(self, params, state: Cache, output: Output, n: Array) -> Cache:
        return caches.commit(state, n, output.cache.pending)


def _propose(logits: Array, rng: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """logits [B, V] -> drafted token [B] and the law it came from [B, V] (None when greedy)."""
    if sampling.greedy:
        return logits.argmax(-1).astype(jnp.int32), None
    probs = law(logits, sampling)
    return draw(probs, rng), probs


def _chain_draft(tokens: Array, probs: Array | None, resume: Resume | None = None) -> Draft:
    """Step-major tokens [K, B] and laws [K, B, V] -> a Draft of full length."""
    tokens = tokens.swapaxes(0, 1)
    length = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    if probs is None:
        return Draft(tokens, length, None, resume)
    probs = probs.swapaxes(0, 1)
    gold = jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]
    return Draft(tokens, length, DenseLaw(probs, gold), resume)
