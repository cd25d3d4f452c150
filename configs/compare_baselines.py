"""The full grid of the baselines on SmolLM2-135M: draft length, n-gram size, exit layer, Lookahead; batch 1, 4 and 16.

    headway-compare --config=configs/compare_baselines.py --workdir=out/compare_baselines

Prints and writes what configs/compare.py does, for about twenty rows a dtype and batch; which row of a method is the
best one is read off here and then stands in configs/compare.py. Takes hours on two cores (each row is compiled for each
dtype and batch size); `--config.batch_sizes='(1,)'` cuts it to about a third.
`--config=configs/compare_baselines.py:tiny` runs a small grid on a random model of 2 layers in under a minute.
"""

from ml_collections import ConfigDict

from configs import compare
from configs.compare import method


def get_config(variant: str = '') -> ConfigDict:
    tiny = variant == 'tiny'
    if variant and not tiny:
        raise ValueError(f'unknown variant {variant!r}, known: tiny')
    config = compare.get_config()
    blocks, ngrams, exits = ((3, 7, 15), (2, 3), (6, 15, 20, 25, 28)) if not tiny else ((3,), (2,), (1,))
    rows = {'plain': method('harness.baselines.Autoregressive')}
    for block in blocks:
        for ngram in ngrams:
            rows[f'prompt_lookup_k{block}_n{ngram}'] = method(
                'harness.baselines.PromptLookup', block=block, max_ngram=ngram)
    for layer in exits:
        for block in (1, 3):
            rows[f'early_exit_l{layer}_k{block}'] = method('harness.baselines.EarlyExit', layer=layer, block=block)
    for block in blocks:
        rows[f'lookahead_k{block}'] = method('harness.baselines.Lookahead', block=block)
    config.methods = ConfigDict(rows)
    if tiny:
        compare.make_tiny(config)
    else:
        config.prompts.count = 16
        config.batch_sizes = (1, 4, 16)
        config.identity_batch_sizes = ()
    return config
