"""Log-probabilities of given tokens, and greedy continuations, in batches of few shapes.

Rows are sorted by length and padded to a power of two, so a whole evaluation compiles a handful of programs. The
log-probabilities are taken inside the jit: logits [B, S, V] never exist at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from backbone import layout
from backbone.config import ModelConfig
from backbone.contract import Target
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded
from backbone.model import PlainTarget, unembed
from backbone.tokenizer import Tokenizer
from harness import baselines, decode, models

Array = jax.Array

LOGIT_BYTES = 128e6  # of one chunk of logits, float32
BLOCK_BYTES = 512e6  # of one call's attention scores, or of its logits where a target returns them whole
CALL_TOKENS = 8192  # more tokens a call is not faster, only larger
SMALLEST = 32  # the shortest padded length


@dataclasses.dataclass(frozen=True)
class Row:
    """Score tokens[start:], each given all before it. 1 <= start < len(tokens)."""

    tokens: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Score:
    """logprobs: natural log of each scored token. greedy: every scored token was the most likely one."""

    logprobs: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        return float(self.logprobs.sum())


@dataclasses.dataclass(eq=False)
class Scorer:
    """A model to be measured.

    params: {'base': ...} and what `target` needs. target: by default the plain model.
    batch_size: rows a call, less where memory asks for it. decoder: makes the (target, parameters) that generate, where
    those that score are not the fastest.
    Errors: TokenizerError where tokenizer and model do not belong together.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    batch_size: int = 16
    target: Target | None = None
    progress: bool = True
    decoder: Callable[[], tuple[Target, Any]] | None = None

    @classmethod
    def of(cls, loaded: Loaded, batch_size: int = 16, progress: bool = True) -> Scorer:
        """Of a model as `models.load` gives it, its layers stacked: that compiles fastest. Errors: RequestError where
        it has no tokenizer, or approximates."""
        if loaded.tokenizer is None:
            raise RequestError(f'{loaded.name} has no tokenizer')
        target, params = models.target(loaded, packed=False)
        if not target.exact:
            raise RequestError(f'{loaded.name} approximates its base: what that loses shows one token at a time, not '
                               'in scores of whole texts; a row of headway-compare says it (quality)')
        return cls(loaded.config, params, loaded.tokenizer, batch_size, target, progress,
                   decoder=None if loaded.decodes is None else lambda: models.target(loaded))

    def __post_init__(self):
        if self.batch_size < 1:
            raise RequestError(f'batch_size must be at least 1, got {self.batch_size}')
        self.tokenizer.check_model(self.config.vocab_size)
        self.target = self.target or PlainTarget(self.config)
        self.params = jax.tree.map(jnp.asarray, self.params)

    @property
    def max_length(self) -> int:
        return self.config.max_seq_len

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """What stands before a text that has nothing before it: bos, else the first end token."""
        special = [self.tokenizer.bos_id, *self.tokenizer.eos_ids]
        return tuple([i for i in special if i is not None][:1])

    def pair(self, context: str, continuation: str) -> Row:
        """A continuation scored after a context, split into tokens as lm-eval does.

        Spaces at the end of the context belong to the continuation's first token. Too long a row loses its beginning.
        """
        bare = context.rstrip()
        context, continuation = bare, context[len(bare):] + continuation
        if context:
            whole, before = self.tokenizer.encode(context + continuation), len(self.tokenizer.encode(context))
        else:
            whole, before = [*self.prefix, *self.tokenizer.encode(continuation, add_special=False)], len(self.prefix)
        cut = max(len(whole) - self.max_length, 0)
        return Row(tuple(whole[cut:]), max(before - cut, 1))

    def score(self, rows: Sequence[Row], name: str = 'scoring') -> list[Score]:
        """Scores in the order of the rows."""
        scores: list[Any] = [None] * len(rows)
        for row in rows:
            if not 1 <= row.start < len(row.tokens) <= self.max_length:
                raise RequestError(f'a row of {len(row.tokens)} tokens scored from {row.start} does not fit '
                                   f'the context of {self.max_length}')
        with tqdm.tqdm(total=len(rows), desc=name, unit='row', disable=None if self.progress else True) as bar:
            for chosen, size, batch in self._batches([len(row.tokens) for row in rows]):
                tokens = np.zeros((batch, size), np.int32)
                for i, n in enumerate(chosen):
                    tokens[i, :len(rows[n].tokens)] = rows[n].tokens
                logprobs, hits = jax.device_get(_token_logprobs(self.target, self.params, tokens))
                for i, n in enumerate(chosen):
                    part = slice(rows[n].start - 1, len(rows[n].tokens) - 1)
                    scores[n] = Score(logprobs[i, part], bool(hits[i, part].all()))
                bar.update(len(chosen))
        return scores

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
        """(row numbers, padded length, rows of the call), longest first: what does not fit shows at once."""
        buckets: dict[int, list[int]] = {}
        for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            size = min(decode.bucket(lengths[n], SMALLEST), self.max_length)
            buckets.setdefault(size, []).append(n)
        for size, numbers in buckets.items():
            calls = -(-len(numbers) // self._rows_at(size))
            batch = -(-len(numbers) // calls)  # even calls, so that few rows are padding
            for first in range(0, len(numbers), batch):
                yield numbers[first:first + batch], size, batch

    def _rows_at(self, size: int) -> int:
        """Rows of `size` tokens that one call may hold."""
        scores = self.config.attention.num_heads * size * size * 4
        logits = 0 if isinstance(self.target, PlainTarget) else size * self.config.vocab_size * 4
        return max(1, min(self.batch_size, int(BLOCK_BYTES // max(scores, logits)), CALL_TOKENS // size))

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, until: Sequence[str] = (),
                 name: str = 'generating') -> list[str]:
        """Greedy continuations, each cut before the first of `until`; a prompt too long loses its beginning."""
        room = self.max_length - max_new_tokens
        ids = [tuple(self.tokenizer.encode(prompt))[-room:] or self.prefix for prompt in prompts]
        stops = {*self.tokenizer.eos_ids, *self._tokens_with(tuple(until))}
        texts: list[Any] = [None] * len(ids)
        order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
        batch = min(self.batch_size, len(ids))
        target, params = self._decoding
        with tqdm.tqdm(total=len(ids), desc=name, unit='row', disable=None if self.progress else True) as bar:
            for first in range(0, len(order), batch):
                chosen = order[first:first + batch]
                padded = [*chosen, *chosen[-1:] * (batch - len(chosen))]  # one shape, so one compilation
                made = decode.generate(target, baselines.Autoregressive(), params, [ids[n] for n in padded],
                                       max_new_tokens=max_new_tokens, stop_tokens=tuple(stops))
                for n, new in zip(chosen, made.tokens, strict=False):
                    texts[n] = _cut(self._text(new), until)
                bar.update(len(chosen))
        return texts

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode_bytes(ids, skip_special=True).decode('utf-8', errors='replace')

    def _tokens_with(self, until: tuple[str, ...]) -> list[int]:
        """Tokens that hold a whole stop string; one spread over several tokens is only cut off afterwards."""
        wanted = [text.encode() for text in until]
        return [i for i, piece in enumerate(self.tokenizer.pieces) if any(text in piece for text in wanted)]

    @functools.cached_property
    def _decoding(self) -> tuple[Target, Any]:
        """Target and parameters in the layout that decodes fastest, where that is known."""
        if self.decoder is not None:
            return self.decoder()
        if self.target != PlainTarget(self.config) or isinstance(self.params['base']['layers'], tuple):
            return self.target, self.params
        dtype = self.params['base']['embed']['tokens'].dtype
        packed = self.params | {'base': layout.pack(self.params['base'], dtype)}
        return PlainTarget(self.config, cache_dtype=str(dtype), stacked=False), packed


def _cut(text: str, until: Sequence[str]) -> str:
    return text[:min((at for at in (text.find(stop) for stop in until if stop) if at >= 0), default=len(text))]


@functools.partial(jax.jit, static_argnames='target')
def _token_logprobs(target: Target, params: Any, tokens: Array) -> tuple[Array, Array]:
    """tokens [B, S] -> log p(tokens[:, i + 1] | before) [B, S-1], and whether it is the argmax [B, S-1]."""
    batch, size = tokens.shape
    gold = tokens[:, 1:]
    if not isinstance(target, PlainTarget):  # a recurrent one wants to know that the whole text is one block
        cache = target.init_cache(batch, size, size)
        return _pick(target.forward(params, tokens, cache).logits[:, :-1], gold)
    cache = target.init_cache(batch, size, 0)
    # The plain model's head runs over chunks of positions.
    output = target.forward(params, tokens, cache, taps=('hidden:last',), logits_at=jnp.zeros((batch,), jnp.int32))
    hidden = output.taps['hidden:last'][:, :-1].reshape(batch * (size - 1), -1)
    chunk = max(1, min(len(hidden), int(LOGIT_BYTES // (4 * target.vocab_size))))
    chunks = -(-len(hidden) // chunk)
    spare = chunks * chunk - len(hidden)
    hidden = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(chunks, chunk, -1)
    padded = jnp.pad(gold.reshape(-1), (0, spare)).reshape(chunks, chunk)
    found = jax.lax.map(lambda part: _pick(unembed(target.cfg, params['base'], part[0]), part[1]), (hidden, padded))
    return tuple(leaf.reshape(-1)[:gold.size].reshape(gold.shape) for leaf in found)


def _pick(logits: Array, gold: Array) -> tuple[Array, Array]:
    """logits [..., V], gold [...] -> log-probability and argmax == gold [...]."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, gold[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == gold
