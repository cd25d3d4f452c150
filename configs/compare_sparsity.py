"""A sparse model, and the lossless drafter made of it, beside plain decoding (docs/sparsity.md), on stories-15m.

    headway-compare --config=configs/compare_sparsity.py --workdir=out/compare_sparsity
    headway-compare --config=configs/compare_sparsity.py:relu --workdir=out/compare_sparsity_relu

Rows `sparse` decode approximately with what the predictor keeps: half of the neurons, of heads and neurons, or half
chosen every 8 tokens; `masked` reads everything and multiplies by zero. Rows `lossless` draft so, and the whole model
verifies. A few minutes on two cores. `:relu` is the relufied model of docs/sparsity.md and its own predictor, after
`make zoo-relu_stories`. `:tiny` runs on a random model in under a minute.
"""

from ml_collections import ConfigDict

from configs import compare
from configs.compare import method

MODELS = {'': ('stories-15m', 'sparsity_stories'), 'relu': ('out/relu_stories_base', 'sparsity_relu_stories')}
UNITS = {'head_unit': 'head', 'block': 8}  # of both predictors


def get_config(variant: str = '') -> ConfigDict:
    if variant not in (*MODELS, 'tiny'):
        raise ValueError(f'unknown variant {variant!r}, known: relu, tiny')
    config = compare.get_config('tiny' if variant == 'tiny' else '')
    rows = {'plain': config.methods.plain,
            'prompt_lookup': method('harness.baselines.PromptLookup', block=3, max_ngram=3)}
    if variant == 'tiny':
        config.methods = ConfigDict(rows | untrained(config.random_model.to_dict()))
        return config
    config.model, artefact = MODELS[variant]
    config.methods = ConfigDict(rows | trained(artefact))
    config.prompts.update({'source': 'configs/prompts/stories.txt', 'count': 8, 'min_tokens': 5, 'max_tokens': 32})
    config.max_new_tokens = 128
    config.curve = (1, 2, 4)
    return config


def trained(artefact: str) -> dict[str, ConfigDict]:
    sparse = lambda compute='gathered', **shares: method(artefact=artefact, mode='approximate', target_kwargs={
        'sparsity': {**UNITS, **shares}, 'compute': compute})
    lossless = lambda block, **shares: method('artefact', artefact=artefact, block=block, sparsity={**UNITS, **shares})
    half = {'heads': 0.5, 'neurons': 0.5}
    return {'sparse_neurons': sparse(neurons=0.5), 'sparse_neurons_masked': sparse('masked', neurons=0.5),
            'sparse_neurons_refresh_8': sparse(neurons=0.5, refresh=8), 'sparse_half': sparse(**half),
            'lossless_1': lossless(1, neurons=0.5), 'lossless_2': lossless(2, neurons=0.5),
            'lossless_half': lossless(1, **half), 'lossless_refresh_8': lossless(2, neurons=0.5, refresh=8)}


def untrained(model: dict) -> dict[str, ConfigDict]:
    s = {'heads': 0.5, 'neurons': 0.5, 'block': 4}
    return {'sparse_half': method(target='sparsity.methods.build', mode='approximate', target_kwargs={
                'model': model, 'sparsity': s, 'selector': 'random', 'compute': 'masked'}),
            'lossless_1': method('sparsity.drafter.build', sparsity=s, selector='random', block=1)}
