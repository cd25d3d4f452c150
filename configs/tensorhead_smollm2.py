"""A CP head of rank 4 over the next 4 tokens, on frozen SmolLM2-135M, from text the model wrote itself.

    make zoo-tensorhead_smollm2_r4

makes the text (headway-generate, three files), trains

    headway-train --config=configs/tensorhead_smollm2.py --config.data.manual_dir=out/text/smollm2 \\
                  --config.task.kwargs.head.rank=4 --workdir=out/tensorhead_smollm2_r4

and writes zoo/tensorhead_smollm2_r4. The base runs over the text once and its hidden states are kept (bfloat16), so a
step costs the head alone. Times and results: docs/tensorhead.md.
Meant for two CPU cores: a draft vocabulary of 4096 words, 64 random positions of each row a step. `:gpu` has the whole
recipe: 16,384 words, every position, longer. `:lora` adds adapters on the attention of the last 4 layers, which makes
another base. `:pending` is a rank-1 head whose drafts read the pending token's embedding; `:more` goes on with it on
further text. `:tiny` trains a small head with its trunk, from scratch, in seconds.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.factory = 'tensorhead.task.build'
    config.task.kwargs.update({
        'base': 'smollm2-135m', 'cached': True, 'positions': 64, 'chunk': 0,
        'loss': 'discounted', 'discount': 0.9, 'first': 1.0, 'balance': '', 'balance_coef': 0.01,
        'draft_ids': 'out/text/smollm2/ids.npy',  # scripts/draft_vocabulary.py
        'head': {'horizon': 4, 'rank': 4, 'mode': 'lowrank_shared', 'inner_rank': 64, 'pending_size': 0,
                 'draft_vocab': 4096}})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 16})
    config.optimizer.update({'learning_rate': 5e-3, 'warmup_steps': 40, 'weight_decay': 0.0})
    config.compute_dtype = 'bfloat16'  # faster on a CPU that has it; the loss is the same to three digits
    config.start = ''  # directory of a run whose trained parameters this one starts from
    config.num_steps = 480
    config.eval.update({'every': 120, 'batches': 8})
    config.checkpoint.update({'every': 120})
    if variant == 'gpu':
        config.task.kwargs.update({'positions': 0, 'chunk': 4096})
        config.task.kwargs.head.draft_vocab = 16384
        config.data.update({'seq_len': 512, 'batch_size': 64})
        config.num_steps = 4000
    elif variant in ('pending', 'more'):
        config.task.kwargs.head.update({'rank': 1, 'pending_size': 512})
        config.optimizer.weight_decay = 0.1
        config.num_steps = 1200
        config.eval.every = 240
        if variant == 'more':
            config.start = 'out/tensorhead_smollm2_pending'
            config.data.manual_dir = 'out/text/smollm2_more'
            config.task.kwargs.draft_ids = 'out/text/smollm2_more/ids.npy'
            config.optimizer.learning_rate = 2.5e-3
            config.num_steps = 1000
            config.eval.every = 120
    elif variant == 'lora':
        config.task.kwargs.update({'cached': False, 'lora_rank': 16, 'lora_last': 4, 'loss_chunk': 64})
    elif variant == 'tiny':
        make_tiny(config)
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: pending, more, gpu, lora, tiny')
    return config


def make_tiny(config) -> None:
    """From scratch, on bytes of source code: nothing to download."""
    config.task.kwargs = {
        'model': training.llama(vocab=257, hidden=64, layers=2, heads=2, kv_heads=2, intermediate=176, max_seq_len=256),
        'positions': 32, 'head': {'horizon': 3, 'rank': 2, 'mode': 'lowrank_shared', 'inner_rank': 8}}
    config.data.update({'dataset': 'stdlib', 'manual_dir': '', 'tokenizer': 'bytes', 'seq_len': 64, 'batch_size': 8})
    config.compute_dtype = 'float32'
    config.num_steps = 30
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 15, 'batches': 2})
    config.checkpoint.every = 15
