"""Packs training rows into one small file that travels to a GPU machine without a data pipeline.

    python scripts/gpu/pack_text.py --config=configs/base_135m.py --rows=4096 --out=rows.npz

Rows are those `headway-train` would read for the same config (docs/data.md), in the order of its seed.
"""

from __future__ import annotations

import itertools

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from harness import data

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base_135m.py', 'Whose data.')
ROWS = flags.DEFINE_integer('rows', 4096, 'How many rows of data.seq_len tokens.')
OUT = flags.DEFINE_string('out', 'rows.npz', 'File to write.')


def main(argv: list[str]) -> None:
    config = CONFIG.value
    tokenizer = data.make_tokenizer(config.data)
    rows = data.open_rows(config.data, config.data.split, tokenizer)
    stream = data.batches(rows, batch_size=64, seed=config.seed)
    count = -(-ROWS.value // 64)
    batches = list(itertools.islice(stream, count))
    stream.close()
    joined = {k: np.concatenate([b[k] for b in batches])[:ROWS.value] for k in batches[0]}
    wide = tokenizer.vocab_size > 1 << 16
    np.savez_compressed(OUT.value, tokens=joined['tokens'].astype(np.uint32 if wide else np.uint16),
                        targets=joined['targets'].astype(np.uint32 if wide else np.uint16),
                        segments=joined['segments'].astype(np.uint16), positions=joined['positions'].astype(np.uint16),
                        weights=joined['weights'].astype(np.uint8))
    print(f'wrote {len(joined["tokens"])} rows to {OUT.value}')


if __name__ == '__main__':
    app.run(main)
