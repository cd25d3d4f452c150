"""CP heads on stories: on frozen stories-15m, or a small model trained from scratch together with its head.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    python scripts/draft_vocabulary.py --config=configs/tensorhead_stories.py --out=out/text/stories/ids.npy
    headway-train --config=configs/tensorhead_stories.py --workdir=out/head_stories           # frozen base
    headway-train --config=configs/tensorhead_stories.py:scratch --workdir=out/head_scratch   # the paper's setting

The paper (Basharin et al., 2024) trains a nanoGPT-shaped model of 56 M parameters on TinyStories with its head;
`:scratch` is that at 1.6 M parameters and a vocabulary of 1024 byte pairs, on stories-15m's own text. Its target is
the head's own next-token law (`tensorhead.marginal.MarginalTarget`). Set `--config.task.kwargs.head.rank=1` for
independent heads.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.factory = 'tensorhead.task.build'
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 16, 'loss_on': 'all'})
    config.task.kwargs.update({
        'base': 'stories-15m', 'cached': True, 'positions': 64, 'loss': 'discounted', 'discount': 0.9,
        'draft_ids': 'out/text/stories/ids.npy',
        'head': {'horizon': 4, 'rank': 4, 'mode': 'linear_shared', 'draft_vocab': 4096}})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 40, 'weight_decay': 0.0})
    config.num_steps = 400
    config.eval.update({'every': 200, 'batches': 4})
    config.checkpoint.update({'every': 100})
    if variant == 'scratch':
        config.task.kwargs = {
            'model': training.llama(vocab=1024, hidden=160, layers=4, heads=4, kv_heads=4, intermediate=432,
                                    max_seq_len=256),
            'loss': 'joint', 'balance': 'switch',
            'head': {'horizon': 4, 'rank': 4, 'mode': 'full'}}
        config.data.update({'tokenizer': 'bpe:1024', 'seq_len': 128, 'batch_size': 16})
        config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 100, 'weight_decay': 0.1})
        config.num_steps = 1500
        config.eval.update({'every': 500, 'batches': 16})
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: scratch')
    return config
