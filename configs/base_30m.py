"""A language model of 30 M parameters on enwik8 with a vocabulary of 8192 byte pairs.

    headway-train --config=configs/base_30m.py --workdir=out/base_30m --config.compute_dtype=bfloat16

Meant for one GPU or a small mesh (`--config.mesh.data=8`); on two CPU cores a step of 32 rows takes half a minute.
`:tiny` is configs/base_enwik8.py:tiny with this vocabulary cut to 512.
"""

from configs import base_enwik8, training


def get_config(variant: str = ''):
    if variant == 'tiny':
        config = base_enwik8.get_config('tiny')
        config.data.tokenizer = 'bpe:512'
        config.task.kwargs.model.vocab_size = 512
        return config
    if variant:
        raise ValueError(f'unknown variant {variant!r}, known: tiny')
    config = training.defaults()
    config.task.kwargs.model = training.llama(vocab=8192, hidden=512, layers=8, heads=8, kv_heads=8, intermediate=1408,
                                              max_seq_len=1024)
    config.data.update({'tokenizer': 'bpe:8192', 'seq_len': 512, 'batch_size': 32})
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 200})
    config.num_steps = 4000
    config.samples.update({'every': 1000, 'prompts': ('The history of ',)})
    return config
