"""Text given, one token at a time: the measure of a target that approximates when it decodes and not when it reads.

    dense prefill of the first tokens -> the rest in single steps, each token given -> log-probabilities of those alone

A target whose prompts and blocks are exact would score as exact in one pass over a text. Here it works as when it
generates, and sees at each step only what came before; of a question's choice the last token of the question is decoded
already, so that no scored token comes from the exact pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from backbone import cache as caches
from backbone.contract import Target
from backbone.errors import RequestError
from harness import decode
from harness.scoring import Row, Score, Scorer

Array = jax.Array


@functools.partial(jax.jit, static_argnames='target')
def follow(target: Target, params: Any, cache: caches.Cache, given: Array) -> tuple[caches.Cache, Array, Array]:
    """given [B, steps], behind what the cache holds and has pending -> (cache, log p of each [B, steps], what was
    likeliest in its place [B, steps])."""
    def step(cache, following):
        output = target.forward(params, cache.pending[:, None], cache)
        logits = output.logits[:, 0].astype(jnp.promote_types(output.logits.dtype, jnp.float32))
        gold = jnp.take_along_axis(logits, following[:, None], axis=1)[:, 0]
        said = gold - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1)
        return caches.commit(output.cache, jnp.zeros_like(following), following), said

    cache, (logprobs, choices) = jax.lax.scan(step, cache, given.T)
    return cache, logprobs.T, choices.T


@functools.partial(jax.jit, static_argnames=('target', 'prompt', 'steps'))
def forced(target: Target, params: Any, tokens: Array, starts: Array, prompt: int, steps: int
           ) -> tuple[caches.Cache, Array, Array]:
    """tokens [B, S], starts [B] in 1..prompt+1 -> (cache, log p of tokens[b, starts[b]:][:steps] [B, steps], what was
    likeliest in the place of each [B, steps]).

    The first starts[b] - 1 tokens are the prompt, read in one pass `prompt` tokens wide; all others are single steps.
    What lies past the end of a row is padding, and what is said of it means nothing.
    """
    batch, size = tokens.shape
    padded = jnp.pad(tokens, ((0, 0), (0, prompt + steps + 1)))
    given = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, steps))(padded, starts)
    head = jnp.where(jnp.arange(prompt) < starts[:, None] - 1, tokens[:, :prompt], 0)  # nothing that is scored
    cache = target.init_cache(batch, size + steps, 0)
    cache = target.forward(params, head, cache, logits_at=jnp.maximum(starts - 2, 0)).cache
    cache = caches.write_tokens(cache, tokens)
    first = jnp.take_along_axis(tokens, starts[:, None] - 1, axis=1)[:, 0]
    return follow(target, params, caches.commit(cache, starts - 2, first), given)


class StepScorer(Scorer):
    """A Scorer for targets that approximate: the same questions (harness/evaluate.py), scored as above.

    params: what `target` takes, packed if it is for packed ones."""

    def score(self, rows: Sequence[Row], name: str = 'scoring') -> list[Score]:
        """As Scorer.score. Rows of like prompts and like continuations share a call."""
        calls: dict[tuple[int, int], list[int]] = {}
        for n, row in enumerate(rows):
            if not 1 <= row.start < len(row.tokens) <= self.max_length:
                raise RequestError(f'a row of {len(row.tokens)} tokens scored from {row.start} does not fit '
                                   f'the context of {self.max_length}')
            shape = decode.bucket(max(row.start - 1, 1), 16), decode.bucket(len(row.tokens) - row.start, 4)
            calls.setdefault(shape, []).append(n)
        scores: list[Any] = [None] * len(rows)
        with tqdm.tqdm(total=len(rows), desc=name, unit='row', disable=None if self.progress else True) as bar:
            for (prompt, steps), numbers in sorted(calls.items(), reverse=True):
                for first in range(0, len(numbers), self.batch_size):
                    chosen = numbers[first:first + self.batch_size]
                    self._call([rows[n] for n in chosen], chosen, prompt, steps, scores)
                    bar.update(len(chosen))
        return scores

    def _call(self, rows: list[Row], numbers: list[int], prompt: int, steps: int, scores: list) -> None:
        tokens = np.zeros((self.batch_size, prompt + steps + 1), np.int32)
        starts = np.ones(self.batch_size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, :len(row.tokens)], starts[i] = row.tokens, row.start
        found = forced(self.target, self.params, tokens, starts, prompt, steps)
        logprobs, choices = map(np.asarray, found[1:])
        for i, (n, row) in enumerate(zip(numbers, rows, strict=True)):
            said = np.array(row.tokens[row.start:])
            scores[n] = Score(logprobs[i, :len(said)], bool((choices[i, :len(said)] == said).all()))


def of(scorer: Scorer, target: Target, params: Any) -> StepScorer:
    """The questions and sizes of `scorer`, answered by another target."""
    fields = {f.name: getattr(scorer, f.name) for f in dataclasses.fields(scorer)}
    return StepScorer(**fields | {'target': target, 'params': params, 'decoder': None})
