"""Predictors of experts for a mixture made by configs/upcycle.py: the fast stream, and an adapter of equal size.

    headway-train --config=configs/upcycle.py --workdir=out/moe_stories
    headway-convert out/moe_stories out/moe_stories_base
    headway-train --config=configs/prefetch.py --workdir=out/prefetch_stories
    python scripts/routing_trace.py --workdir=out/prefetch_stories --out=out/stories_trace.npz

Minutes on two cores. Variants: stories; smollm2, of `configs/upcycle.py:smollm2`; tiny, a random mixture, seconds. What
to look at, on held-out text: `fast_2`, `adapter_2`, `next_router_2`, ..., the share of the experts chosen two layers on
that each predictor names among its K best; `fast_2_extra` among K / 2 more.
"""

from configs import training


def get_config(variant: str = 'stories'):
    if variant not in _MODELS:
        raise ValueError(f'unknown variant {variant!r}, known: {", ".join(_MODELS)}')
    config = training.defaults()
    config.task.factory = 'm2r2.prefetch_task.build'
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 20, 'weight_decay': 0.0})
    _MODELS[variant](config)
    return config


def _stories(config) -> None:
    config.task.kwargs = {'base': 'out/moe_stories_base', 'temperature': 0.5, 'positions': 64,
                          'prefetch': {'interval': 3, 'reach': 4, 'rank': 32}}
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.num_steps = 200
    config.eval.update({'every': 100, 'batches': 16})
    config.checkpoint.update({'every': 100, 'max_to_keep': 1})


def _smollm2(config) -> None:
    config.task.kwargs = {'base': 'out/moe_smollm2_base', 'temperature': 0.5, 'positions': 64,
                          'prefetch': {'interval': 6, 'reach': 4, 'rank': 64}}
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 400
    config.eval.update({'every': 100, 'batches': 16})
    config.checkpoint.update({'every': 100, 'max_to_keep': 1})


def _tiny(config) -> None:
    config.task.kwargs = {
        'model': training.llama(vocab=257, hidden=64, layers=4, heads=2, kv_heads=2, intermediate=32, max_seq_len=256),
        'overrides': {'moe': {'num_experts': 8, 'experts_per_token': 2}},
        'prefetch': {'interval': 2, 'reach': 3, 'rank': 8}}
    config.data.update({'dataset': 'stdlib', 'seq_len': 64, 'batch_size': 4})
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 10, 'batches': 2})
    config.checkpoint.every = 10


_MODELS = {'stories': _stories, 'smollm2': _smollm2, 'tiny': _tiny}
