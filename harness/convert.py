"""Converting a checkpoint, and checking that the copy is the same model.

    agreement = convert('smollm2-135m', 'out/smollm2', 'hf', check=True)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backbone import catalogue, formats, model
from backbone.errors import RequestError
from backbone.formats import Loaded
from harness import models

# Real text that is on every machine; its comments are prose, the rest is code.
_TEXT = 'heapq.py'
_CHUNK = 64  # positions whose probabilities exist at once


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two models agree on one text. Means over `positions` predictions; nats; p is the source's law.

    kl: mean KL(p || q). max_logit_difference: over all positions and the whole vocabulary. top5: mean share of the
    five best tokens that are the same. top1: share of positions with the same best token. loss: mean negative log
    likelihood of the text's next token, of each side (None for random tokens, used where there is no tokenizer).
    """

    positions: int
    kl: float
    max_logit_difference: float
    top5: float
    top1: float
    source_loss: float | None
    result_loss: float | None

    def lines(self) -> list[str]:
        loss = [] if self.source_loss is None else [
            f'loss                  {self.source_loss:.4f} -> {self.result_loss:.4f} nats a token']
        return [f'positions             {self.positions}', f'KL(source || result)  {self.kl:.3e} nats a token',
                f'max logit difference  {self.max_logit_difference:.3e}', f'top-5 agreement       {self.top5:.4f}',
                f'top-1 agreement       {self.top1:.4f}', *loss]


def text_tokens(loaded: Loaded, count: int = 512) -> np.ndarray:
    """int32 [1, <= count] ids of real text; fixed random ids where the model has no tokenizer."""
    count = min(count, loaded.config.max_seq_len)
    if loaded.tokenizer is None:
        return np.random.default_rng(0).integers(0, loaded.config.vocab_size, (1, count)).astype(np.int32)
    text = (catalogue.fetch('stdlib') / _TEXT).read_text(encoding='utf-8')
    return np.array([loaded.tokenizer.encode(text)[:count]], np.int32)


def logits(loaded: Loaded, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [S, V] of tokens [1, S], at the highest matrix precision."""
    with jax.default_matmul_precision('highest'):
        return np.asarray(jax.jit(model.forward, static_argnums=0)(loaded.config, loaded.params, tokens))[0]


def agreement(source: np.ndarray, result: np.ndarray, tokens: np.ndarray | None) -> Agreement:
    """source, result: logits [S, V] of the same text; tokens [S], or None where the text is random.

    Errors: RequestError where the vocabularies differ.
    """
    if source.shape != result.shape:
        raise RequestError(f'the models give logits {list(source.shape)} and {list(result.shape)}: not comparable')
    kl, furthest, top5, top1, losses = 0.0, 0.0, 0.0, 0.0, np.zeros(2)
    for first in range(0, len(source), _CHUNK):
        sides = [jnp.asarray(side[first:first + _CHUNK]) for side in (source, result)]
        p, q = (jax.nn.log_softmax(side, axis=-1) for side in sides)
        kl += float(jnp.sum(jnp.exp(p) * (p - q)))
        furthest = max(furthest, float(jnp.abs(sides[0] - sides[1]).max()))
        best = [np.asarray(jax.lax.top_k(side, 5)[1]) for side in sides]
        top5 += float((best[0][:, :, None] == best[1][:, None, :]).sum()) / 5
        top1 += float((best[0][:, 0] == best[1][:, 0]).sum())
        if tokens is not None:
            following = tokens[first + 1:first + 1 + len(p)]
            losses -= [float(jnp.sum(side[np.arange(len(following)), following])) for side in (p, q)]
    size = len(source)
    loss = losses / (size - 1) if tokens is not None else [None, None]
    # Rounding can leave a KL of zero a little below it.
    return Agreement(size, max(kl / size, 0.0), furthest, top5 / size, top1 / size, *loss)


def convert(src: str, dst: str | Path, to: str | None = None, dtype: str = 'f32', *, check: bool = False,
            overwrite: bool = False) -> Agreement | None:
    """Writes model `src` (see harness/models.py) as `dst`; with `check`, reads it back and compares.

    to: 'gguf', 'hf' or 'headway'; None means gguf for a name that ends so, else headway.
    Errors: FormatError (`dst` exists, damaged `src`, not expressible, more than a plain model), FetchError.
    """
    to = to or ('gguf' if str(dst).endswith('.gguf') else 'headway')
    formats.check_request(dst, to, dtype, overwrite)
    loaded = models.load(src)
    loaded.check_plain()
    formats.save(loaded, dst, to, dtype, overwrite)
    if not check:
        return None
    tokens = text_tokens(loaded)
    has_text, expected = loaded.tokenizer is not None, logits(loaded, tokens)
    del loaded  # two models need not be in memory at once
    found = logits(formats.load(dst, cache=False), tokens)
    return agreement(expected, found, tokens[0] if has_text else None)
