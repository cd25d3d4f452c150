"""The contract: any Target decodes with any Drafter. Read this file first.

Shapes: B rows, S tokens in a block, K drafted tokens, V vocabulary, d hidden size, C cache capacity.
`params` is everywhere the whole dict {'base': ..., '<method>': ...}; a piece takes what is its own.

One round of decoding, for every row at once:

    draft, cache, state = drafter.draft(params, cache, state, rng, sampling)
    block  = [pending token, draft.tokens]                               # [B, K+1]
    output = target.forward(params, block, cache, resume=draft.resume, taps=drafter.needs)
    n, next_token = verify(output.logits, draft, rng, sampling)          # n drafts kept, then next_token
    cache  = commit(output.cache, n, next_token)                         # pos += n + 1
    state  = drafter.commit(params, state, output with that cache, n)

`forward` writes slots pos..pos+S-1 and never moves `pos`; `commit` is the only mover.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct

from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.sampling import Sampling

Array = jax.Array
Params = Any


@struct.dataclass
class Resume:
    """The drafter has run target layers < `layer` on the block and written their slots pos..pos+K.

    hidden: [B, K+1, d], the residual stream after those layers.
    """

    hidden: Array
    layer: int = struct.field(pytree_node=False)


@struct.dataclass
class Output:
    """What a forward pass over a block of S tokens returns. `cache.pos` is where it was."""

    tokens: Array  # [B, S], the block
    logits: Array  # [B, S, V], or [B, 1, V] where `logits_at` was given
    cache: Cache
    taps: dict[str, Array] = struct.field(default_factory=dict)


@runtime_checkable
class DraftLaw(Protocol):
    """The law each drafted token was really drawn from, after the sampling processors."""

    gold: Array  # [B, K] probability of the drafted token

    def row(self, i: Array) -> Array:
        """Whole law of draft position i[B] in 0..K-1 -> [B, V]; sums to 1."""


@struct.dataclass
class DenseLaw:
    """The simple DraftLaw: a table. probs [B, K, V], gold [B, K]."""

    probs: Array
    gold: Array

    def row(self, i: Array) -> Array:
        return jax.vmap(lambda table, k: table[k])(self.probs, i)


@struct.dataclass
class Draft:
    """A chain of guesses for the tokens after the pending one.

    tokens [B, K]; length [B] in 0..K: tokens past it are padding (0 = plain decoding this round).
    law: None where the tokens are deterministic (q is a point mass).
    """

    tokens: Array
    length: Array
    law: DraftLaw | None = None
    resume: Resume | None = None


@struct.dataclass
class Accepted:
    """n [B] in 0..draft.length drafts kept; next_token [B] follows them."""

    n: Array
    next_token: Array


class Target(Protocol):
    """A model that decodes. Frozen and hashable: it is a static argument of the jitted loop.

    `exact` False marks an approximation, whose `reference` is the exact Target it stands for.
    Optional: `host_loop(params, prompts, *, max_new_tokens, sampling, stop_tokens, seed, on_tokens)` in the place of
    the jitted loop, for a model whose passes the host takes part in. It gives back tokens (lists of ids), passes,
    prefill_s and decode_s, and its `init_cache` and `forward` raise ConfigError. `counted`: what its last call reports.
    """

    exact: bool
    reference: Target | None
    vocab_size: int
    max_seq_len: int

    def init_cache(self, batch: int, max_len: int, block: int) -> Cache:
        """An empty cache for `max_len` tokens a row and blocks of up to `block` drafted tokens."""

    def forward(self, params: Params, tokens: Array, cache: Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: dict[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """Runs tokens [B, S] at slots cache.pos..cache.pos+S-1 and writes them; `pos` stays.

        taps: static names, see `backbone.model`. masks: {'heads': [L, H] or [L, B, S, H],
        'neurons': [L, F] or [L, B, S, F]}, multiplied in. logits_at [B]: logits of that one
        position of the block only (prefill). A target with recurrent states takes it as a promise that `commit`
        keeps a block longer than `block` + 1 just up to there (backbone/cache.py).
        """


class Drafter(Protocol):
    """Guesses tokens. Frozen and hashable, like a Target."""

    block: int  # K
    needs: tuple[str, ...]  # taps wanted from every target pass

    def init_params(self, rng: Array) -> Params:
        """Parameters of its own (an empty dict where it has none)."""

    def init_state(self, batch: int, max_len: int) -> Any:
        """A pytree of arrays with leading axis `batch`."""

    def prefill(self, params: Params, state: Any, output: Output, n: Array) -> Any:
        """Sees the prompt's pass: positions 0..n[B] of the block are the prompt."""

    def draft(self, params: Params, cache: Cache, state: Any, rng: Array,
              sampling: Sampling) -> tuple[Draft, Cache, Any]:
        """May run target layers; then it writes their slots and returns them as `draft.resume`.

        rng: one key, or one a row [B]; `draw`, `split`, `fold_in` and `uniform` of backbone.sampling take either.
        """

    def commit(self, params: Params, state: Any, output: Output, n: Array) -> Any:
        """Positions 0..n[B] of the block were kept (n = -1: none, the row is finished)."""


class Task(Protocol):
    """What is trained. Frozen and hashable. `cfg` is the base's ModelConfig: shardings and FLOPs are read off it.

    trainable: regexes that must fully match '/'-joined parameter paths; every other leaf is frozen: no gradient, no
    optimiser state, the same bits afterwards. A batch is a dict of [B, S] arrays (docs/data.md).
    Optional: `target`, the Target that decodes the parameters for samples; `load() -> tree` of numpy leaves that come
    from files and replace those of `init` (a frozen base), checked against their shapes; `by_step` True: in training
    batch['step'] is the number of steps done, traced. Evaluation never has it.
    """

    cfg: ModelConfig
    trainable: tuple[str, ...]

    def init(self, rng: Array) -> Params:
        """Pure: it is traced, and made directly in the mesh's shardings."""

    def loss(self, params: Params, batch: dict[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """(loss, metrics). metrics['weight'] is what microbatches and evaluation batches are averaged by (tokens
        counted; 1 where it is missing); metrics['nll'], nats a token, becomes perplexity and bits a byte."""
