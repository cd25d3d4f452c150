"""Documents end to end in rows of fixed length, and how a row is stored.

A row of `seq_len` inputs holds seq_len + 1 tokens of the stream, so that its last input has a target; the next row
begins with that token again. So every token is a target exactly once, except the first of each document: nothing before
it belongs to it. A document that is cut goes on in the next row as a new segment from position 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from harness.data.encoding import Document

_BLOCK = 1 << 20  # tokens that are cut at once


class Row(NamedTuple):
    """tokens [n], n <= seq_len + 1; starts: where in it documents begin, 0 not listed; counts [n] bool, or None."""

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray | None = None


def pack(documents: Iterable[Document], seq_len: int, dtype: np.dtype) -> Iterator[Row]:
    """Rows of tokens of `dtype` in the order of the documents. Only the last may be short, and has a target."""
    waiting: list[Document] = []
    tokens = 0
    rest = Document(np.zeros(0, dtype)), np.zeros(0, np.int64)
    for document in documents:
        waiting.append(document)
        tokens += len(document.ids)
        if tokens >= _BLOCK:
            rows, rest = _cut(waiting, rest, seq_len)
            yield from rows
            waiting, tokens = [], 0
    rows, (left, starts) = _cut(waiting, rest, seq_len)
    yield from rows
    if len(left.ids) > 1:
        yield Row(left.ids, starts[starts > 0], left.counts)


def _cut(waiting: list[Document], rest: tuple[Document, np.ndarray], seq_len: int
         ) -> tuple[list[Row], tuple[Document, np.ndarray]]:
    """(whole rows, (what is left of the stream, where in it documents begin))."""
    left, starts = rest
    everything = [left, *waiting]
    ids = np.concatenate([document.ids for document in everything], dtype=left.ids.dtype, casting='unsafe')
    lengths = np.cumsum([len(document.ids) for document in everything])
    starts = np.concatenate([starts, lengths[:-1]])
    counts = None
    if any(document.counts is not None for document in everything):
        counts = np.concatenate([np.ones(len(document.ids), bool) if document.counts is None else document.counts
                                 for document in everything])
    whole = max(0, (len(ids) - 1) // seq_len)
    first = np.searchsorted(starts, np.arange(whole + 1) * seq_len, 'right')  # a start at 0 goes without saying
    last = np.searchsorted(starts, np.arange(whole + 1) * seq_len + seq_len, 'right')
    rows, no_starts = [], starts[:0]
    for i, (low, high) in enumerate(zip(first[:-1].tolist(), last[:-1].tolist(), strict=True)):
        a = i * seq_len
        rows.append(Row(ids[a:a + seq_len + 1], starts[low:high] - a if high > low else no_starts,
                        None if counts is None else counts[a:a + seq_len + 1]))
    a = whole * seq_len
    kept = starts >= a
    return rows, (Document(ids[a:], None if counts is None else counts[a:]), starts[kept] - a)


# Stored: uint32 tokens n, uint32 starts k, uint32 flags (1: counts follow); k uint32; n tokens; n bits. --------------

def to_bytes(row: Row) -> bytes:
    head = struct.pack('<3I', len(row.tokens), len(row.starts), row.counts is not None)
    starts = row.starts.astype('<u4').tobytes() if len(row.starts) else b''
    bits = b'' if row.counts is None else np.packbits(row.counts).tobytes()
    return head + starts + row.tokens.tobytes() + bits


def from_bytes(record: bytes, dtype: np.dtype) -> Row:
    """Errors: ValueError where the record is not one row."""
    n, k, flag = np.frombuffer(record, '<u4', 3).tolist()
    at = 12 + 4 * k + n * dtype.itemsize
    if len(record) != at + (-(-n // 8) if flag else 0):
        raise ValueError(f'{len(record)} bytes are no row of {n} tokens')
    starts = np.frombuffer(record, '<u4', k, 12).astype(np.int64)
    tokens = np.frombuffer(record, dtype, n, 12 + 4 * k)
    counts = np.unpackbits(np.frombuffer(record, np.uint8, offset=at), count=n).astype(bool) if flag else None
    return Row(tokens, starts, counts)


def arrays(row: Row, seq_len: int) -> dict[str, np.ndarray]:
    """A row as {'tokens', 'targets', 'segments', 'positions' int32, 'weights' float32}, each [seq_len]."""
    n = min(len(row.tokens), seq_len)  # inputs
    padded = np.zeros(seq_len + 1, np.int32)
    padded[:len(row.tokens)] = row.tokens
    places = np.arange(seq_len, dtype=np.int32)
    begins = np.zeros(seq_len + 1, np.int32)
    begins[row.starts] = 1
    begins[0] = 1
    weights = np.zeros(seq_len, np.float32)
    targets = len(row.tokens) - 1
    weights[:targets] = 1 if row.counts is None else row.counts[1:]
    weights[begins[1:] == 1] = 0
    segments = np.cumsum(begins[:-1], dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(begins[:-1], places, 0))
    segments[n:] = 0
    positions[n:] = 0
    return {'tokens': padded[:-1], 'targets': padded[1:], 'segments': segments, 'positions': positions,
            'weights': weights}
