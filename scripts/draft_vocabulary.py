"""The ids a text uses most: the draft vocabulary of a head trained on it (docs/tensorhead.md).

    python scripts/draft_vocabulary.py --config=configs/tensorhead_smollm2.py --size=4096 --out=out/ids.npy

Counts the targets of the training split that the config's loss is taken on. Ids of equal count go by number, which in
a byte-pair vocabulary is by frequency too. Writes int32 [size], ascending, and prints the share of targets covered.
"""

import sys
from pathlib import Path

import numpy as np
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from harness import data
from harness.launch import common

CONFIG = config_flags.DEFINE_config_file('config', None, 'The training run; any key can be set.')
SIZE = common.integer_flag('size', 4096, 'Ids to choose.')
OUT = common.string_flag('out', None, '.npy file to write.')


def counts(rows, vocab_size: int) -> np.ndarray:
    """[vocab_size] how often each id is a target that counts."""
    total = np.zeros(vocab_size, np.int64)
    for first in range(0, len(rows), 64):
        batch = rows.batch(range(first, min(first + 64, len(rows))))
        total += np.bincount(batch['targets'][batch['weights'] > 0], minlength=vocab_size)
    return total


def main(argv: list[str]) -> None:
    if argv[1:] or not OUT.value:
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--out is needed')
    config = common.read_config(CONFIG)
    tokenizer = data.make_tokenizer(config.data)
    if not 1 <= SIZE.value <= tokenizer.vocab_size:
        raise RequestError(f'--size must be in 1..{tokenizer.vocab_size}, got {SIZE.value}')
    train, held_out = (counts(data.open_rows(config.data, split, tokenizer), tokenizer.vocab_size)
                       for split in (config.data.split, config.data.eval_split))
    ids = np.sort(np.argsort(-train, kind='stable')[:SIZE.value]).astype(np.int32)
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    np.save(OUT.value, ids)
    print(f'{OUT.value}: {len(ids)} ids, {train[ids].sum() / train.sum():.4f} of the training targets, '
          f'{held_out[ids].sum() / max(held_out.sum(), 1):.4f} of the held-out ones')


if __name__ == '__main__':
    common.run(main)
