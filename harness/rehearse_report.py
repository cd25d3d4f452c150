"""A rehearsal in words: what fits, what does not and why, where the time would go."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.aot import Compiled
from harness.rehearse import Rehearsal

GIB = 2**30


def text(result: Rehearsal) -> str:
    chips = f'{result.chips} chip' + 's' * (result.chips > 1)
    parts = [f'{result.topology}: {chips} ({result.device}), {result.programs[0].usable_bytes / GIB:.2f} GiB usable on '
             'each. An estimate: the programs were compiled for this hardware, nothing was run.'
             + (' Quick: the compiler did not try its best.' if result.quick else '')]
    parts += [f'note: {note}' for note in result.notes]
    parts += ['\n'.join(_program(program)) for program in result.programs]
    misfits = [program.name for program in result.programs if not program.fits]
    parts.append(f'does not fit: {", ".join(misfits)}' if misfits else 'every program fits')
    return '\n\n'.join(parts)


def as_dict(result: Rehearsal) -> dict[str, Any]:
    programs = [dataclasses.asdict(p) | {'bound_s': p.bound_s, 'most_mfu': p.most_mfu} for p in result.programs]
    return dataclasses.asdict(result) | {'programs': programs, 'fits': result.fits,
                                         'estimate': 'compiled for this hardware, not run'}


def _program(p: Compiled) -> list[str]:
    if not p.argument_bytes:
        return [f'{p.name}: {p.what}', f'  memory     of {_gib(p.usable_bytes)}: DOES NOT FIT, by far', *_why(p)]
    lines = [f'{p.name}: {p.what} (compiled in {p.compile_s:.0f} s)',
             f'  memory     {_gib(p.peak_bytes)} at the peak of {_gib(p.usable_bytes)}: '
             + ('fits' if p.fits else 'DOES NOT FIT'),
             f'             arguments {_gib(p.argument_bytes)}, outputs {_gib(p.output_bytes)} of which '
             f'{_gib(p.aliased_bytes)} in place of arguments, temporaries {_gib(p.temporary_bytes)}, '
             f'code {_gib(p.code_bytes)}']
    if p.fits and p.total_bytes > p.usable_bytes:
        lines.append(f'             tight: together {_gib(p.total_bytes)}; the compiler shares memory between them')
    if not p.fits:
        lines += _why(p)
    lines.append('  largest    ' + '\n             '.join(
        f'{_gib(a.bytes):>10}  {a.what}  {"argument " if a.argument else ""}{a.source}' for a in p.largest[:5]))
    lines.append(f'  work       on each chip {p.flops:.3g} FLOPs in matrix products, {p.bytes:.3g} bytes to and from '
                 'memory' + ('' if p.trips_known else '; a loop of unknown length is counted once'))
    lines.append(f'  time       at least {_s(p.bound_s)}: compute {_s(p.compute_s)}, memory {_s(p.memory_s)}, '
                 f'interconnect {_s(p.link_s)}, if they overlap'
                 + f' (MFU at most {p.most_mfu:.0%})' * (p.name == 'train'))
    words = [f'{p.cycles:.4g} cycles = {_s(p.cycles_s)}, loops counted, collectives not'] * bool(p.cycles)
    words += [f'optimal_seconds {_s(p.optimal_s)}, the body of a loop counted once' if p.optimal_s > 0 else
              'no optimal_seconds']
    lines.append(f'             the compiler: {"; ".join(words)}')
    if not p.collectives:
        return [*lines, '  collectives none']
    lines.append('  collectives (payload of one, how many, bytes each chip sends in all, least time, what for)')
    lines += [f'    {c.kind:18} over {"+".join(c.axes) or "-":10} x{c.group:<4} {_size(c.payload_bytes):>10} '
              f'{c.count:>6} {_size(c.sent_bytes * c.count):>10} {_s(c.seconds):>9}  {_place(c.source)}'.rstrip()
              for c in p.collectives]
    return lines


def _place(source: str) -> str:
    """Without what JAX adds around every operation of a loop: 'transpose(jvp())/checkpoint/dot_general'."""
    parts = [part for part in source.split('/')[1:] if part not in ('while', 'body', 'closed_call', 'checkpoint')]
    return '/'.join(parts)


def _why(p: Compiled) -> list[str]:
    lines = [f'             the compiler says: {p.refusal}'] if p.refusal else []
    lines += ['             the numbers are those of the same program where there is room'] if p.argument_bytes else []
    if p.argument_bytes > p.usable_bytes:
        return [*lines, f'             the arguments alone are {_gib(p.argument_bytes)}: more chips, or split them '
                        'over more of the mesh (mesh.fsdp, mesh.model)']
    return lines + [f'             first to look at: {first.what}, {_gib(first.bytes)}, '
                    f'{"the argument " if first.argument else "made at "}{first.source}' for first in p.largest[:1]]


def _gib(size: float) -> str:
    return f'{size / GIB:.2f} GiB'


def _size(size: float) -> str:
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if size < 1024 or unit == 'GiB':
            return f'{size:.4g} {unit}'
        size /= 1024


def _s(seconds: float) -> str:
    for unit, scale in (('s', 1), ('ms', 1e3), ('us', 1e6)):
        if seconds * scale >= 1 or unit == 'us':
            return f'{seconds * scale:.3g} {unit}'
