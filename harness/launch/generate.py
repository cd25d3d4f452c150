"""Continues text, streaming, with any drafter.

    headway-generate --model=smollm2-135m --prompt='The capital of France is' --drafter=prompt_lookup
    headway-generate --chat --prompt='Name three rivers.' --temperature=0.7 --top_p=0.9 --seed=1
    headway-generate --batch_file=prompts.txt --out=answers.jsonl        # one prompt a line

Ends with tokens/s (compilation apart), mean accepted tokens a round, and the device.
"""

from __future__ import annotations

from backbone.errors import RequestError
from backbone.sampling import Sampling
from harness.launch import common

MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key, .gguf file, or checkpoint directory.')
PROMPT = common.string_flag('prompt', None, 'The text to continue.')
BATCH_FILE = common.string_flag('batch_file', None, 'A UTF-8 file with one prompt a line, decoded as one batch.')
OUT = common.string_flag('out', None, 'With --batch_file: JSON lines {prompt, text, tokens}; default: printed.')
CHAT = common.bool_flag('chat', False, "Wrap each prompt in the model's chat template.")
DRAFTER = common.string_flag('drafter', 'none', 'none, prompt_lookup, lookahead, early_exit, or a dotted path.')
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
    from harness import generation  # after the flags are known to be good: reading models pulls in much

    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    texts = generation.read_prompts(PROMPT.value, BATCH_FILE.value)
    session = generation.Session.load(MODEL.value, DRAFTER.value, DRAFTER_ARGS.value, DTYPE.value, CHAT.value)
    session.run(texts, MAX_NEW_TOKENS.value, sampling, SEED.value, stream=BATCH_FILE.value is None, out=OUT.value)


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
