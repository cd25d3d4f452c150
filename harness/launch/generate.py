"""Continues text, streaming, with any drafter; or answers many prompts into a file or a data set.

    headway-generate --model=smollm2-135m --prompt='The capital of France is' --drafter=prompt_lookup
    headway-generate --chat --prompt='Name three rivers.' --temperature=0.7 --top_p=0.9 --seed=1
    headway-generate --batch_file=prompts.txt --out=answers.jsonl        # one prompt a line
    headway-generate --batch_file=catalogue:gsm8k --chat --temperature=0.8 --out=out/answers --format=tfds

Ends with tokens/s, and without --out with mean accepted tokens a round. With --out it may be killed at any time: the
same command continues (docs/self_generation.md).
"""

from __future__ import annotations

from backbone.errors import RequestError
from backbone.sampling import Sampling
from harness.launch import common

MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key, .gguf file, checkpoint, run, zoo name.')
PROMPT = common.string_flag('prompt', None, 'The text to continue.')
BATCH_FILE = common.string_flag('batch_file', None, 'Prompts: a text file, one a line; .jsonl of {"prompt": ...}; '
                                'or catalogue:NAME (mt_bench, vicuna, gsm8k, humaneval, stdlib, sharegpt).')
LIMIT = common.integer_flag('limit', 0, 'With --batch_file: only so many prompts, spread evenly over it; 0: all.')
OUT = common.string_flag('out', None, 'With --batch_file: where the answers go; default: printed as JSON lines.')
FORMAT = common.enum_flag('format', 'jsonl', ['jsonl', 'tfds'], 'Of --out: JSON lines, or a TFDS data set.')
BATCH_SIZE = common.integer_flag('batch_size', 32, 'With --out: prompts decoded at once.')
SAMPLES = common.integer_flag('samples_per_prompt', 1, 'With --out: answers to each prompt.')
CHAT = common.bool_flag('chat', False, "Wrap each prompt in the model's chat template.")
DRAFTER = common.string_flag('drafter', 'none', 'none, prompt_lookup, lookahead, early_exit, a name of the '
                               'zoo, the directory of a run that trained one, or a dotted path.')
DRAFTER_ARGS = common.list_flag('drafter_args', [], 'Its integers: block=4,layer=20.')
MAX_NEW_TOKENS = common.integer_flag('max_new_tokens', 128, 'New tokens a prompt at most.')
TEMPERATURE = common.float_flag('temperature', 0.0, '0 is greedy.')
TOP_K = common.integer_flag('top_k', 0, 'Keep the k likeliest tokens; 0 keeps all.')
TOP_P = common.float_flag('top_p', 1.0, 'Keep the likeliest tokens of this mass.')
SEED = common.integer_flag('seed', 0, 'Of the sampling.')
DTYPE = common.enum_flag('dtype', 'float32', ['float32', 'bfloat16'], 'Of the weights and the cache.')


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    from harness import generation, selfgen  # after the flags are known to be good: reading models pulls in much

    texts = generation.read_prompts(PROMPT.value, BATCH_FILE.value, LIMIT.value)
    plan = selfgen.Plan(FORMAT.value, SAMPLES.value, MAX_NEW_TOKENS.value,
                        Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value), SEED.value, BATCH_SIZE.value)
    selfgen.check_flags(plan, BATCH_FILE.value, OUT.value)
    session = generation.Session.load(MODEL.value, DRAFTER.value, DRAFTER_ARGS.value, DTYPE.value, CHAT.value)
    if OUT.value is None:
        session.run(texts, plan.max_new_tokens, plan.sampling, plan.seed, stream=BATCH_FILE.value is None)
    else:
        selfgen.run(session, texts, OUT.value, plan, source=BATCH_FILE.value)


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
