"""A pretrained dense model made staggered, and healed by distillation from what it was.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    headway-train --config=configs/stagformer_heal.py:stories/ends --workdir=out/stagformer_heal/ends

A variant is MODEL/DEAL, `tiny` or `gpu/DEAL`. DEAL says which layers of the dense model go to the two stacks:

    halves   the lower half | the upper half, which has never seen an embedding
    ends     the lower half | the first quarter and the last: the layers it skips, it reads of a token late
    shared   one stack, the layers of the second one in `ends`, gone through twice
    half     control: those layers alone, a plain model of half the depth, healed alike
    ends_copy, halves_copy   the cross-attention starts as the layer's own attention, instead of saying nothing

Every one of these has half the dense model's sequential depth. stories: stories-15m on the text it wrote itself, for
two CPU cores. smollm2: SmolLM2-135M on the text of configs/tensorhead_smollm2.py (its first commands make it), the same
recipe; meant for a GPU with `gpu`, which is longer and in larger batches. tiny: a random model on source code, seconds.
What to look at: `nll` beside `teacher_nll`, on held-out text, and `agreement`.
"""

from ml_collections import ConfigDict

from configs import training

DEALS = ('halves', 'halves_copy', 'ends', 'ends_copy', 'shared', 'half')
LAYERS = {'stories': 6, 'smollm2': 30, 'gpu': 30, 'tiny': 2}


def get_config(variant: str = 'stories/ends'):
    model, _, deal = variant.partition('/')
    deal = deal or ('halves' if model == 'tiny' else 'ends')
    if model not in LAYERS or deal not in DEALS:
        raise ValueError(f'unknown variant {variant!r}: one of {", ".join(LAYERS)}, / and one of {", ".join(DEALS)}')
    config = training.defaults()
    config.task.factory = 'stagformer.distill.build'
    config.task.kwargs = ConfigDict({'beta': 0.9, 'temperature': 1.0, **dealt(LAYERS[model], deal)})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 20, 'weight_decay': 0.0, 'b2': 0.95})
    {'stories': _stories, 'smollm2': _smollm2, 'gpu': _gpu, 'tiny': _tiny}[model](config)
    return config


def dealt(layers: int, deal: str) -> dict:
    """The arguments of stagformer.distill.build that say where the layers go."""
    half, last = layers // 2, layers // 4
    ends = (*range(half - last), *range(layers - last, layers))
    if deal == 'shared':
        return {'layers': ends, 'stagger': {'shared': True}}
    if deal == 'half':
        return {'layers': ends, 'stacks': 1}
    name, _, copied = deal.partition('_')
    return {'layers': (*range(half), *ends) if name == 'ends' else (), 'cross': copied or 'zero'}


def _stories(config) -> None:
    config.task.kwargs.update({'dense': 'stories-15m', 'loss_chunk': 64})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 4, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 300
    config.eval.update({'every': 60, 'batches': 16})
    config.checkpoint.update({'every': 150, 'max_to_keep': 1})
    config.samples.update({'every': 0, 'prompts': ('Once upon a time',)})


def _smollm2(config) -> None:
    config.task.kwargs.update({'dense': 'smollm2-135m', 'loss_chunk': 64})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 4, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 1000
    config.eval.update({'every': 250, 'batches': 16})
    config.checkpoint.update({'every': 250, 'max_to_keep': 1})


def _gpu(config) -> None:
    _smollm2(config)
    config.task.kwargs.update({'loss_chunk': 128, 'remat': 'dots'})
    config.data.update({'seq_len': 512, 'batch_size': 32})
    config.num_steps = 4000
    config.optimizer.warmup_steps = 200
    config.eval.every = 500


def _tiny(config) -> None:
    config.task.kwargs.update({'random': True, 'dense': training.llama(
        vocab=257, hidden=64, layers=2, heads=2, kv_heads=2, intermediate=176, max_seq_len=256)})
    config.data.update({'dataset': 'stdlib', 'seq_len': 64, 'batch_size': 4})
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 10, 'batches': 2})
    config.checkpoint.every = 10
