"""A hybrid by itself, the hybrid as drafter of its base, and the base that skips its own attentions, on SmolLM2-135M.

    headway-compare --config=configs/compare_rad.py --workdir=out/compare_rad
    headway-compare --config=configs/compare_rad.py:stories --workdir=out/compare_rad_stories

`hybrid` decodes another model: not the same text; its perplexity stands beside the base's. `rad_N` is the base's own
text, drafted N tokens at a time by the hybrid, and `skip_N` the same without any mixer: the base less some attentions
(docs/rad.md). What was trained is the run in out/rad, of configs/rad.py; --config.methods.skip_2.kwargs.attention says
what `skip_2` leaves out: by default as many, evenly spaced.
`:tiny` runs on a random model of 2 layers in under a minute.
"""

from ml_collections import ConfigDict

from configs import compare
from configs.compare import method

RUNS = {'': 'out/rad/smollm2_k7', 'stories': 'out/rad/stories'}
EVENLY = {'': (0, 4, 8, 12, 17, 21, 25), 'stories': (0, 2, 4)}


def get_config(variant: str = '') -> ConfigDict:
    if variant not in ('', 'stories', 'tiny'):
        raise ValueError(f'unknown variant {variant!r}, known: stories, tiny')
    config = compare.get_config('tiny' if variant == 'tiny' else '')
    if variant == 'tiny':
        rad = {'layers': (1,)}
        config.methods = ConfigDict({
            'plain': config.methods.plain,
            'rad_2': method('rad.drafter.build', params='rad.drafter.untrained', rad=rad, block=2),
            'skip_2': method('rad.skip.build', attention=(1,), block=2)})
        return config
    run = RUNS[variant]
    config.quality.update({'task': 'ppl:configs/prompts/stories_held_out.txt', 'limit': 40})
    if variant == 'stories':
        config.model = 'stories-15m'
        config.prompts.update({'source': 'configs/prompts/stories.txt', 'count': 8, 'min_tokens': 5, 'max_tokens': 32})
        config.max_new_tokens = 128
    config.methods = ConfigDict({
        'plain': config.methods.plain, 'hybrid': method(model=run),
        **{f'rad_{block}': method('artefact', artefact=run, block=block) for block in (1, 2, 4)},
        **{f'skip_{block}': method('rad.skip.build', attention=EVENLY[variant], block=block) for block in (1, 2, 4)},
        'lookup': method('harness.baselines.PromptLookup', block=3, max_ngram=3)})
    return config
