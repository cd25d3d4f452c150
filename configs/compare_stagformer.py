"""A staggered model beside the plain one of as many layers: speed, and what each makes of held-out text.

    headway-compare --config=configs/compare_stagformer.py --workdir=out/compare_stagformer

Two models of the zoo, trained on the same tokens (configs/stagformer.py, tiny): `dense`, which is compared, and
`separate`, two stacks of half its layers that run at once, decoded plainly and with prompt lookup. Bits a byte are
those of configs/prompts/stories_held_out.txt, which neither has seen. A minute or two on two cores. A model of this
size is bound by the number of operations and not by bytes: docs/stagformer.md.
`--config=configs/compare_stagformer.py:grid` takes every model of scripts/stagformer_grid.py instead, from
out/stagformer/tiny (seed 0), and the shared one in recurrent decoding too.
`--config=configs/compare_stagformer.py:tiny` runs plain rows on a random model of 2 layers in under a minute.
"""

from ml_collections import ConfigDict

from configs import compare, stagformer
from configs.compare import method


def get_config(variant: str = '') -> ConfigDict:
    if variant not in ('', 'grid', 'tiny'):
        raise ValueError(f'unknown variant {variant!r}, known: grid, tiny')
    found = ('out/stagformer/tiny/{}_0' if variant == 'grid' else 'stagformer_stories_{}').format
    config = compare.get_config()
    config.model = found('dense')
    config.prompts.update({'source': 'configs/prompts/stories.txt', 'count': 8, 'min_tokens': 5, 'max_tokens': 32})
    config.max_new_tokens = 128
    config.curve = (1, 2, 4)
    config.quality.update({'task': 'ppl:configs/prompts/stories_held_out.txt', 'limit': 40})
    rows = {'plain': method('harness.baselines.Autoregressive'),
            'lookup': method('harness.baselines.PromptLookup', block=3, max_ngram=3)}
    for model in stagformer.MODELS[1:] if variant == 'grid' else ('separate',):
        rows[model] = method(model=found(model))
    rows['separate_lookup'] = method('harness.baselines.PromptLookup', model=found('separate'), block=3, max_ngram=3)
    if variant == 'grid':
        rows['recurrent'] = method(model=found('shared'), target_kwargs={'recurrent': True}, mode='approximate')
    config.methods = ConfigDict(rows)
    if variant == 'tiny':
        for other in [key for key, spec in rows.items() if spec.model]:
            del config.methods[other]
        config.quality.task = ''
        compare.make_tiny(config)
    return config
