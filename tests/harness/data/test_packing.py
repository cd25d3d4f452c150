"""Rows hold the documents exactly, and a target counts only inside its document."""

import numpy as np
import pytest

from harness.data import packing
from harness.data.encoding import Document


def documents(seed: int, count: int = 30) -> list[Document]:
    """Of 1 to 40 tokens, all different from their neighbours'; some with counts."""
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(1, 60000, size := int(rng.integers(1, 41))),
                     rng.random(size) < 0.5 if seed % 2 else None) for _ in range(count)]


def rows_of(docs, seq_len) -> list[dict]:
    dtype = np.dtype('<u2')
    rows = [packing.from_bytes(packing.to_bytes(row), dtype) for row in packing.pack(iter(docs), seq_len, dtype)]
    return [packing.arrays(row, seq_len) for row in rows]


def check(docs: list[Document], rows: list[dict], seq_len: int) -> None:
    """The whole promise, token by token."""
    stream = [(token, d, place, bool(doc.counts[place]) if doc.counts is not None else True)
              for d, doc in enumerate(docs) for place, token in enumerate(doc.ids)]
    assert len(rows) == -(-(len(stream) - 1) // seq_len)
    for r, row in enumerate(rows):
        segment, start, last_doc = 0, 0, None
        for i in range(seq_len):
            at = r * seq_len + i
            got = {name: array[i] for name, array in row.items()}
            if at >= len(stream):
                assert not any(got.values())
                continue
            token, doc, _, _ = stream[at]
            if doc != last_doc or i == 0:
                segment, start, last_doc = segment + 1, i, doc
            assert (got['tokens'], got['segments'], got['positions']) == (token, segment, i - start)
            follows = at + 1 < len(stream)
            counts = follows and stream[at + 1][1] == doc and stream[at + 1][3]
            assert got['weights'] == counts
            assert got['targets'] == (stream[at + 1][0] if follows else 0)


@pytest.mark.parametrize('seq_len', [1, 2, 7, 64])
@pytest.mark.parametrize('seed', [0, 1])
def test_rows_hold_every_token_and_count_inside_documents_only(seed, seq_len):
    docs = documents(seed)
    rows = rows_of(docs, seq_len)
    check(docs, rows, seq_len)
    assert {name: array.dtype for name, array in rows[0].items()} == {
        'tokens': np.int32, 'targets': np.int32, 'segments': np.int32, 'positions': np.int32, 'weights': np.float32}


@pytest.mark.parametrize('spoil', ['weights', 'segments', 'positions', 'tokens'])
def test_the_check_would_catch_a_wrong_packer(spoil):
    docs = documents(0)
    rows = rows_of(docs, 16)
    row = next(row for row in rows if row['segments'].max() > 1)  # two documents or more
    if spoil == 'weights':  # counts a target of the next document
        row['weights'][:] = 1
    elif spoil == 'segments':  # lets a document see the one before
        row['segments'][:] = 1
    elif spoil == 'positions':
        row['positions'][:] = np.arange(16)
    else:
        row['tokens'][5] += 1
    with pytest.raises(AssertionError):
        check(docs, rows, 16)


@pytest.mark.parametrize('boundary', [3, 4, 5])
def test_a_document_that_begins_at_the_edge_of_a_row(boundary):
    docs = [Document(np.arange(1, boundary + 1)), Document(np.arange(50, 60))]
    check(docs, rows_of(docs, 4), 4)


def test_tokens_cut_in_blocks_of_any_size_give_the_same_rows(monkeypatch):
    docs = documents(1, 60)
    whole = rows_of(docs, 16)
    monkeypatch.setattr(packing, '_BLOCK', 50)
    for one, other in zip(whole, rows_of(docs, 16), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_single_token_predicts_nothing():
    assert rows_of([Document(np.array([5]))], 8) == []
    assert rows_of([], 8) == []


def test_a_record_of_another_length_is_refused():
    record = packing.to_bytes(packing.Row(np.arange(5, dtype='<u2'), np.array([2])))
    with pytest.raises(ValueError, match='no row'):
        packing.from_bytes(record + b'x', np.dtype('<u2'))
