"""What the compiler says of one program for hardware that is not here: memory, work, time, collectives.

Memory is what the program will really be given; times are estimates: the compiler's own, and the least that the chip's
data sheet allows.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from backbone.errors import CompilerMissing
from harness import hlo, hlo_costs, roofline

# The compiler's option for trying less hard, before and after JAX 0.11.
QUICK = ({'exec_time_optimization_effort': -1.0} if hasattr(jax.config, 'jax_exec_time_optimization_effort') else
         {'optimization_level': 'O0'})


@dataclasses.dataclass(frozen=True)
class Program:
    """One program to compile: what it is in words, the mesh it runs on, and the model's own FLOPs (all chips)."""

    name: str
    what: str
    mesh: Mesh
    lower: Callable[[], Any]
    model_flops: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes of the mesh with the same payload. Bytes of one, seconds of all."""

    kind: str
    axes: tuple[str, ...]
    group: int
    payload_bytes: float
    count: int
    sent_bytes: float
    seconds: float
    source: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; everything is of one chip. Bytes, FLOPs, seconds.

    peak_bytes: what the compiler holds against usable_bytes. total_bytes: arguments + outputs - aliased + temporaries
    + code, the memory if nothing is shared between them. optimal_s counts the body of a loop once, as the compiler
    does (not above 0: it has no estimate); cycles_s, compute_s, memory_s and link_s count loops in full (trips_known
    False: not all of them). model_s: the time of the model's own FLOPs at the chip's peak. refusal: the compiler's own
    words where the program does not fit; the numbers are then of the same program without limit or on chips with more
    memory, or 0 where it does not compile there either.
    """

    name: str
    what: str
    fits: bool
    refusal: str
    usable_bytes: float
    argument_bytes: float
    output_bytes: float
    aliased_bytes: float
    temporary_bytes: float
    code_bytes: float
    peak_bytes: float
    total_bytes: float
    largest: tuple[hlo_costs.Allocation, ...]
    flops: float
    bytes: float
    model_flops: float
    optimal_s: float
    cycles: float
    cycles_s: float
    compute_s: float
    memory_s: float
    link_s: float
    model_s: float
    trips_known: bool
    collectives: tuple[Collective, ...]
    compile_s: float

    @property
    def bound_s(self) -> float:
        """Compute, memory and links overlapping perfectly: the largest of them."""
        return max(self.compute_s, self.memory_s, self.link_s)

    @property
    def most_mfu(self) -> float:
        """Model FLOPs utilisation if the program took no longer than that."""
        return self.model_s / self.bound_s if self.bound_s else 0.0


def compile_program(program: Program, chip: roofline.Device, quick: bool = False,
                    with_room: Callable[[], Program | None] = lambda: None) -> Compiled:
    """with_room: the same program for chips with more memory, asked for where it does not fit these."""
    options = QUICK if quick else {}
    refusal, start = '', time.perf_counter()
    try:
        compiled = _compile(program, options)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        refusal = _complaint(error)
        # How much would it need, and for what? The same without the limit, which works up to some point, or elsewhere.
        roomier, compiled, other = with_room(), None, program
        for other, more in ((program, {'xla_tpu_no_crash_on_oom': True}), (roomier, {}))[:2 if roomier else 1]:
            try:
                compiled = _compile(other, options | more)
                break
            except jax.errors.JaxRuntimeError as worse:
                refusal += f' {_complaint(worse)}' if 'RESOURCE_EXHAUSTED' in str(worse) else ''
        if compiled is None:
            return _refused(program, chip, refusal, time.perf_counter() - start)
        program = other
    seconds = time.perf_counter() - start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, (list, tuple)) else costs
    module = hlo.parse(compiled.as_text())
    work = hlo_costs.work(module)
    found = collectives(module, program.mesh, chip)
    total = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
             + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    usable = chip.usable_bytes or chip.memory_bytes
    # The TPU compiler refuses by its peak; on a GPU the runtime allocates arguments and temporaries apart.
    peak = memory.peak_memory_in_bytes if chip.torus and memory.peak_memory_in_bytes else total
    return Compiled(
        name=program.name, what=program.what, fits=not refusal and peak <= usable, refusal=refusal,
        usable_bytes=usable, argument_bytes=memory.argument_size_in_bytes, output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes, temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes, peak_bytes=peak, total_bytes=total,
        largest=tuple(hlo_costs.largest(module)), flops=work.flops, bytes=work.bytes, model_flops=program.model_flops,
        optimal_s=costs.get('optimal_seconds', 0.0), cycles=work.cycles,
        cycles_s=work.cycles / chip.cycles_per_s if chip.cycles_per_s else 0.0,
        compute_s=work.flops / chip.flops[program.dtype], memory_s=work.bytes / chip.memory_bytes_per_s,
        link_s=sum(c.seconds for c in found),
        model_s=program.model_flops / program.mesh.size / chip.flops[program.dtype], trips_known=work.complete,
        collectives=tuple(found), compile_s=seconds)


def _compile(program: Program, options: dict[str, Any]) -> Any:
    with jax.set_mesh(program.mesh):
        try:
            return program.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:
            raise
        except RuntimeError as error:
            if 'cuDNN' not in str(error):
                raise
            raise CompilerMissing(f'{program.name}: {error} Attention by cuDNN cannot be rehearsed without it: take '
                                  'another kind, for example --config.task.kwargs.attention=dense') from error


def _complaint(error: Exception) -> str:
    """The compiler's sentence on running out of memory."""
    return ' '.join(str(error).partition('RESOURCE_EXHAUSTED:')[2].split())


def _refused(program: Program, chip: roofline.Device, refusal: str, seconds: float) -> Compiled:
    """Where the compiler gives no numbers: its words, and the array they name, or the largest one as written."""
    named = re.search(r'Allocation \(size=(\d+)\).*?\[shape: (\w+\[[\d,]*\]).*?:: ([\w.\-]+)', refusal)
    if named:
        largest = hlo_costs.Allocation(named[2], float(named[1]), named[3], False)
    else:
        with jax.set_mesh(program.mesh):
            written = re.findall(r'tensor<((?:\d+x)+)(\w+)>', program.lower().as_text())
        arrays = (hlo.leaves(f'{dtype}[{dims[:-1].replace("x", ",")}]')[0] for dims, dtype in set(written))
        array = max(arrays, key=lambda a: a.bytes)
        largest = hlo_costs.Allocation(str(array), array.bytes, 'the program as written, not yet split over the chips',
                                       False)
    nothing = {f.name: 0.0 for f in dataclasses.fields(Compiled)}
    return Compiled(**nothing | {
        'name': program.name, 'what': program.what, 'fits': False, 'refusal': refusal, 'largest': (largest,),
        'usable_bytes': chip.usable_bytes or chip.memory_bytes, 'model_flops': program.model_flops,
        'trips_known': False, 'collectives': (), 'compile_s': seconds})


def collectives(module: hlo.Module, mesh: Mesh, chip: roofline.Device) -> list[Collective]:
    """The program's collectives, alike ones together, the slowest first."""
    alike: dict[tuple, list[hlo_costs.Collective]] = {}
    everywhere = (tuple(range(mesh.size)),)
    for one in hlo_costs.collectives(module):
        alike.setdefault((one.kind, one.groups or everywhere, one.payload), []).append(one)
    result = []
    for (kind, groups, payload), ones in alike.items():
        axes, dimensions = _extent(groups, mesh)
        size, count = max(map(len, groups)), sum(one.count for one in ones)
        if size > 1:
            seconds = count * roofline.collective_seconds(chip, kind, payload, size, dimensions)
            result.append(Collective(kind, axes, size, payload, count, roofline.sent_bytes(kind, payload, size),
                                     seconds, next((one.source for one in ones if one.source), '')))
    return sorted(result, key=lambda c: -c.seconds)


def _extent(groups: tuple[tuple[int, ...], ...], mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """(axes of the mesh, number of torus dimensions) along which members of a group differ."""
    devices = mesh.devices.reshape(-1)
    axes, dimensions = set(), set()
    for group in groups[:1] if len(groups[0]) != 2 else groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        axes |= {mesh.axis_names[i] for i in np.flatnonzero(np.ptp(places, axis=1))}
        if hasattr(devices[0], 'coords'):
            coordinates = np.array([devices[i].coords for i in group])
            dimensions |= set(np.flatnonzero(np.ptp(coordinates, axis=0)).tolist())
    return tuple(a for a in mesh.axis_names if a in axes), len(dimensions) or 1
