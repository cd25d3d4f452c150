"""Accelerators for frozen SmolLM2-135M, from text the model wrote itself.

    make zoo-m2r2_smollm2_draft                   # the one that drafts (docs/m2r2.md), about half an hour on two cores
    headway-train --config=configs/m2r2_smollm2.py --config.data.manual_dir=out/text/smollm2 \\
                  --workdir=out/m2r2_smollm2_draft

The default drafts: one exit after few layers, a fast stream that also reads the last hidden state of the token before
(`carry`), a draft vocabulary of 4096 words. The base's final hidden states are computed once and kept, so a step runs
its first layers only. `:exits` has three exits for early exit (mode A), the same text; `:deed` its control, an adapter
of equal size on h alone; `:tiny` trains on a random model in seconds. Results: docs/m2r2.md.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.factory = 'm2r2.task.build'
    config.task.kwargs.update({
        'base': 'smollm2-135m', 'cached': True, 'unroll': 2, 'kd': 1.0, 'ce': 0.0, 'tv': 0.0, 'cos': 0.0,
        'draft_ids': 'out/text/smollm2/ids.npy',  # scripts/draft_vocabulary.py
        'm2r2': {'exits': (3,), 'rank': 256, 'activation': 'silu', 'ffn': True, 'qo_rank': 16, 'carry': 512,
                 'stream': 'fast', 'draft_vocab': 4096}})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 16})
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 40, 'weight_decay': 0.01})
    config.compute_dtype = 'bfloat16'  # faster on a CPU that has it
    config.start = ''  # directory of a run whose trained parameters this one starts from
    config.num_steps = 400
    config.eval.update({'every': 100, 'batches': 8})
    config.checkpoint.update({'every': 100})
    if variant in ('exits', 'deed'):
        config.task.kwargs.update({'unroll': 1, 'draft_ids': ''})
        config.task.kwargs.m2r2.update({'exits': (8, 15, 23), 'rank': 64, 'qo_rank': 0, 'carry': 0, 'draft_vocab': 0,
                                        'stream': 'fast' if variant == 'exits' else 'exit'})
    elif variant == 'tiny':
        make_tiny(config)
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: exits, deed, tiny')
    return config


def make_tiny(config) -> None:
    """A random base, bytes of source code: nothing to download."""
    config.task.kwargs = {
        'model': training.llama(vocab=257, hidden=64, layers=4, heads=2, kv_heads=2, intermediate=176, max_seq_len=256),
        'unroll': 2, 'm2r2': {'exits': (2,), 'rank': 8, 'carry': 16}}
    config.data.update({'dataset': 'stdlib', 'manual_dir': '', 'tokenizer': 'bytes', 'seq_len': 64, 'batch_size': 8})
    config.compute_dtype = 'float32'
    config.num_steps = 30
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 15, 'batches': 2})
    config.checkpoint.every = 15
