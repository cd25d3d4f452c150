"""Converts a checkpoint between GGUF, Hugging Face and Headway form.

    headway-convert smollm2-135m out/smollm2 --to=hf --check
    headway-convert out/smollm2 out/smollm2.gguf --dtype=q8_0 --check
    headway-convert out/enwik8 out/enwik8.gguf                      # a training directory: its newest checkpoint
"""

from __future__ import annotations

from backbone.errors import RequestError
from harness.launch import common

TO = common.enum_flag('to', None, ['gguf', 'hf', 'headway'], 'Form of DST; default: gguf for *.gguf, else headway.')
DTYPE = common.enum_flag('dtype', 'f32', ['f32', 'f16', 'bf16', 'q8_0'],
                         'Numbers in DST. gguf: f32, f16, q8_0; hf and headway: f32, f16, bf16.')
CHECK = common.bool_flag('check', False, 'Read DST back; print how far both sides agree on 512 tokens of real text.')
OVERWRITE = common.bool_flag('overwrite', False, 'Replace DST where it exists.')


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise RequestError(f'usage: headway-convert SRC DST [--check], got {len(argv) - 1} arguments')
    from harness import convert  # after the flags are known to be good: reading files pulls in much

    src, dst = argv[1:]
    found = convert.convert(src, dst, TO.value, DTYPE.value, check=CHECK.value, overwrite=OVERWRITE.value)
    print(f'wrote {dst}')
    for line in found.lines() if found else ():
        print(line)


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
