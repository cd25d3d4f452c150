"""Predictors of what matters (sparsity/predictor_task.py): which heads and neurons a token needs, from layer 0.

    headway-train --config=configs/sparsity_predictor.py:stories --workdir=out/sparsity_stories
    python scripts/sparsity_predictor.py --workdir=out/sparsity_stories           # beside the mean vector
    headway-train --config=configs/sparsity_predictor.py:stories --config.task.kwargs.criterion=fisher --workdir=...

`:smollm2` is for SmolLM2-135M, whose labels are made in the step; `:stories` for stories-15m and its own text
(configs/m2r2_stories.py says how to make that), whose labels are kept; `:tiny` trains on a random model in seconds. For
another base set task.kwargs.base. The baselines see the same rows, so as many traces: `:stories-per_layer` is one
network a layer of the same width, loss and labels; `:stories-dejavu` the original form, as its authors train it:
per-token labels, the neurons that are not zero (of a model without ReLU: set predictor.members to top).
"""

from configs import training


def get_config(variant: str = 'smollm2'):
    config = training.defaults()
    config.task.factory = 'sparsity.predictor_task.build'
    model, _, kind = variant.partition('-')
    if model not in ('stories', 'smollm2', 'tiny') or kind not in ('', 'per_layer', 'dejavu'):
        raise ValueError(f'unknown variant {variant!r}, known: stories, smollm2, tiny, each with -per_layer or -dejavu')
    {'stories': make_stories, 'smollm2': make_smollm2, 'tiny': make_tiny}[model](config)
    if kind:
        config.task.kwargs.predictor.kind = kind
    if kind == 'dejavu':
        config.task.kwargs.update({'criterion': 'l2norm', 'length': 1})
        # 512 and 1000 at 4096 channels, in proportion (predictor.dejavu_widths).
        widths = {'stories': (36, 70), 'smollm2': (72, 141), 'tiny': (8, 16)}[model]
        config.task.kwargs.predictor.update({'loss': 'bce', 'members': 'active', 'width_heads': widths[0],
                                             'width_neurons': widths[1]})
        config.optimizer.weight_decay = 0.01
    return config


def make_stories(config) -> None:
    config.task.kwargs = {
        'base': 'stories-15m', 'criterion': 'plainact', 'label': 'rest', 'window': 4, 'length': 0, 'cached': True,
        'predictor': {'kind': 'unified', 'width_heads': 64, 'width_neurons': 128, 'head_unit': 'head', 'block': 8,
                      'loss': 'mse', 'targets': 'layer', 'members': 'top'}}
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 16, 'loss_on': 'all'})
    config.optimizer.update({'learning_rate': 3e-3, 'warmup_steps': 20, 'end_fraction': 0.0, 'weight_decay': 0.01})
    config.num_steps = 1000
    config.eval.update({'every': 500, 'batches': 1})
    config.checkpoint.update({'every': 500})


def make_smollm2(config) -> None:
    make_stories(config)
    config.task.kwargs.update({'base': 'smollm2-135m', 'cached': False, 'loss_chunk': 64})
    config.task.kwargs.predictor.update({'width_heads': 128, 'head_unit': 'kv_group', 'block': 16})
    config.data.update({'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m', 'batch_size': 4, 'loss_on': ''})
    config.num_steps = 300
    config.eval.update({'every': 100, 'batches': 4})
    config.checkpoint.every = 100


def make_tiny(config) -> None:
    """A random base, bytes of source code: nothing to download."""
    make_stories(config)
    del config.task.kwargs.base
    config.task.kwargs.update({
        'model': training.llama(vocab=257, hidden=64, layers=3, heads=4, kv_heads=2, intermediate=96, max_seq_len=256),
        'window': 8, 'cached': False})
    config.task.kwargs.predictor.update({'width_heads': 32, 'width_neurons': 32, 'block': 4})
    config.data.update({'dataset': 'stdlib', 'manual_dir': '', 'tokenizer': 'bytes', 'seq_len': 64, 'batch_size': 8})
    config.num_steps = 30
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 15, 'batches': 2})
    config.checkpoint.every = 15
