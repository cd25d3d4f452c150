"""Plain decoding, prompt lookup, untrained early exit and the trained heads of the zoo, side by side on SmolLM2-135M.

    make compare
    headway-compare --config=configs/compare.py --workdir=out/compare

Prints the table and one verdict a row; writes results.json, report.html and PNGs to the workdir. Under 8 minutes on two
cores once the model is there (the first run also compiles; a second takes about half). Any key can be set:
`--config.max_new_tokens=128 --config.methods.prompt_lookup.kwargs.block=5 --config.price_per_hour=0.4`.
`--config.prompts.source=humaneval --config.prompts.max_tokens=128` decodes code instead of answers.
`--config=configs/compare.py:tiny` runs the same on a random model of 2 layers in under a minute.
"""

from ml_collections import ConfigDict


def method(drafter='', mode='lossless', target='backbone.model.PlainTarget', target_kwargs=None, params='', artefact='',
           model='', **kwargs):
    """A row: dotted paths of its drafter and target with their arguments.

    Arguments called cfg, stacked and cache_dtype are filled in for factories that take them and need not be given.
    params: dotted path of a function (cfg, base, dtype) -> {'<method>': parameters}, where the drafter has any.
    artefact: instead of a drafter, what was trained: a name of the zoo, or the working directory of a run. One that
    both decodes and drafts decodes, unless drafter is 'artefact'.
    model: a model of its own, of the same tokenizer: a name of the zoo, a working directory, a file. What decodes it
    takes target_kwargs; without a drafter it is decoded plainly.
    """
    return ConfigDict({'drafter': drafter, 'kwargs': kwargs, 'target': target, 'target_kwargs': target_kwargs or {},
                       'params': params, 'artefact': artefact, 'model': model, 'mode': mode})


def get_config(variant: str = '') -> ConfigDict:
    config = ConfigDict({
        'model': 'smollm2-135m',  # catalogue key or path; 'random' builds random_model
        'random_model': {},
        'prompts': {'source': 'mt_bench', 'count': 4, 'min_tokens': 33, 'max_tokens': 64},  # 'vicuna', 'random', a file
        'max_new_tokens': 48,
        'seed': 0,
        'repeats': 5,
        'dtypes': ('float32', 'bfloat16'),
        'cache_dtypes': {'float32': 'float32', 'bfloat16': 'bfloat16'},
        'batch_sizes': (1,),
        'identity_batch_sizes': (4,),  # float32, decoded once and held against plain decoding; not timed
        'max_groups': 4,  # a timed row decodes at most this many batches
        'curve': (1, 2, 4, 8, 16),
        'time_parts': True,  # draft and verification by themselves, for the break-even
        'floor_buffer_bytes': 256 << 20,  # the bandwidth is measured on no less: larger than the caches
        'quality': {'task': '', 'limit': 32},  # ppl:TEXT of every model that is decoded, over so many windows; '': not
        'price_per_hour': 0.10,  # USD for the whole machine: an assumption (2 cloud vCPUs), set your own
        'methods': {
            'plain': method('harness.baselines.Autoregressive'),
            'prompt_lookup': method('harness.baselines.PromptLookup', block=3, max_ngram=3),
            # Untrained exits agree with the last layer too rarely to pay at any depth; this one loses least.
            'early_exit': method('harness.baselines.EarlyExit', layer=28, block=1),
            # Trained heads of the zoo (docs/tensorhead.md). Few of their later drafts are kept: short ones lose least.
            'medusa_heads': method(artefact='tensorhead_smollm2_r1', drafts=1),
            'tensorhead_r8': method(artefact='tensorhead_smollm2_r8', drafts=1),
            'tensorhead_pending': method(artefact='tensorhead_smollm2_pending', drafts=2),
        },
    })
    if variant == 'tiny':
        make_tiny(config)
        config.methods.early_exit.kwargs.layer = 1
        for name in [name for name, spec in config.methods.items() if spec.artefact]:  # of another base
            del config.methods[name]
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: tiny')
    return config


def make_tiny(config: ConfigDict) -> None:
    """The same run on a random model of 2 layers: under a minute on any CPU."""
    with config.unlocked():
        config.model = 'random'
        config.random_model = ConfigDict({
            'family': 'llama', 'vocab_size': 64, 'hidden_size': 32, 'num_layers': 2, 'max_seq_len': 128,
            'attention': {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 8}, 'mlp': {'intermediate_size': 64},
            'tie_embeddings': True})
    config.prompts.update({'source': 'random', 'min_tokens': 9, 'max_tokens': 16})
    config.max_new_tokens = 12
    config.curve = (1, 2, 4)
    config.floor_buffer_bytes = 8 << 20
