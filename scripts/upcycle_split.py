"""Deals the neurons of a config's dense base to experts, and makes their first routers (m2r2/neuron_split.py).

    python scripts/upcycle_split.py --config=configs/upcycle.py

Reads rows of the config's training split; writes the file its task.kwargs.split names, which goes with the run.
"""

import sys
from pathlib import Path

from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import formats
from backbone.errors import RequestError
from harness import data
from harness.launch import common

CONFIG = config_flags.DEFINE_config_file('config', None, 'The training run; any key can be set.')
ROWS = common.integer_flag('rows', 16, 'Rows of text to look at.')
BY = common.string_flag('by', 'activity', 'What makes neurons alike: activity, or weights.')
SPREAD = common.float_flag('spread', 0.5, "Standard deviation over experts of the first routers' logits.")


def main(argv: list[str]) -> None:
    config = common.read_config(CONFIG)
    if argv[1:] or not config.task.kwargs.get('split'):
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else
                           'the config names no split: a random model has none')
    from backbone.config import MoeConfig
    from m2r2 import upcycle

    options = config.task.kwargs
    loaded = formats.load(options.base)
    rows = data.open_rows(config.data, config.data.split, data.make_tokenizer(config.data))
    if not 1 <= ROWS.value <= len(rows):
        raise RequestError(f'--rows must be in 1..{len(rows)}, got {ROWS.value}')
    every = len(rows) // ROWS.value
    tokens = rows.batch(range(0, every * ROWS.value, every))['tokens']
    split = upcycle.choose(loaded.config, loaded.params, tokens, MoeConfig(**options.moe), BY.value, config.seed,
                           SPREAD.value, say=print)
    upcycle.save(split, options.split, loaded.base_hash)
    print(f'wrote {options.split}')


if __name__ == '__main__':
    common.run(main)
