"""A model with ReLU in its MLPs, healed by distillation from what it was: most of its neurons are exactly zero.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    headway-train --config=configs/relufy.py --workdir=out/relu_stories
    headway-generate --model=out/relu_stories --prompt='Once upon a time'

A variant is MODEL, or MODEL/WHAT. stories: stories-15m on the text it wrote itself, minutes on two cores. smollm2:
SmolLM2-135M on the text of configs/tensorhead_smollm2.py (its first commands make it), hours there. tiny: a random
model on source code, seconds. WHAT: `before` measures the model right after the swap (a step that changes nothing);
`mlp` heals the MLPs and their norms alone. What to look at on held-out text: `perplexity` beside exp(teacher_nll), the
original model's, and `zeros`, the share of neurons that are exactly zero.
"""

from configs import training


def get_config(variant: str = 'stories'):
    model, _, what = variant.partition('/')
    if model not in _MODELS or what not in ('', 'before', 'mlp'):
        raise ValueError(f'unknown variant {variant!r}: one of {", ".join(_MODELS)}, alone or with /before or /mlp')
    config = training.defaults()
    config.task.factory = 'sparsity.relufy_task.build'
    config.task.kwargs = {'train': 'mlp' if what == 'mlp' else 'all', 'kd': 1.0, 'ce': 0.0, 'l1': 0.0,
                          'temperature': 1.0}
    config.optimizer.update({'learning_rate': 3e-4, 'warmup_steps': 20, 'weight_decay': 0.0})
    _MODELS[model](config)
    if what == 'before':
        config.task.kwargs.cached = False
        config.optimizer.update({'learning_rate': 0.0, 'warmup_steps': 0})
        config.num_steps = 1
    return config


def _stories(config) -> None:
    config.task.kwargs.update({'base': 'stories-15m', 'cached': True, 'loss_chunk': 64, 'positions': 128})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 400
    config.eval.update({'every': 100, 'batches': 16})
    config.checkpoint.update({'every': 100, 'max_to_keep': 1})


def _smollm2(config) -> None:
    config.task.kwargs.update({'base': 'smollm2-135m', 'cached': True, 'loss_chunk': 64, 'positions': 128})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.optimizer.learning_rate = 2e-4
    config.num_steps = 2000
    config.eval.update({'every': 250, 'batches': 16})
    config.checkpoint.update({'every': 250, 'max_to_keep': 1})


def _tiny(config) -> None:
    config.task.kwargs.model = training.llama(vocab=257, hidden=64, layers=2, heads=2, kv_heads=2, intermediate=176,
                                              max_seq_len=256)
    config.data.update({'dataset': 'stdlib', 'seq_len': 64, 'batch_size': 4})
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 10, 'batches': 2})
    config.checkpoint.every = 10


_MODELS = {'stories': _stories, 'smollm2': _smollm2, 'tiny': _tiny}
