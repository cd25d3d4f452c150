"""Says what this machine can run, what is wrong and how to mend it. Exit code 1 where something is wrong.

    headway-doctor [--workdir=out] [--models=smollm2-135m,mt_bench]
"""

from __future__ import annotations

from backbone.errors import RequestError
from harness.launch import common

WORKDIR = common.string_flag('workdir', 'out', 'Folder results would go to.')
MODELS = common.list_flag('models', [], 'Catalogue keys whose files are rehashed; default: what make compare reads.')


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    from harness import doctor  # imports JAX: not before the flags are known to be good

    checks = doctor.examine(workdir=WORKDIR.value, models=tuple(MODELS.value))
    print(doctor.table(checks))
    return 1 if any(check.state == 'wrong' for check in checks) else 0


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
