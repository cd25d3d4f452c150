"""Trains what a config names; the same command again continues.

    headway-train --config=configs/base_enwik8.py --workdir=out/enwik8 [--config.optimizer.learning_rate=2e-3 ...]

Exit codes: 0 finished, or saved at a signal (the file `finished` in the directory tells which); 2 do not retry.
Several processes: --distributed where JAX detects them (TPU pods, Slurm, Open MPI), else all of --coordinator,
--num_processes and --process_id.
"""

from __future__ import annotations

from ml_collections import config_flags

from backbone.errors import RequestError
from harness.launch import common

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base_enwik8.py', 'The run; any key can be set.')
WORKDIR = common.string_flag('workdir', None, 'Directory of the run; shared by all processes.')
DISTRIBUTED = common.bool_flag('distributed', False, 'Start as one of several processes that JAX detects.')
COORDINATOR = common.string_flag('coordinator', None, 'host:port of process 0.')
NUM_PROCESSES = common.integer_flag('num_processes', None, 'How many processes there are.')
PROCESS_ID = common.integer_flag('process_id', None, 'Which of them this is, from 0.')


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    if not WORKDIR.value:
        raise RequestError('--workdir is missing')
    config = common.read_config(CONFIG)
    explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if any(value is not None for value in explicit) and None in explicit:
        raise RequestError('--coordinator, --num_processes and --process_id are given together')
    if DISTRIBUTED.value or None not in explicit:
        from backbone import mesh

        mesh.start_processes(*explicit)
    from harness import train  # after the processes are joined: this looks at the devices

    train.run(config, WORKDIR.value)


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
