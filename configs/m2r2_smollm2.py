"""Accelerators for frozen SmolLM2-135M, from text the model wrote itself.

    make zoo-m2r2_smollm2_draft                   # the one that drafts (docs/m2r2.md), about 30 minutes on two cores
    headway-train --config=configs/m2r2_smollm2.py --workdir=out/m2r2_smollm2_draft

The default drafts: one exit after the first layer, a fast stream that also reads the last hidden state of the token
before (`carry`), a draft vocabulary of 4096 words. The base's final hidden states are computed once and kept, so a step
runs that one layer only. `:more` goes on with it on further text, from what the stream itself carries (`unroll`);
`:gpu` is one run over all of it. `:exits` has two exits for early exit (mode A), the same text; `:deed` its control, an
adapter of equal size on h alone; `:tiny` trains on a random model in seconds. Results: docs/m2r2.md.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.factory = 'm2r2.task.build'
    config.task.kwargs.update({
        'base': 'smollm2-135m', 'cached': True, 'unroll': 1, 'kd': 1.0, 'ce': 0.0, 'tv': 0.0, 'cos': 0.0,
        'draft_ids': 'out/text/smollm2/ids.npy',  # scripts/draft_vocabulary.py
        'm2r2': {'exits': (1,), 'rank': 256, 'activation': 'silu', 'ffn': True, 'qo_rank': 16, 'carry': 512,
                 'stream': 'fast', 'draft_vocab': 4096}})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 16})
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 40, 'weight_decay': 0.01})
    config.compute_dtype = 'bfloat16'  # faster on a CPU that has it
    config.start = ''  # directory of a run whose trained parameters this one starts from
    config.num_steps = 600
    config.eval.update({'every': 100, 'batches': 8})
    config.checkpoint.update({'every': 100})
    if variant == 'more':
        config.start = 'out/m2r2_smollm2_draft'
        config.data.manual_dir = 'out/text/smollm2_more'
        config.task.kwargs.update({'draft_ids': 'out/text/smollm2_more/ids.npy', 'unroll': 2, 'positions': 128})
        config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 5})
        config.num_steps = 150
        config.eval.every = 50
        config.checkpoint.every = 50
    elif variant == 'gpu':
        config.task.kwargs.unroll = 3
        config.task.kwargs.m2r2.draft_vocab = 16384
        config.data.update({'seq_len': 512, 'batch_size': 64})
        config.num_steps = 6000
    elif variant in ('exits', 'deed'):
        config.num_steps = 120
        config.task.kwargs.update({'unroll': 1, 'draft_ids': '', 'positions': 32})
        config.data.batch_size = 8
        config.task.kwargs.m2r2.update({'exits': (10, 20), 'rank': 64, 'qo_rank': 0, 'carry': 0, 'draft_vocab': 0,
                                        'stream': 'fast' if variant == 'exits' else 'exit'})
    elif variant == 'tiny':
        make_tiny(config)
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: more, gpu, exits, deed, tiny')
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
