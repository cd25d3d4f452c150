"""Accepted drafts a round of several drafters on real prompts, as lines and as JSON; docs/tensorhead.md.

    python -m harness.launch.acceptance --drafters=tensorhead_smollm2_r1,prompt_lookup --sets=mt_bench,humaneval \\
        --temperatures=0,0.8 --count=40 --out=out/acceptance.json

A drafter's arguments stand behind it: early_exit:layer=28;block=1.
"""

from __future__ import annotations

from pathlib import Path

from backbone.errors import RequestError
from backbone.sampling import Sampling
from harness.launch import common

MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key, .gguf file, checkpoint, run, zoo name.')
DRAFTERS = common.list_flag('drafters', [], 'As --drafter of headway-generate.')
SETS = common.list_flag('sets', ['mt_bench'], 'mt_bench, vicuna, humaneval.')
TEMPERATURES = common.list_flag('temperatures', ['0'], '0 is greedy.')
COUNT = common.integer_flag('count', 40, 'Questions a set, of at most 128 tokens.')
MAX_NEW_TOKENS = common.integer_flag('max_new_tokens', 128, 'New tokens a question at most.')
BATCH_SIZE = common.integer_flag('batch_size', 8, 'Questions decoded at once.')
DTYPE = common.enum_flag('dtype', 'float32', ['float32', 'bfloat16'], 'Of the weights and the cache.')
SEED = common.integer_flag('seed', 0, 'Of the sampling.')
OUT = common.string_flag('out', None, 'Where to write the results as JSON.')


def main(argv: list[str]) -> None:
    if argv[1:] or not DRAFTERS.value:
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--drafters is needed')
    from harness import acceptance, compilation, models, provenance

    compilation.use_cache()
    loaded, rows = models.load(MODEL.value), []
    if loaded.tokenizer is None:
        raise RequestError(f'{MODEL.value} has no tokenizer')
    for source in SETS.value:
        for temperature in map(float, TEMPERATURES.value):
            names = [name.replace(';', ',') for name in DRAFTERS.value]
            rows += acceptance.measure(
                loaded, names, source, count=COUNT.value, max_new_tokens=MAX_NEW_TOKENS.value,
                batch_size=BATCH_SIZE.value, sampling=Sampling(temperature), seed=SEED.value, dtype=DTYPE.value)
    if OUT.value:
        common.write_json(Path(OUT.value), {**provenance.collect({'model': MODEL.value}), 'rows': rows,
                                            'base_hash': loaded.base_hash})


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
