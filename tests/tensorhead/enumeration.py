"""The exact law of what speculative decoding emits, through the code that drafts and the code that verifies.

The target is a table: logits for every prefix, so nothing about it is approximate, and a hidden state for every
prefix, which is all a TensorHead drafter sees. Only the sources of chance are replaced: what is drawn is prescribed,
one row for every possible draft, and the probabilities it would have been drawn with are read off the calls. How likely
a draft is to be kept is the largest uniform number with which the verifier still keeps it, found by bisection, not by a
formula.
"""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from backbone import cache as caches
from backbone.sampling import Sampling, law
from harness import verify as verifier
from tensorhead import drafter as drafting


@dataclasses.dataclass(frozen=True)
class World:
    """logits [prefixes, V] and e [prefixes, d] of every sequence of up to `length` tokens, see `code`."""

    vocab: int
    logits: np.ndarray
    e: np.ndarray

    def code(self, prefix) -> int:
        """Shorter prefixes come first, then in the order of their digits."""
        before = sum(self.vocab ** i for i in range(len(prefix)))
        return before + sum(t * self.vocab ** i for i, t in enumerate(reversed(prefix)))


def world(vocab: int, hidden: int, length: int, seed: int = 0, spread: float = 1.5) -> World:
    rng = np.random.default_rng(seed)
    prefixes = sum(vocab ** i for i in range(length + 1))
    return World(vocab, spread * rng.normal(size=(prefixes, vocab)), rng.normal(size=(prefixes, hidden)))


def base_law(w: World, steps: int, sampling: Sampling) -> np.ndarray:
    """Of the first `steps` tokens, [V ** steps], token by token from the target."""
    p = np.asarray(law(w.logits, sampling))
    return np.array([np.prod([p[w.code(s[:i]), s[i]] for i in range(steps)])
                     for s in itertools.product(range(w.vocab), repeat=steps)])


def propose(static, params, cache, state, forced):
    """The drafter as it is, made to draw forced [rows, K] -> [(Draft, chance of each row's draft [rows])].

    More than one where a hidden choice comes before: their chances add up.
    """
    (drafter, sampling), chance = static, []

    def draw(probs, s):  # of one position [rows, W], or of all [rows, K, W]
        tokens = forced if probs.ndim == 3 else forced[:, s]
        one = jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0] / probs.sum(-1)
        chance.extend(jnp.moveaxis(one.reshape(len(forced), -1), 1, 0))
        return tokens

    with mock.patch.object(drafting, 'draw', draw), mock.patch.object(drafting, 'fold_in', lambda rng, s: s):
        draft, _, _ = drafter.draft(params, cache, state, None, sampling)
    assert len(chance) == forced.shape[1]
    return [(draft, jnp.stack(chance).prod(0))]


def verify(sampling, logits, draft, u):
    """harness.verify with prescribed uniform numbers u [rows, K] -> kept [rows], law of the next token [rows, V]."""
    laws = []

    def draw(probs, rng):
        laws.append(probs / probs.sum(-1, keepdims=True))
        return jnp.zeros(probs.shape[0], jnp.int32)

    with mock.patch.object(verifier, 'draw', draw), mock.patch.object(verifier, 'uniform', lambda *_: u), \
            mock.patch.object(verifier, 'split', lambda rng: (rng, rng)):
        accepted = verifier.verify(logits, draft, None, sampling)
    return accepted.n, laws[0]


# One compilation serves every test with the same function and shapes.
compiled = functools.cache(functools.partial(jax.jit, static_argnums=0))


def thresholds(check, logits, draft, sampling) -> np.ndarray:
    """t [rows, K]: draft s is kept where u_s < t_s, given that those before it are."""
    rows, block = draft.tokens.shape
    found = np.zeros((rows, block))
    for s in range(block):
        others = np.arange(block) != s
        keeps = lambda u: np.asarray(check(sampling, logits, draft, np.where(others, 0.0, u[:, None]))[0]) > s
        low, high = np.zeros(rows), np.ones(rows)
        low = np.where(keeps(np.full(rows, 1 - 2.0 ** -53)), high, low)
        for _ in range(55):
            middle = (low + high) / 2
            kept = keeps(middle)
            low, high = np.where(kept, middle, low), np.where(kept, high, middle)
        found[:, s] = low
    return found


def emitted_law(w: World, drafter, params, steps: int, sampling: Sampling, propose=propose, check=verify):
    """The law of the first `steps` tokens emitted [V ** steps]; and what it was made of, for each branch of `propose`:
    tokens [rows, K], the chance of a row, [rows, K] of each of its drafts being kept.

    Rows are (context, draft): every context that can arise before `steps` tokens are out, every draft there is.
    """
    block, words = drafter.block, drafter.cfg.words
    contexts = [c for size in range(1, steps) for c in itertools.product(range(w.vocab), repeat=size)]
    drafts = list(itertools.product(range(words), repeat=block))
    rows = list(itertools.product(contexts, drafts))
    forced = jnp.array([d for _, d in rows], jnp.int32)
    pending = jnp.array([[c[-1], 0] for c, _ in rows], jnp.int32)
    cache = caches.Cache(jnp.zeros(len(rows), jnp.int32), pending, ())
    state = {'e': jnp.array([w.e[w.code(c[:-1])] for c, _ in rows])}
    branches = compiled(propose)((drafter, sampling), params, cache, state, forced)
    check = compiled(check)

    out = {c: 0.0 for size in range(1, steps + 1) for c in itertools.product(range(w.vocab), repeat=size)}
    first = np.asarray(law(w.logits[0], sampling))
    out |= {(t,): first[t] for t in range(w.vocab)}
    results = []
    for draft, chance in branches:
        tokens = np.asarray(draft.tokens)
        blocks = [[w.code((*c, *d[:i])) for i in range(block + 1)]
                  for (c, _), d in zip(rows, tokens.tolist(), strict=True)]
        logits = jnp.array(w.logits[np.array(blocks)])
        kept = thresholds(check, logits, draft, sampling)
        ends = [jax.tree.map(np.asarray, check(sampling, logits, draft, _pattern(kept, m))) for m in range(block + 1)]
        results.append((tokens, np.asarray(chance), kept, ends))
    for i, (context, _) in enumerate(rows):  # shorter contexts come first: their mass is complete
        for tokens, chance, kept, ends in results:
            for m, (n, next_law) in enumerate(ends):
                mass = out[context] * chance[i] * kept[i, :m].prod() * (1 - kept[i, m] if m < block else 1)
                if mass > 0:
                    assert n[i] == m
                    for t in range(w.vocab):
                        longer = (*context, *tokens[i, :m].tolist(), t)[:steps]
                        out[longer] += mass * float(next_law[i, t])
    law_out = np.array([out[s] for s in itertools.product(range(w.vocab), repeat=steps)])
    return law_out, [result[:3] for result in results]


def _pattern(kept: np.ndarray, m: int) -> np.ndarray:
    """Uniform numbers that keep m drafts: 0 keeps, 1 does not."""
    return np.where(np.arange(kept.shape[1]) < m, 0.0, np.ones_like(kept))


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)
