"""Experts in host memory: all resident, on demand, kept by least recent use, and loaded ahead by each predictor.

    headway-train --config=configs/upcycle.py --workdir=out/moe_stories                     # or make zoo-moe_stories
    headway-convert out/moe_stories out/moe_stories_base
    headway-train --config=configs/prefetch.py --workdir=out/prefetch_stories
    headway-compare --config=configs/compare_moe.py --workdir=out/compare_moe

`plain` is the same model in the jitted loop; every other row is the host's loop (m2r2/expert_target.py), and `resident`
is what the others stand beside. Each row's settings end with what moved in the last call: hits, late hits, demands and
bytes. On a CPU host memory and device memory are one: what is seen there is that outputs are equal and how often
predictions are right; the time of a copy is for a GPU (scripts/gpu/moe_offload.py) or the simulator
(scripts/expert_simulation.py) to say. `:tiny` runs the plain row on a random model in under a minute.
"""

from ml_collections import ConfigDict

from configs import compare
from configs.compare import method

PREDICTORS = ('fast', 'adapter', 'next_router', 'previous', 'frequency', 'random')


def get_config(variant: str = '') -> ConfigDict:
    if variant not in ('', 'tiny'):
        raise ValueError(f'unknown variant {variant!r}, known: tiny')
    config = compare.get_config()
    config.model = 'out/moe_stories_base'
    config.prompts.update({'source': 'configs/prompts/stories.txt', 'count': 4, 'min_tokens': 5, 'max_tokens': 32})
    config.max_new_tokens = 64
    config.dtypes = ('float32',)
    config.curve = (1,)
    row = lambda predictor, share, **more: method(artefact='out/prefetch_stories', target_kwargs={
        'predictor': predictor, 'share': share, **more})
    rows = {'plain': method('harness.baselines.Autoregressive'), 'resident': row('none', 1.0),
            'on_demand': row('none', 0.25, keep=False), 'lru_25': row('none', 0.25), 'lru_50': row('none', 0.5)}
    rows |= {f'{name}_25': row(name, 0.25) for name in PREDICTORS}
    config.methods = ConfigDict(rows)
    if variant == 'tiny':
        config.methods = ConfigDict({'plain': rows['plain']})
        compare.make_tiny(config)
    return config
