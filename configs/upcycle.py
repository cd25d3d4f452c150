"""A mixture of experts from a dense model's own weights: neurons dealt to experts, routers trained by distillation.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    python scripts/upcycle_split.py --config=configs/upcycle.py
    headway-train --config=configs/upcycle.py --workdir=out/moe_stories
    headway-generate --model=out/moe_stories --prompt='Once upon a time'

or `make zoo-moe_stories`. Minutes on two cores. A variant is MODEL, or MODEL/WHAT. stories: stories-15m, 8 experts of
which 2 a token and a shared one. smollm2: SmolLM2-135M, 16 experts of which 4, for a GPU or a long evening. tiny: a
random model, seconds. WHAT: `before` measures the split with its first routers (a step that changes nothing), `router`
trains the routers alone, with every expert as it was cut. What to look at: `perplexity` beside exp(teacher_nll), the
dense model's on the same text.
"""

from configs import training


def get_config(variant: str = 'stories'):
    model, _, what = variant.partition('/')
    if model not in _MODELS or what not in ('', 'before', 'router'):
        raise ValueError(f'unknown variant {variant!r}: one of {", ".join(_MODELS)}, alone or with /before or /router')
    config = training.defaults()
    config.task.factory = 'm2r2.upcycle_task.build'
    config.task.kwargs = {'train': 'router' if what else 'experts', 'kd': 1.0, 'layer': 1.0, 'match': 1.0,
                          'balance': 0.01, 'temperature': 0.5}
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 20, 'weight_decay': 0.0})
    _MODELS[model](config)
    if what == 'before':
        config.optimizer.update({'learning_rate': 0.0, 'warmup_steps': 0})
        config.num_steps = 1
    return config


def _stories(config) -> None:
    config.task.kwargs.update({'base': 'stories-15m', 'split': 'out/moe_stories_split.npz', 'loss_chunk': 64,
                               'moe': {'num_experts': 8, 'experts_per_token': 2, 'norm_topk': True,
                                       'shared_size': 192}})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 4, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 200
    config.eval.update({'every': 100, 'batches': 16})
    config.checkpoint.update({'every': 100, 'max_to_keep': 1})


def _smollm2(config) -> None:
    config.task.kwargs.update({'base': 'smollm2-135m', 'split': 'out/moe_smollm2_split.npz', 'loss_chunk': 64,
                               'moe': {'num_experts': 16, 'experts_per_token': 4, 'norm_topk': True,
                                       'shared_size': 256}})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 1000
    config.eval.update({'every': 250, 'batches': 16})
    config.checkpoint.update({'every': 250, 'max_to_keep': 1})


def _tiny(config) -> None:
    config.task.kwargs.update({
        'model': training.llama(vocab=257, hidden=64, layers=4, heads=2, kv_heads=2, intermediate=176, max_seq_len=256),
        'moe': {'num_experts': 8, 'experts_per_token': 2, 'shared_size': 16}})
    config.data.update({'dataset': 'stdlib', 'seq_len': 64, 'batch_size': 4})
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 10, 'batches': 2})
    config.checkpoint.every = 10


_MODELS = {'stories': _stories, 'smollm2': _smollm2, 'tiny': _tiny}
