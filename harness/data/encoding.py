"""Documents to token ids, many at a time: the threads of `tokenizers` work on whole batches of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers

from backbone.errors import DataError
from backbone.tokenizer import Tokenizer
from harness.data.datasets import Piece

BATCH_BYTES = 1 << 22  # of text that is encoded together


@dataclasses.dataclass(frozen=True)
class Document:
    """ids [n] of one document with its end. counts [n] bool: those a loss is taken of; None for all."""

    ids: np.ndarray
    counts: np.ndarray | None = None


def encode(documents: Iterable[tuple[str, list[Piece]]], tokenizer: Tokenizer,
           answers_only: bool) -> Iterator[Document]:
    """(name, pieces) of documents -> their ids, in order.

    A document begins with bos where the model was trained so, and ends with the first of `tokenizer.eos_ids` unless
    that stands in its last piece already. answers_only: only pieces that are answers count, each up to an end token
    inside it, and the end that is added after one.
    Errors: DataError for a tokenizer without an end, and for ids outside its vocabulary.
    """
    if not tokenizer.eos_ids:
        raise DataError('the tokenizer has no end-of-text token, which is what parts documents')
    encoder = _Encoder(tokenizer)
    batch: list[tuple[str, list[Piece]]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(len(piece.content) for piece in document[1])
        if size >= BATCH_BYTES:
            yield from _encode(batch, encoder, answers_only)
            batch, size = [], 0
    yield from _encode(batch, encoder, answers_only)


def _encode(batch: list[tuple[str, list[Piece]]], encoder: _Encoder, answers_only: bool) -> Iterator[Document]:
    found = iter(encoder([piece for _, pieces in batch for piece in pieces]))
    vocab, end, ends = encoder.vocab_size, encoder.ends[:1], encoder.ends
    for name, pieces in batch:
        parts = [(np.asarray(next(found)), piece.answer) for piece in pieces]
        for ids, _ in parts:
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
                raise DataError(f'{name}: token id {max(ids.max(), -ids.min())} is outside the vocabulary of {vocab}')
        if not parts or not np.isin(parts[-1][0], ends).any():
            parts.append((end, bool(parts) and parts[-1][1]))
        if encoder.bos is not None and (not parts[0][0].size or parts[0][0][0] != encoder.bos):
            parts.insert(0, (np.array([encoder.bos]), False))
        counts = np.concatenate([_counts(ids, answer, ends) for ids, answer in parts]) if answers_only else None
        yield Document(np.concatenate([ids for ids, _ in parts]), counts)


def _counts(ids: np.ndarray, answer: bool, ends: np.ndarray) -> np.ndarray:
    """A template may write more after the end of an answer; a model stops there."""
    counts = np.full(len(ids), answer)
    at = np.flatnonzero(np.isin(ids, ends))
    if answer and at.size:
        counts[at[-1] + 1:] = False
    return counts


class _Encoder:
    """Pieces to id arrays. In plain text nothing stands for a special token, in markup it does."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.ends = np.array(tokenizer.eos_ids)
        self.bos = tokenizer.bos_id if tokenizer.add_bos else None
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._plain.encode_special_tokens = True

    def __call__(self, pieces: list[Piece]) -> list[np.ndarray]:
        found: list[np.ndarray | None] = [None] * len(pieces)
        for backend, markup in ((self._plain, False), (self._tokenizer.backend, True)):
            texts = []
            for i, piece in enumerate(pieces):
                if isinstance(piece.content, np.ndarray):
                    found[i] = piece.content
                elif piece.markup == markup and self._tokenizer.byte_ids is not None and not markup:
                    found[i] = self._tokenizer.encode_bytes(piece.content)
                elif piece.markup == markup:
                    texts.append(i)
            decoded = [pieces[i].content.decode('utf-8', errors='replace') for i in texts]
            for i, encoding in zip(texts, backend.encode_batch_fast(decoded, add_special_tokens=False), strict=True):
                found[i] = np.array(encoding.ids, np.int32)
        return found
