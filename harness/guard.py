"""A guard over an approximate Target: now and then the exact model looks at the same token, and takes over if it must.

    each step, a row, with probability `share`:  does the reference choose the same token?
    once the answers speak against an agreement of `floor`:  read the committed tokens again with the reference, and go
    on with it alone

The evidence is a betting one, so that looking after every check costs nothing. With a agreements and b disagreements,
    E = integral over p in 0..floor of [p^a (1-p)^b] / [floor^a (1-floor)^b] dp / floor
is a product of fair or losing bets whenever the true agreement is at least `floor`, so it ever reaches 1/(1-confidence)
with probability at most 1 - confidence, however long the call (Ville's inequality). It is the confidence sequence of a
mixture (Robbins, 1970): `floor` has left it when E is so large. A Clopper-Pearson bound taken after every check would
fall back far more often than it says.

Everything is kept by slot in the cache and is a function of (seed, row, position): a step that is run again, or taken
back, changes nothing. It leaves the device once, in `log`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import betainc, betaln

from backbone import cache as caches
from backbone.branch import when
from backbone.contract import Output, Resume, Target
from backbone.errors import ConfigError
from backbone.sampling import uniform

Array = jax.Array
AGREED, DIFFERED = 1, 2
NEVER, BY_CHECKS = -1, -2  # in place of a slot to fall back at


@struct.dataclass
class GuardState:
    """The `layers` of a guarded cache. layers: the target's own. exact: the reference's, where the two have none in
    common, else (). rng [B]: a key a row. checked [B, C]: AGREED, DIFFERED or 0 (no check) by slot. fell [B]: the slot
    from which on the reference runs, NEVER while it does not. prompt [B]: tokens of the prompt."""

    layers: Any
    exact: Any
    rng: Array
    checked: Array
    fell: Array
    prompt: Array


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A Target that is `target` until its reference has to take over, row by row.

    share: of single steps (and of the first tokens of blocks) that are checked, in 0..1; 0 guards nothing. floor: the
    agreement that is asked for, in (0, 1]. confidence: 1 - the chance that a row falls back although it keeps it.
    min_checks: a row falls back no sooner.

    A target may let the reference run in its own cache: `full(params, tokens, cache, rows, taps=, logits_at=)` is the
    reference's pass on it, in which only `rows` [B] write. Then a check costs one full-depth step, and sees the
    token's own approximation, not what the cache has gathered. Without `full` the reference has a cache of its own
    beside, and a check reads the whole row again: dear, but it sees everything.

    What a check says does not change the token that is being chosen. Falling back at slot s means that slots 0..s-1 are
    read again; that is one pass over the cache's whole capacity.
    params['replay'] = {'fallback': [B]}, from `replay`: a row falls back at that slot, or NEVER, whatever its checks
    say; BY_CHECKS leaves it to them.
    """

    target: Any
    share: float = 0.05
    floor: float = 0.9
    confidence: float = 0.95
    min_checks: int = 4
    seed: int = 0
    exact: ClassVar[bool] = False

    def __post_init__(self):
        if getattr(self.target, 'exact', True) or self.target.reference is None:
            raise ConfigError(f'guard.target: {type(self.target).__name__} is exact or names no reference')
        if not 0 <= self.share <= 1:
            raise ConfigError(f'guard.share must be in 0..1, got {self.share}')
        for name in ('floor', 'confidence'):
            value = getattr(self, name)
            if not 0 < value <= 1 or (name == 'confidence' and value == 1):
                raise ConfigError(f'guard.{name} must be above 0 and {"below" if name == "confidence" else "at most"} '
                                  f'1, got {value}')
        if self.min_checks < 1:
            raise ConfigError(f'guard.min_checks must be at least 1, got {self.min_checks}')

    @property
    def reference(self) -> Target:
        return self.target.reference

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.target.max_seq_len

    @property
    def cfg(self) -> Any:
        return self.target.cfg

    @property
    def shares_cache(self) -> bool:
        return hasattr(self.target, 'full')

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        own = self.target.init_cache(batch, max_len, block)
        exact = () if self.shares_cache else self.reference.init_cache(batch, max_len, block).layers
        rng = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self.seed), row))(jnp.arange(batch))
        rows = lambda value: jnp.full((batch,), value, jnp.int32)
        capacity = own.tokens.shape[1] - 1
        checked = jnp.zeros((batch, capacity), jnp.int8)
        return own.replace(layers=GuardState(own.layers, exact, rng, checked, rows(NEVER), rows(0)))

    def forward(self, params: Any, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: dict[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the target's. Errors: its own; ConfigError for resume or masks, which a fallback could not honour."""
        if resume is not None or masks is not None:
            raise ConfigError('a guarded target takes no resume and no masks')
        if logits_at is not None:  # a prompt
            output = self.target.forward(params, tokens, _inner(cache), taps=taps, logits_at=logits_at)
            state = cache.layers.replace(layers=output.cache.layers, prompt=cache.pos + logits_at + 1)
            return output.replace(cache=output.cache.replace(layers=state))
        if self.share == 0 and 'fallback' not in params.get('replay', {}):
            output = self.target.forward(params, tokens, _inner(cache), taps=taps)
            return output.replace(cache=_outer(cache, output.cache, layers=output.cache.layers))
        falls = self._falls(params, cache)
        cache = when(falls.any(), lambda c: self._read_again(params, c, falls), cache)
        fell = jnp.where(falls, cache.pos, cache.layers.fell)
        fallen = fell >= 0
        if self.share > 0:
            keys = jax.vmap(jax.random.fold_in)(cache.layers.rng, cache.pos)
            drawn = (uniform(keys, fell.shape) < self.share) & ~fallen
            look = lambda c: (self._exact_choice(params, tokens, c[1], drawn), jax.lax.optimization_barrier(c[1]))
            exact, cache = when(drawn.any(), look, (jnp.zeros_like(fell), cache))  # carried: copied only to be checked

        def approximate(carry):
            output = self.target.forward(params, tokens, _inner(carry[1]), taps=taps)
            return (output.logits, output.taps), _outer(carry[1], output.cache, layers=output.cache.layers)

        shapes = jax.eval_shape(approximate, ((), cache))[0]
        said = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        said, cache = when(~fallen.all(), approximate, (said, cache))
        if self.share > 0:
            verdict = jnp.where(exact == said[0][:, 0].argmax(-1), AGREED, DIFFERED)
            checked = cache.layers.checked.at[jnp.arange(len(fell)), cache.pos].set(
                jnp.where(drawn, verdict, 0).astype(jnp.int8), mode='drop')
            cache = cache.replace(layers=cache.layers.replace(checked=checked))
        exactly = lambda c: self._exactly(params, tokens, c[1], fallen, taps, c[0])
        said, cache = when(fallen.any(), exactly, (said, cache))
        cache = caches.write_tokens(cache.replace(layers=cache.layers.replace(fell=fell)), tokens)
        return Output(tokens, said[0], cache, said[1])

    def counts(self, cache: caches.Cache) -> tuple[Array, Array]:
        """(agreements [B], disagreements [B]) so far, of tokens that were kept."""
        checked = cache.layers.checked
        kept = jnp.arange(checked.shape[1]) < cache.pos[:, None]
        return tuple(((checked == what) & kept).sum(1) for what in (AGREED, DIFFERED))

    def _falls(self, params: Any, cache: caches.Cache) -> Array:
        """[B]: rows that fall back before this step."""
        agreed, differed = self.counts(cache)
        falls = agreed + differed >= self.min_checks
        falls &= log_evidence(agreed, differed, self.floor) >= -np.log1p(-self.confidence)
        if 'fallback' in params.get('replay', {}):
            given = params['replay']['fallback']
            falls = jnp.where(given == BY_CHECKS, falls, cache.pos == given)
        return falls & (cache.layers.fell < 0)

    # --- the reference, in the target's cache or in its own -------------------------------------------------------

    def _read_again(self, params, cache, rows):
        """The committed tokens of `rows` through the reference, so that it can go on."""
        start, tokens = cache.replace(pos=jnp.zeros_like(cache.pos)), cache.tokens[:, :-1]
        last = jnp.maximum(cache.pos - 1, 0)
        if self.shares_cache:
            output = self.target.full(params, tokens, _inner(start), rows, logits_at=last)
            return _outer(cache, cache, layers=output.cache.layers)
        output = self.reference.forward(params, tokens, _exact(start), logits_at=last)
        return _outer(cache, cache, exact=output.cache.layers)  # of all rows: who has fallen before gets the same again

    def _exactly(self, params, tokens, cache, rows, taps, said):
        """The reference's block for `rows`; the others keep what was said: (logits, taps), cache."""
        if self.shares_cache:
            output = self.target.full(params, tokens, _inner(cache), rows, taps=taps)
            cache = _outer(cache, cache, layers=output.cache.layers)
        else:
            output = self.reference.forward(params, tokens, _exact(cache), taps=taps)
            cache = _outer(cache, cache, exact=output.cache.layers)
        mine = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b).astype(b.dtype)
        return jax.tree.map(mine, (output.logits, output.taps), said), cache

    def _exact_choice(self, params, tokens, cache, rows):
        """[B]: the reference's first choice after the block's first token. The cache stays as it is."""
        if self.shares_cache:
            logits = self.target.full(params, tokens[:, :1], _inner(cache), rows).logits
        else:
            again = _exact(cache.replace(pos=jnp.zeros_like(cache.pos)))
            whole = caches.write_tokens(cache, tokens).tokens[:, :-1]
            logits = self.reference.forward(params, whole, again, logits_at=cache.pos).logits
        return logits[:, 0].argmax(-1).astype(jnp.int32)


def log_evidence(agreed: Array, differed: Array, floor: float) -> Array:
    """log E of the module's docstring; [...] counts -> [...] float32."""
    a, b = (jnp.asarray(n, jnp.float32) for n in (agreed, differed))
    bets = betaln(a + 1, b + 1) + jnp.log(betainc(a + 1, b + 1, jnp.float32(floor)))
    worst = jnp.where(b > 0, b * jnp.log1p(-jnp.float32(floor)), 0)  # floor 1: a single disagreement is proof
    return bets - (a + 1) * jnp.log(jnp.float32(floor)) - worst


def _inner(cache: caches.Cache) -> caches.Cache:
    return cache.replace(layers=cache.layers.layers)


def _exact(cache: caches.Cache) -> caches.Cache:
    return cache.replace(layers=cache.layers.exact)


def _outer(cache: caches.Cache, moved: caches.Cache, **layers: Any) -> caches.Cache:
    """cache with the tokens of `moved` and parts of its GuardState replaced."""
    return cache.replace(tokens=moved.tokens, layers=cache.layers.replace(**layers))


# --- the log of a call ------------------------------------------------------------------------------------------


def log(guarded: Guarded, cache: caches.Cache) -> list[dict[str, Any]]:
    """One dict a row, plain enough for JSON, of a finished call's cache (`generate(on_state=...)`).

    prompt: its length. tokens: the new ids. checks: [slot, agreed] each, where the token at a slot is what was run and
    its successor what was compared. agreement: their share, None without any. fallback: the slot from which on the
    reference ran, None if it did not. seed and the guard's settings. If the target keeps an audit: exit (layers) and
    score (the gate's confidence) of each token that was run after the prompt, by slot from `prompt` on.
    """
    state: GuardState = cache.layers
    pos, ids, checked, fell, prompt = (np.asarray(a) for a in (cache.pos, cache.tokens, state.checked, state.fell,
                                                              state.prompt))
    audit = guarded.target.audit(_inner(cache)) if hasattr(guarded.target, 'audit') else {}
    audit = {name: np.asarray(a) for name, a in audit.items()}
    settings = {name: getattr(guarded, name) for name in ('share', 'floor', 'confidence', 'min_checks', 'seed')}
    rows = []
    for row, (begin, end) in enumerate(zip(prompt.tolist(), pos.tolist(), strict=True)):
        slots = np.flatnonzero(checked[row, :end]).tolist()
        checks = [[slot, bool(checked[row, slot] == AGREED)] for slot in slots]
        fallback = int(fell[row]) if 0 <= fell[row] < end else None
        rows.append({'prompt': begin, 'tokens': ids[row, begin:end + 1].tolist(), 'checks': checks,
                     'agreement': sum(agreed for _, agreed in checks) / len(checks) if checks else None,
                     'fallback': fallback, **settings,
                     **{name: a[row, begin:end].tolist() for name, a in audit.items()}})
    return rows


def replay(logs: Sequence[dict[str, Any]]) -> dict[str, Array]:
    """params['replay'] that makes the same prompts take the logged exits and fallbacks again."""
    fallback = [NEVER if row['fallback'] is None else row['fallback'] for row in logs]
    given = {'fallback': jnp.array(fallback, jnp.int32)}
    if all('exit' in row for row in logs):
        exits = np.zeros((len(logs), max(row['prompt'] + len(row['exit']) for row in logs)), np.int32)
        for line, row in zip(exits, logs, strict=True):
            line[row['prompt']:row['prompt'] + len(row['exit'])] = row['exit']
        given['exit'] = jnp.array(exits)
    return given
