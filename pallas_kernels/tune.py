"""Measures every op on the device at hand and writes the table that `choice.py` reads.

    python -m pallas_kernels.tune [--out=FOLDER] [--ops=stacked_gemv,...] [--tiny]

Writes FOLDER/<device kind>.json (default: pallas_kernels/measured, where it takes effect) and prints the same as
Markdown. A kernel that does not compile or run has its error in the place of its time, and is never chosen. `--tiny`
takes the tests' shapes and works on any host: kernels are then interpreted, and the file says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax

from pallas_kernels import api, bench
from pallas_kernels.choice import MEASURED, PLATFORM_OF, file_name
from pallas_kernels.modes import interpreter


def main(argv: list[str] | None = None) -> Path:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument('--out', default=str(MEASURED))
    given.add_argument('--ops', default=','.join(api.OPS))
    given.add_argument('--tiny', action='store_true')
    given = given.parse_args(argv)
    device, platform = jax.devices()[0], PLATFORM_OF.get(jax.default_backend())
    if platform is None and not given.tiny:
        raise SystemExit(f'tune: there are kernels for TPUs and GPUs, and this is a {device.device_kind}; '
                         '--tiny interprets the tests\' shapes')
    found = {'device': device.device_kind, 'jax': jax.__version__, 'interpreted': platform is None,
             'rates': bench.rates(64, 512) if given.tiny else bench.rates(), 'rows': []}
    path = Path(given.out) / f'{file_name(device.device_kind)}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in given.ops.split(','):
        for op, kernel, spec in _shapes(api.OPS[name], platform, given.tiny):
            found['rows'].append(_row(op, kernel, spec, given.tiny))
            path.write_text(json.dumps(found, indent=1) + '\n')  # after every row: a session may end at any time
    print(markdown(found))
    return path


def _shapes(op, platform: str | None, tiny: bool):
    for kernel in op.kernels:
        if platform in (None, kernel.platform):
            unsupported = op.unsupported.get(kernel.platform, ())
            specs = [spec for spec in op.specs if spec.bench != tiny and spec.name not in unsupported]
            yield from ((op, kernel, spec) for spec in (specs[:1] if tiny else specs))


def _row(op, kernel, spec, tiny: bool) -> dict:
    if tiny:
        kernel = dataclasses.replace(kernel, run=functools.partial(kernel.run, interpret=interpreter(kernel.platform)))
    try:
        return bench.row(op, kernel, spec, 0.0, 2) if tiny else bench.row(op, kernel, spec)
    except Exception as error:  # whatever a compiler or driver raises: the other rows are still worth having
        return {'op': op.name, 'spec': spec.name, 'sizes': op.sizes(*spec.shapes()), 'dtype': spec.dtype,
                'error': f'{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ""}'}


def markdown(found: dict) -> str:
    """The table for people: microseconds, the share of the measured copy rate, and the kernel's speed over XLA's."""
    rates = found['rates']
    lines = [f'{found["device"]}, jax {found["jax"]}' + (', interpreted: no times to compare' * found['interpreted']),
             f'copy {rates["copy_bytes_per_s"] / 1e9:.0f} GB/s, '
             f'product {rates["matmul_flops_per_s"] / 1e12:.1f} TFLOP/s', '',
             '| op | shape | XLA us | kernel us | kernel / floor | of copy rate | XLA / kernel | difference |',
             '|---|---|---|---|---|---|---|---|']
    for row in found['rows']:
        if 'error' in row:
            lines.append(f'| {row["op"]} | {row["spec"]} | | {row["error"]} | | | | |')
            continue
        floor = max(row['bytes'] / rates['copy_bytes_per_s'], row['flops'] / rates['matmul_flops_per_s'])
        share = row['bytes'] / row['kernel_s'] / rates['copy_bytes_per_s']
        lines.append(f'| {row["op"]} | {row["spec"]} | {row["xla_s"] * 1e6:.1f} | {row["kernel_s"] * 1e6:.1f} | '
                     f'{row["kernel_s"] / floor:.2f} | {share:.0%} | {row["xla_s"] / row["kernel_s"]:.2f} | '
                     f'{row["difference"]:.1e} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
