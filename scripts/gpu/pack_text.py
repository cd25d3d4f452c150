"""Packs training rows, or prompts, into one small file that travels to a GPU machine without a data pipeline.

    python scripts/gpu/pack_text.py --config=configs/base_135m.py --rows=4096 --out=rows.npz
    python scripts/gpu/pack_text.py --config=configs/tensorhead_smollm2.py:gpu --rows=512 \\
        --config.data.split=validation --out=held_out.npz
    python scripts/gpu/pack_text.py --config=configs/tensorhead_smollm2.py:gpu \\
        --prompts=mt_bench --rows=48 --out=prompts.npz

Rows are those `headway-train` would read for the same config (docs/data.md), in the order of its seed; never the same
row twice. Prompts are token ids of the config's tokenizer, padded with zeros, and their lengths.
"""

from __future__ import annotations

import itertools
import pathlib
import sys

import numpy as np
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from harness import data
from harness.prompts import questions

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base_135m.py', 'Whose data.')
ROWS = flags.DEFINE_integer('rows', 4096, 'How many rows of data.seq_len tokens at most, or how many prompts.')
PROMPTS = flags.DEFINE_string('prompts', '', 'Prompts of this set instead of rows: mt_bench, vicuna, humaneval.')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 128, 'Prompts of at most so many tokens.')
OUT = flags.DEFINE_string('out', 'rows.npz', 'File to write.')


def main(argv: list[str]) -> None:
    config = CONFIG.value
    tokenizer = data.make_tokenizer(config.data)
    whole = np.uint32 if tokenizer.vocab_size > 1 << 16 else np.uint16
    if PROMPTS.value:
        found = [p.ids for p in questions(PROMPTS.value, ROWS.value, tokenizer, max_tokens=MAX_TOKENS.value)]
        ids = np.zeros((len(found), max(map(len, found))), whole)
        for row, prompt in enumerate(found):
            ids[row, :len(prompt)] = prompt
        np.savez_compressed(OUT.value, prompts=ids, lengths=np.array([len(prompt) for prompt in found]))
        print(f'wrote {len(found)} prompts to {OUT.value}')
        return
    rows = data.open_rows(config.data, config.data.split, tokenizer)
    size = min(64, len(rows))
    stream = data.batches(rows, batch_size=size, seed=config.seed)
    wanted = min(ROWS.value, len(rows))
    batches = list(itertools.islice(stream, -(-wanted // size)))
    stream.close()
    joined = {k: np.concatenate([b[k] for b in batches])[:wanted] for k in batches[0]}
    np.savez_compressed(OUT.value, tokens=joined['tokens'].astype(whole), targets=joined['targets'].astype(whole),
                        segments=joined['segments'].astype(np.uint16), positions=joined['positions'].astype(np.uint16),
                        weights=joined['weights'].astype(np.uint8), bytes=text_bytes(joined, tokenizer))
    print(f'wrote {len(joined["tokens"])} rows to {OUT.value}')


def text_bytes(rows: dict[str, np.ndarray], tokenizer) -> np.ndarray:
    """[rows] uint32: bytes of text that the targets which count stand for, for losses in bits a byte."""
    sizes = data.target_bytes(tokenizer)[rows['targets']]
    return np.where(rows['weights'] > 0, sizes, 0).sum(-1).astype(np.uint32)


if __name__ == '__main__':
    app.run(main)
