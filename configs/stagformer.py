"""StagFormer beside plain models: the same text, the same steps, at four scales.

    headway-train --config=configs/stagformer.py:tiny/separate --workdir=out/stagformer/tiny/separate_0

A variant is SCALE/MODEL. Models, for a scale of L layers:

    dense         L layers: what staggering is to be as good as        half    L/2 layers: what is as fast
    separate      two stacks of L/2 layers, each with its own weights  shared  L/2 layers gone through twice
    wN            separate, a window of N positions                    pN      N stacks instead of two
    pNmix         pN, and the head reads a learned sum of all stacks
    unstaggered   control: separate, but a stack also reads the current position, so the two cannot run at once
    wide          control: L/2 layers with as many parameters as separate

tiny: 2 to 5 million parameters on the stories of configs/tensorhead_stories.py (its first command makes them; they go
into --config.data.manual_dir), one or two minutes each on two cores. scripts/stagformer_grid.py trains all models with
several seeds and prints the table. toy: seconds, to try the path. 30m: the shape of configs/base_30m.py on enwik8, for
one GPU. 135m: that of SmolLM2-135M. paper: shapes that fit what Cutler et al. (2025, arXiv 2501.15665) report, 1.6 B
for half, 2.8 B dense, 2.9 B separate, 1.75 B shared, on the Pile (--config.data.manual_dir), 250,000 steps of
1280 x 1024 tokens, for a pod. Which vocabulary of 256,000 it was is not known: give --config.data.tokenizer.
"""

import re

from ml_collections import ConfigDict

from configs import training

MODELS = ('dense', 'half', 'separate', 'shared', 'w1', 'w128', 'p4', 'unstaggered', 'wide')
SCALES = ('toy', 'tiny', '30m', '135m', 'paper')


def get_config(variant: str = 'tiny/separate'):
    scale, _, model = variant.partition('/')
    if scale not in SCALES:
        raise ValueError(f'unknown scale {scale!r} in {variant!r}, known: {", ".join(SCALES)}')
    config = training.defaults()
    shape = _SCALES[scale](config)
    stacks, stagger = parse(model or 'separate')
    options = config.task.kwargs.to_dict()
    if stacks == 1:
        shape = shape if model == 'dense' else halved(shape) if model == 'half' else widened(shape)
        config.task.kwargs = ConfigDict({'model': shape, **options})
        return config
    config.task.factory = 'stagformer.task.build'
    base = halved(shape) if stagger.get('shared') else shape
    config.task.kwargs = ConfigDict({'base': base, **cut(base['num_layers'], stacks, stagger), 'stagger': stagger,
                                     **options})
    return config


def parse(model: str) -> tuple[int, dict]:
    """(stacks, the fields of StagFormerConfig that are not defaults) of a model's name."""
    if model in ('dense', 'half', 'wide'):
        return 1, {}
    if model in ('separate', 'shared', 'unstaggered'):
        return 2, {'shared': {'shared': True}, 'unstaggered': {'lag': 0}}.get(model, {})
    if found := re.fullmatch(r'w([1-9]\d*)', model):
        return 2, {'window': int(found[1])}
    if found := re.fullmatch(r'p([2-9])(mix)?', model):
        return int(found[1]), {'mix': True} if found[2] else {}
    raise ValueError(f'unknown model {model!r}, known: {", ".join(MODELS)}, and others of the forms wN, pN, pNmix')


def cut(layers: int, stacks: int, stagger: dict) -> dict:
    """Stacks as equal as can be, the deeper ones first."""
    if stagger.get('shared') or layers % stacks == 0:
        return {'stacks': stacks}
    return {'depths': tuple((layers + stacks - 1 - s) // stacks for s in range(stacks))}


def halved(shape: dict) -> dict:
    return shape | {'num_layers': shape['num_layers'] // 2}


def widened(shape: dict) -> dict:
    """Half the layers, about sqrt(2) times as wide, with as many parameters as `separate` has (within 2 %)."""
    att, d, layers, vocab = (shape[name] for name in ('attention', 'hidden_size', 'num_layers', 'vocab_size'))
    heads, kv, size = att['num_heads'], att['num_kv_heads'], att['head_dim']
    share = heads // kv
    attention = lambda d, heads: 2 * d * size * (heads + heads // share)
    wanted = vocab * d + layers * (attention(d, heads) + 3 * d * shape['mlp']['intermediate_size']
                                   ) + layers // 2 * attention(d, heads)
    groups = round(kv * 2 ** 0.5)
    d = groups * share * size
    rest = (wanted - vocab * d) / (layers // 2) - attention(d, groups * share)
    return halved(shape) | {
        'hidden_size': d, 'mlp': {'intermediate_size': 16 * round(rest / (3 * d * 16))},
        'attention': att | {'num_heads': groups * share, 'num_kv_heads': groups}}


# --- scales: what they train on, and the shape of `dense` -------------------------------------------------------------


def _toy(config) -> dict:
    config.data.update({'dataset': 'stdlib', 'seq_len': 32, 'batch_size': 4})
    config.optimizer.update({'learning_rate': 5e-3, 'warmup_steps': 2})
    config.num_steps = 10
    config.log_every = 2
    config.eval.update({'every': 0, 'batches': 4})
    config.checkpoint.update({'every': 5, 'max_to_keep': 1})
    return training.llama(vocab=257, hidden=32, layers=4, heads=2, kv_heads=2, intermediate=80, max_seq_len=128)


def _tiny(config) -> dict:
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'bpe:1024',
                        'seq_len': 256, 'batch_size': 2, 'loss_on': 'all'})
    config.optimizer.update({'learning_rate': 3e-3, 'warmup_steps': 60, 'end_fraction': 0.02})
    config.num_steps = 600
    config.eval.update({'every': 0, 'batches': 80})
    config.checkpoint.update({'every': 300, 'max_to_keep': 1})
    return training.llama(vocab=1024, hidden=224, layers=4, heads=7, kv_heads=7, intermediate=736,
                          max_seq_len=256) | {'embed_scale': 50.0}


def _30m(config) -> dict:
    config.data.update({'tokenizer': 'bpe:8192', 'seq_len': 1024, 'batch_size': 32})
    config.optimizer.update({'learning_rate': 2e-3, 'warmup_steps': 200})
    config.num_steps = 3000
    config.compute_dtype = 'bfloat16'
    config.eval.update({'every': 500, 'batches': 32})
    config.task.kwargs.update({'loss_chunk': 256})
    return training.llama(vocab=8192, hidden=512, layers=8, heads=8, kv_heads=8, intermediate=1408,
                          max_seq_len=1024) | {'embed_scale': 512 ** 0.5}


def _135m(config) -> dict:
    config.data.update({'tokenizer': 'smollm2-135m', 'seq_len': 1024, 'batch_size': 64})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 200})
    config.num_steps = 4000
    config.compute_dtype = 'bfloat16'
    config.eval.update({'every': 500, 'batches': 16})
    config.task.kwargs.update({'loss_chunk': 256, 'remat': 'dots'})
    return training.llama(vocab=49_152, hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536,
                          max_seq_len=8192, theta=100_000.0)


def _paper(config) -> dict:
    config.data.update({'dataset': 'pile', 'tokenizer': 'tokenizer_256k', 'seq_len': 1024, 'batch_size': 1280})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 2000})
    config.num_steps = 250_000
    config.compute_dtype = 'bfloat16'
    config.mesh.data = -1
    config.eval.update({'every': 5000, 'batches': 16})
    config.checkpoint.update({'every': 1000, 'keep_every': 50_000})
    config.task.kwargs.update({'remat': 'full', 'loss_chunk': 256, 'query_chunk': 256})
    config.rehearse.update({'decode_batch': 1, 'prompt': 1024, 'context': 1024})
    return training.llama(vocab=256_000, hidden=1536, layers=36, heads=12, kv_heads=12, intermediate=12_288,
                          max_seq_len=1024)


_SCALES = {'toy': _toy, 'tiny': _tiny, '30m': _30m, '135m': _135m, 'paper': _paper}
