"""Methods side by side on one model: a table, results.json, report.html and plots.

    headway-compare --config=configs/compare.py --workdir=out/compare [--config.max_new_tokens=128 ...]
"""

from __future__ import annotations

import pathlib
import sys

from ml_collections import config_flags

from backbone.errors import RequestError
from harness.launch import common

CONFIG = config_flags.DEFINE_config_file('config', 'configs/compare.py', 'The comparison; any key can be set.')
WORKDIR = common.string_flag('workdir', 'out/compare', 'Folder for the results, made where it is not there.')


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    from harness import (  # after the flags are known to be good: this pulls in JAX and matplotlib
        compare,
        compilation,
        report,
    )

    config = common.read_config(CONFIG)
    compilation.use_cache()
    with report.staging(WORKDIR.value) as folder:
        results = compare.run(config)
        report.write(results, folder)
    print(report.table(results))
    print(f'\nwrote {pathlib.Path(WORKDIR.value) / "report.html"} and results.json beside it')
    broken = [r.method for r in results.rows if r.mode == 'lossless' and r.dtype == 'float32' and r.identical_rate < 1]
    if broken:
        print(f'headway: {", ".join(broken)}: float32 output is not that of plain decoding', file=sys.stderr)
    return 1 if broken else 0


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
