"""A byte-level language model of 3.2 M parameters on enwik8, from scratch on a CPU.

    headway-train --config=configs/base_enwik8.py --workdir=out/enwik8
    headway-generate --model=out/enwik8 --prompt='The history of '

16 minutes on two cores; ends at about 2.2 bits per byte (docs/performance.md).
`--config=configs/base_enwik8.py:tiny` is the same run in under a minute: 2 layers, a few hundred steps.
`--config=configs/base_enwik8.py:bpe` trains on a vocabulary of 4096 byte pairs instead, made from the training split.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.kwargs.model = training.llama(vocab=257, hidden=256, layers=4, heads=4, kv_heads=4, intermediate=688,
                                              max_seq_len=512)
    config.data.update({'dataset': 'enwik8', 'tokenizer': 'bytes', 'seq_len': 256, 'batch_size': 8})
    config.optimizer.update({'learning_rate': 1.5e-3, 'warmup_steps': 100, 'end_fraction': 0.02})
    config.num_steps = 1800
    config.eval.update({'every': 300, 'batches': 64})
    config.samples.update({'every': 600, 'prompts': ('The history of ', "'''Anarchism''' is "), 'max_new_tokens': 160})
    config.checkpoint.update({'every': 100})
    if variant == 'tiny':
        config.task.kwargs.model = training.llama(vocab=257, hidden=64, layers=2, heads=2, kv_heads=2,
                                                  intermediate=176, max_seq_len=256)
        config.data.update({'seq_len': 64, 'batch_size': 16})
        config.num_steps = 200
        config.optimizer.update({'learning_rate': 3e-3, 'warmup_steps': 20})
        config.eval.update({'every': 100, 'batches': 8})
        config.samples.update({'every': 0, 'prompts': ('The ',), 'max_new_tokens': 48})
        config.checkpoint.update({'every': 50})
    elif variant == 'bpe':
        config.data.tokenizer = 'bpe:4096'
        config.task.kwargs.model.vocab_size = 4096
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: tiny, bpe')
    return config
