"""Perplexity of running text: `ppl:NAME`.

Protocol: windows of 512 tokens, each scored on its own with nothing before it (no bos), so its first token is not
scored; text is the raw file. bits_per_byte divides by the bytes of the scored tokens, and so compares vocabularies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backbone import catalogue
from backbone.errors import ConfigError
from harness.scoring import Row, Scorer

WINDOW = 512


@dataclasses.dataclass(frozen=True)
class Text:
    what: str
    read: Callable[[int], bytes]  # told how many bytes are wanted at most; -1 for all


def _file(path: Path, start: int = 0, stop: int | None = None) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        with path.open('rb') as source:
            source.seek(start)
            room = -1 if stop is None else stop - start
            return source.read(min(count, room) if count >= 0 and room >= 0 else max(count, room))
    return read


def _text(name: str) -> Text:
    """A catalogue text or a file. Errors: ConfigError for an unknown name, FetchError."""
    if name == 'enwik8':  # the usual 90/5/5 split: its validation part
        return Text('enwik8, bytes 90,000,000 to 95,000,000',
                    _file(catalogue.fetch('enwik8'), 90_000_000, 95_000_000))
    if name == 'stdlib':
        folder = catalogue.fetch('stdlib')
        parts = [folder / 'heapq.py', folder / 'difflib.py']
        return Text('heapq.py and difflib.py of the running Python',
                    lambda count: b''.join(part.read_bytes() for part in parts)[:count if count >= 0 else None])
    key, _, book = name.partition('/')
    if key == 'gutenberg':
        folder = catalogue.fetch('gutenberg')
        path = folder / f'{book or "carroll-alice"}.txt'
        if not path.exists():
            books = ', '.join(sorted(path.stem for path in folder.glob('*.txt')))
            raise ConfigError(f'ppl:{name}: no such book; there are {books}')
        return Text(f'Gutenberg, {path.name}', _file(path))
    path = Path(name)
    if path.is_file():
        return Text(path.name, _file(path))
    raise ConfigError(f'ppl:{name}: neither a file nor one of enwik8, stdlib, gutenberg, gutenberg/BOOK')


def windows(scorer: Scorer, text: bytes, limit: int | None) -> list[Row]:
    """Full windows of the text in order; a text shorter than one is a window of its own."""
    ids = scorer.tokenizer.encode(text.decode('utf-8', errors='replace'), add_special=False)
    size = min(WINDOW, scorer.max_length)
    starts = range(0, len(ids) - size + 1, size) if len(ids) >= size else [0]
    rows = [Row(tuple(ids[start:start + size]), 1) for start in starts]
    return [row for row in rows if len(row.tokens) > 1][:limit]


def run(scorer: Scorer, name: str, limit: int | None) -> dict[str, Any]:
    """{perplexity, perplexity_stderr, bits_per_byte, bits_per_byte_stderr, n (windows), tokens, bytes, text}.

    Standard errors take the windows as independent.
    """
    text = _text(name.partition(':')[2])
    # No tokenizer here makes tokens of 16 bytes on average: enough text for `limit` windows, not all of it.
    raw = text.read(-1 if limit is None else limit * WINDOW * 16)
    rows = windows(scorer, raw, limit)
    if not rows:
        raise ConfigError(f'{name}: the text has fewer than two tokens')
    scores = scorer.score(rows, name)
    nats = np.array([-score.total for score in scores])
    tokens = np.array([len(row.tokens) - row.start for row in rows])
    sizes = np.array([len(scorer.tokenizer.decode_bytes(row.tokens[row.start:])) for row in rows])
    mean, error = ratio(nats, tokens)
    bits, bits_error = ratio(nats / math.log(2), sizes)
    return {'perplexity': math.exp(mean), 'perplexity_stderr': math.exp(mean) * error, 'bits_per_byte': bits,
            'bits_per_byte_stderr': bits_error, 'n': len(rows), 'tokens': int(tokens.sum()),
            'bytes': int(sizes.sum()), 'text': text.what}


def ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    """sum(top) / sum(bottom) and its standard error (delta method) over independent pairs."""
    value, n = top.sum() / bottom.sum(), len(top)
    if n < 2:
        return float(value), math.nan
    return float(value), float(np.sqrt(((top - value * bottom) ** 2).sum() * n / (n - 1)) / bottom.sum())
