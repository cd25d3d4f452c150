"""Attentions that give way to Mamba-2 mixers, which learn from what the model was (docs/rad.md).

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    headway-train --config=configs/rad.py:stories/evenly --workdir=out/rad/stories
    headway-generate --model=out/rad/stories --prompt='Once upon a time'                  # the hybrid
    headway-generate --model=stories-15m --drafter=out/rad/stories --prompt='...'         # the base, drafted for by it

A variant is MODEL, MODEL/LAYERS or MODEL/LAYERS/HOW.

MODEL   tiny      2 of 4 layers of a random model on source code: seconds
        stories   3 of 6 layers of stories-15m on the text it wrote itself: minutes on two cores
        k7, k15   7 or 15 of the 30 layers of SmolLM2-135M on the text of configs/tensorhead_smollm2.py (its first
                  commands make it): a recipe; scripts/gpu/train_rad.py trains them at length
LAYERS  set       what a search found: SETS, files that scripts/rad_search.py leaves (`--model=smollm2-135m --k=7,15`;
                  `--model=stories-15m --k=3 --out=out/rad_search_stories`)
        evenly, last, random0, random1, ...
HOW     rad, mamba_in_llama    how mixers begin; with _all everything is trained, rad_norms: the layers' norms too
        shared    output projections stay W_O: fewer to train and to store
        ungated   mixers without their norm; stepwise: a third of the layers at a time
        Controls: parallel, mixers beside attentions that stay; finetune, the attentions of the same layers trained
        on the text; self, the same distilled from what they were, which has nothing to learn and stays what it is

The gated norm makes the first step of a mixer that begins at zero hundreds of times larger: hence the warm-up.
What to look at on held-out text: `kl`, `perplexity` beside exp(teacher_nll), `overlap` and `drafts_kept`.
"""

from ml_collections import ConfigDict

from configs import training

SETS = {'tiny': (1, 2), 'stories': 'out/rad_search_stories/chosen.json', 'k7': 'out/rad_search/chosen.json',
        'k15': 'out/rad_search/chosen.json'}
COUNT = {'tiny': 2, 'stories': 3, 'k7': 7, 'k15': 15}
HOW = {'rad': {}, 'rad_norms': {'train': 'ssm_plus_norms'}, 'rad_all': {'train': 'all'},
       'mamba_in_llama': {'init_as': 'mamba_in_llama'},
       'mamba_in_llama_all': {'init_as': 'mamba_in_llama', 'train': 'all'},
       'shared': {'share_out': True}, 'ungated': {'rad': {'ssm': {'gated_norm': False}}}, 'stepwise': {'stages': 3},
       'parallel': {'rad': {'parallel': True}}, 'finetune': {'in_place': True, 'kl': 0.0, 'ce': 1.0},
       'self': {'in_place': True}}


DEFAULTS = ('set', 'rad')


def get_config(variant: str = 'stories'):
    model, layers, how, *more = [*variant.split('/'), *DEFAULTS[variant.count('/'):]]
    if model not in COUNT or how not in HOW or more:
        raise ValueError(f'unknown variant {variant!r}: one of {", ".join(COUNT)}, / set, evenly, last or random0, / '
                         f'and one of {", ".join(HOW)}')
    config = training.defaults()
    config.task.factory = 'rad.task.build'
    config.task.kwargs = ConfigDict({'count': COUNT[model], 'layers': chosen(model, layers, variant), **HOW[how]})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 100, 'weight_decay': 0.01,
                             'no_decay': (r'.*/(scale|bias|A_log|dt_bias|D)',)})
    _MODELS[model](config)
    if how == 'stepwise':
        kwargs = config.task.kwargs
        kwargs.stages, kwargs.until = min(3, COUNT[model]), max(1, config.num_steps // 2)
    return config


def chosen(model: str, layers: str, variant: str):
    """Of rad.select.chosen."""
    if layers == 'set':
        return SETS[model]
    if layers in ('evenly', 'last'):
        return layers
    name, seed = layers[:6], layers[6:]
    if name != 'random' or not seed.isdigit():
        raise ValueError(f'unknown variant {variant!r}: layers are set, evenly, last or random0, random1, ...')
    return f'random:{seed}'


def _stories(config) -> None:
    config.task.kwargs.update({'base': 'stories-15m', 'loss_chunk': 64})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/stories', 'tokenizer': 'stories-15m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 600
    config.eval.update({'every': 100, 'batches': 16})
    config.checkpoint.update({'every': 100, 'max_to_keep': 1})


def _smollm2(config) -> None:
    config.task.kwargs.update({'base': 'smollm2-135m', 'loss_chunk': 64})
    config.data.update({'dataset': 'selfgen', 'manual_dir': 'out/text/smollm2', 'tokenizer': 'smollm2-135m',
                        'seq_len': 256, 'batch_size': 8, 'loss_on': 'all'})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 4000
    config.eval.update({'every': 250, 'batches': 16})
    config.checkpoint.update({'every': 250, 'max_to_keep': 1})


def _tiny(config) -> None:
    config.task.kwargs.model = training.llama(vocab=257, hidden=64, layers=4, heads=2, kv_heads=2, intermediate=176,
                                              max_seq_len=256)
    config.data.update({'dataset': 'stdlib', 'seq_len': 64, 'batch_size': 4})
    config.num_steps = 20
    config.optimizer.warmup_steps = 10
    config.eval.update({'every': 10, 'batches': 2})
    config.checkpoint.every = 10


_MODELS = {'tiny': _tiny, 'stories': _stories, 'k7': _smollm2, 'k15': _smollm2}
