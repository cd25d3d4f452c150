"""Accelerators for frozen stories-15m: two exits, for tests and quick tries. Minutes on two cores.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    headway-train --config=configs/m2r2_stories.py --workdir=out/m2r2_stories
    python -m harness.launch.artefact --workdir=out/m2r2_stories --name=m2r2_stories
    headway-train --config=configs/m2r2_gates.py:stories --workdir=out/m2r2_stories_gates

`:deed` trains the control, an adapter of equal size at each exit, on h alone.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.factory = 'm2r2.task.build'
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 16, 'loss_on': 'all'})
    config.task.kwargs.update({
        'base': 'stories-15m', 'cached': True, 'kd': 1.0, 'positions': 32,
        'm2r2': {'exits': (2, 4), 'rank': 32, 'activation': 'silu', 'ffn': True, 'stream': 'fast'}})
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 40, 'weight_decay': 0.01})
    config.start = ''  # directory of a run whose trained parameters this one starts from
    config.num_steps = 300
    config.eval.update({'every': 100, 'batches': 4})
    config.checkpoint.update({'every': 100})
    if variant == 'deed':
        config.task.kwargs.m2r2.stream = 'exit'
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: deed')
    return config
