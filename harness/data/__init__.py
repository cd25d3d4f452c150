"""Text to batches: datasets as tensorflow-datasets builders, packed rows in array_record, batches by (seed, step).

    tokenizer = data.make_tokenizer(config.data)
    rows = data.open_rows(config.data, 'train', tokenizer)
    for batch in data.batches(rows, batch_size=32, seed=0): ...

See docs/data.md.
"""

from harness.data.batches import Batches, EvalBatches, batches, eval_batches
from harness.data.datasets import Dataset, Piece
from harness.data.features import FeatureRows, cached
from harness.data.rows import Rows, open_rows
from harness.data.vocabularies import make_tokenizer, target_bytes

__all__ = ['Batches', 'Dataset', 'EvalBatches', 'FeatureRows', 'Piece', 'Rows', 'batches', 'cached', 'eval_batches',
           'make_tokenizer', 'open_rows', 'target_bytes']
