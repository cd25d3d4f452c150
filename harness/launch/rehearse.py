"""Compiles a training config for hardware that is not here: does it fit, what does it move, how long might it take.

    headway-rehearse --config=configs/pod_llama31_8b.py --topology=v5e:16x16 [--config.data.batch_size=512 ...]

An estimate: nothing is run. Exit codes: 0 every program fits; 1 one does not; 2 bad input.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import config_flags

from backbone.errors import RequestError
from harness.launch import common

CONFIG = config_flags.DEFINE_config_file('config', 'configs/pod_llama31_8b.py', 'The run; any key can be set.')
TOPOLOGY = common.string_flag('topology', None, 'Chip and arrangement: v5e:4x4, v5p:2x2x1, v6e:16x16, h200:1.')
PROGRAMS = common.list_flag('programs', ['train', 'prefill', 'decode'], 'Of those, and draft, round.')
QUICK = common.bool_flag('quick', False, 'Let the compiler try less hard: several times faster, a rougher picture.')
JSON = common.string_flag('json', None, 'File for everything that is printed, and more, as JSON.')


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    if not TOPOLOGY.value:
        raise RequestError('--topology is missing, for example --topology=v5e:4x4')
    import jax

    jax.config.update('jax_platforms', 'cpu')  # the compiler is all that is wanted of the hardware's library
    from harness import provenance, rehearse, rehearse_report

    config = common.read_config(CONFIG)
    result = rehearse.rehearse(config, TOPOLOGY.value, tuple(PROGRAMS.value), quick=QUICK.value,
                               say=lambda line: print(line, flush=True))
    if JSON.value:
        common.write_json(Path(JSON.value), provenance.collect(config) | rehearse_report.as_dict(result))
    print('\n' + rehearse_report.text(result))
    return 0 if result.fits else 1


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
