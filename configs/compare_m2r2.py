"""Lossless self-speculation by the fast stream (docs/m2r2.md) beside every other drafter, on SmolLM2-135M.

    headway-compare --config=configs/compare_m2r2.py --workdir=out/compare_m2r2
    headway-compare --config=configs/compare_m2r2.py:code --workdir=out/compare_m2r2_code      # HumanEval prompts

Draft lengths 1 to 3 and drafts that stop where they doubt, untrained exits (at the same layer, and at the best one),
Medusa-style heads, prompt lookup, Lookahead. About 12 minutes on two cores. `scripts/m2r2_prediction.py out/...` prints
the cost formula's prediction beside each row. `:tiny` runs on a random model in under a minute.
"""

from configs import compare

ARTEFACT = 'm2r2_smollm2_draft'


def get_config(variant: str = ''):
    config = compare.get_config('tiny' if variant == 'tiny' else '')
    trained = {f'm2r2_{block}': compare.method(artefact=ARTEFACT, block=block) for block in (1, 2, 3)}
    trained['m2r2_doubt'] = compare.method(artefact=ARTEFACT, block=3, doubt=30)
    others = {
        'early_exit_same': compare.method('harness.baselines.EarlyExit', layer=1, block=1),
        'early_exit_28': compare.method('harness.baselines.EarlyExit', layer=28, block=1),
        'medusa_heads': compare.method(artefact='tensorhead_smollm2_r1', drafts=1),
        'tensorhead_pending': compare.method(artefact='tensorhead_smollm2_pending', drafts=2),
        'prompt_lookup': compare.method('harness.baselines.PromptLookup', block=3, max_ngram=3),
        'lookahead': compare.method('harness.baselines.Lookahead'),
    }
    if variant == 'tiny':
        trained = {'m2r2_2': compare.method('m2r2.drafter.build', params='m2r2.drafter.untrained', block=2)}
        others = {'early_exit_same': compare.method('harness.baselines.EarlyExit', layer=1, block=1)}
    elif variant == 'code':
        config.prompts.update({'source': 'humaneval', 'max_tokens': 128})
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: code, tiny')
    config.methods = {'plain': config.methods.plain} | trained | others
    return config
