"""What a compiled program does on one chip, read off its HLO text: collectives, FLOPs, bytes, cycles, big arrays.

XLA's own cost analysis counts the body of a loop once; here every number is multiplied by how often its instruction
runs (harness/hlo.py). Bytes are those that go to and from main memory: what the compiler keeps on the chip is free.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from harness.hlo import Computation, Instruction, Module, Step, schedule

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
    """payload: bytes of the gathered array of an all-gather, of the unreduced one of a reduce-scatter, else of what
    one chip holds. count: times it runs. groups: partition numbers that take part together (pairs, of a permute);
    empty: all. source: where in the traced function it comes from."""

    kind: str
    payload: float
    count: int
    groups: tuple[tuple[int, ...], ...]
    source: str


def collectives(module: Module) -> list[Collective]:
    """Every collective of the program. An asynchronous one is counted once, at its start."""
    found = []
    for step in schedule(module):
        for instruction, computation in _with_insides(module, step):
            kind = instruction.opcode.removesuffix('-start')
            if kind not in KINDS or _continues(instruction, computation):
                continue
            groups = _groups(instruction)
            payload = sum(leaf.bytes for name in instruction.operands if name in computation
                          for leaf in computation[name].arrays)
            if kind == 'all-gather':
                payload *= max(map(len, groups), default=1)
            if kind == 'all-reduce' and computation is not step.computation and _keeps_a_slice(computation):
                kind = 'reduce-scatter'
            found.append(Collective(kind, payload, step.count, groups, instruction.op_name))
    return found


def _with_insides(module: Module, step: Step) -> Iterable[tuple[Instruction, Computation]]:
    yield step.instruction, step.computation
    if step.instruction.opcode == 'fusion':
        yield from _inside(module, step.instruction)


def _inside(module: Module, fusion: Instruction) -> Iterable[tuple[Instruction, Computation]]:
    called = module.called(fusion)
    for instruction in called.instructions.values() if called else ():
        yield instruction, called
        if instruction.opcode == 'fusion':
            yield from _inside(module, instruction)


def _continues(instruction: Instruction, computation: Computation) -> bool:
    """TPU spreads a collective over fusions that compute meanwhile: each shows it, the first one starts it."""
    if 'chain_id=' not in instruction.attributes:
        return False
    return not any('AsyncCollectiveStart' in i.attributes for i in computation.instructions.values())


def _keeps_a_slice(computation: Computation) -> bool:
    """An all-reduce fused with the slice of its result that the chip keeps moves the bytes of a reduce-scatter."""
    root = computation[computation.root]
    while root.opcode in ('bitcast', 'copy', 'convert', 'reshape') and computation.operand(root, 0) is not None:
        root = computation.operand(root, 0)
    return root.opcode == 'dynamic-slice'


def _groups(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Partition numbers of each group; handles listed groups, `[2,4]<=[8]` and `mesh['a'=2,'b'=4] {'b'}`."""
    text = instruction.attributes
    pairs = re.search(r'source_target_pairs=\{(\{[^=]*?\})\}', text)
    listed = re.search(r'replica_groups=\{(\{[^=]*?\})\}', text)
    if pairs or listed:
        return tuple(tuple(int(n) for n in re.findall(r'\d+', g)) for g in
                     re.findall(r'\{([\d,\s]*)\}', (pairs or listed)[1]))
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if iota:
        shape, source, order = ([int(n) for n in (part or '').split(',') if n] for part in iota.groups())
        numbers = np.arange(math.prod(source)).reshape(source)
        return tuple(map(tuple, (numbers.transpose(order) if order else numbers).reshape(shape).tolist()))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))?\s*\{([^}]*)\}", text)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        mine = re.findall(r"'([^']+)'", named[3])
        numbers = np.arange(math.prod(axes.values()))
        if named[2] and '[' not in named[2]:
            numbers = np.array([int(n) for n in re.findall(r'\d+', named[2])])
        numbers = numbers.reshape(tuple(axes.values()))
        order = [i for i, a in enumerate(axes) if a not in mine] + [list(axes).index(a) for a in mine if a in axes]
        size = math.prod(axes[a] for a in mine if a in axes)
        return tuple(map(tuple, numbers.transpose(order).reshape(-1, size).tolist()))
    return ()


# --- work -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one chip. flops: of matrix products. cycles: the compiler's own estimate, summed over instructions (0 where
    the compiler writes none); collectives have none. complete: False where a loop's trips are unknown (counted once).
    """

    flops: float
    bytes: float
    cycles: float
    complete: bool


def work(module: Module) -> Work:
    flops = moved = cycles = 0.0
    complete = True
    for step in schedule(module):
        complete &= step.known
        flops += step.count * sum(_flops(i, c) for i, c in _with_insides(module, step))
        moved += step.count * _bytes(module, step.computation, step.instruction)
        estimate = re.search(r'"estimated_cycles":"(\d{1,15})"', step.instruction.attributes)  # longer: it gave up
        cycles += step.count * float(estimate[1]) if estimate else 0.0
    return Work(flops, moved, cycles, complete)


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode not in ('dot', 'convolution'):
        return 0.0
    left, right = computation.operand(instruction, 0), computation.operand(instruction, 1)
    if left is None or right is None:
        return 0.0
    dims, kernel, out = left.arrays[0].dims, right.arrays[0].dims, instruction.arrays[0].dims
    if instruction.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
        return 2.0 * math.prod(out) * math.prod(dims[int(i)] for i in (contracted[1] if contracted else '').split(',')
                                                if i)
    # On TPU matrix products are convolutions; a batch dimension becomes a spatial one whose window touches one place.
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    if not labels:
        return 0.0
    inputs, weights, outputs = labels.groups()
    total = 2.0 * kernel[weights.index('i')] * out[outputs.index('f')] * out[outputs.index('b')]
    for spatial in sorted(set(inputs) - {'b', 'f'}):
        window = {key: _window(instruction, key, int(spatial)) for key in ('size', 'stride', 'lhs_dilate',
                                                                           'rhs_dilate', 'pad')}
        total *= _touches(dims[inputs.index(spatial)], out[outputs.index(spatial)], **window)
    return total


def _window(instruction: Instruction, key: str, dimension: int) -> int:
    found = re.search(rf'window=\{{[^}}]*\b{key}=([\dx_\-]+)', instruction.attributes)
    if not found:
        return 0 if key == 'pad' else 1
    return int(found[1].split('x')[dimension].split('_')[0])  # of the padding, the low side


def _touches(size_in: int, size_out: int, size: int, stride: int, lhs_dilate: int, rhs_dilate: int, pad: int) -> int:
    """Pairs (output place, window place) that fall on a real input."""
    place = np.arange(size_out)[:, None] * stride + np.arange(size)[None] * rhs_dilate - pad
    return int(((place % lhs_dilate == 0) & (place >= 0) & (place < (size_in - 1) * lhs_dilate + 1)).sum())


# Nothing moves: names for parts of other values, control flow whose insides are counted, and the second half of a pair.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'async-start', 'async-update', 'async-done', 'copy-done', 'slice-done',
         'opt-barrier',
         *(f'{kind}-done' for kind in KINDS)}


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in _FREE or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode == 'fusion' and (called := module.called(instruction)):
        read = sum(min(_read(module, called, index), _main_memory(operand))
                   for index, operand in enumerate(operands))
        return read + min(_written(called), _main_memory(instruction))
    if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
        return 2 * _main_memory(instruction)
    if instruction.opcode in ('dynamic-update-slice', 'scatter'):
        return 2 * _main_memory(operands[-1] if instruction.opcode == 'scatter' else operands[1])
    if instruction.opcode == 'copy-start':  # (destination, source, context)
        return sum(_leaf_bytes(leaf) for leaf in instruction.arrays[:2])
    if instruction.opcode == 'slice-start':  # ((source), slice, context)
        return instruction.arrays[1].padded_bytes + _leaf_bytes(instruction.arrays[1])
    return _main_memory(instruction) + sum(map(_main_memory, operands))


def _leaf_bytes(leaf) -> float:
    return leaf.padded_bytes if leaf.space == 0 else 0.0


def _main_memory(instruction: Instruction) -> float:
    return sum(map(_leaf_bytes, instruction.arrays))


def _read(module: Module, computation: Computation, index: int) -> float:
    """Bytes a fusion reads of its operand `index`: of one that is only sliced, the slices."""
    parameter = computation.parameters.get(index)
    return math.inf if parameter is None else _read_of(module, computation, parameter)


def _read_of(module: Module, computation: Computation, value: Instruction,
             outside: Callable[[], float] = lambda: math.inf) -> float:
    """outside: what is read of the computation's result, where `value` is that."""
    total = outside() if value.name == computation.root else 0.0
    for user in computation.users[value.name]:
        place = user.operands.index(value.name)
        if user.opcode in ('dynamic-slice', 'slice', 'gather') and place == 0:
            total += _padded(user)
        elif user.opcode == 'dynamic-update-slice' and place == 0:
            continue  # written in place
        elif user.opcode == 'bitcast':
            total += _read_of(module, computation, user, outside)
        elif user.opcode == 'fusion' and (called := module.called(user)) and place in called.parameters:
            total += _read_of(module, called, called.parameters[place],
                              lambda user=user: _read_of(module, computation, user, outside))
        else:
            return math.inf
    return total


def _written(computation: Computation) -> float:
    """Bytes a fusion writes: of an array it updates in place, the update."""
    root = computation[computation.root]
    parts = [computation[n] for n in root.operands if n in computation] if root.opcode == 'tuple' else [root]
    total = 0.0
    for part in parts:
        while part.opcode == 'bitcast' and computation.operand(part, 0) is not None:
            part = computation.operand(part, 0)
        update = computation.operand(part, 1) if part.opcode == 'dynamic-update-slice' else None
        total += _padded(update or part)
    return total


def _padded(instruction: Instruction) -> float:
    return sum(leaf.padded_bytes for leaf in instruction.arrays)


# --- memory ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Allocation:
    """An array in main memory. bytes: with the padding of its layout. source: the argument's name, or the place in
    the traced function."""

    what: str
    bytes: float
    source: str
    argument: bool


def largest(module: Module, count: int = 8) -> list[Allocation]:
    """The largest arrays of the program, each shape and source once; they need not all live at the same time."""
    found: dict[tuple, Allocation] = {}
    for step in schedule(module):
        instruction, argument = step.instruction, step.instruction.opcode == 'parameter'
        if argument and step.computation is not module.entry:
            continue
        allocates = 'custom_call_target="AllocateBuffer"' in instruction.attributes
        if not (argument or allocates) and (instruction.opcode in _FREE or _in_place(module, step)):
            continue
        for leaf in itertools.islice(instruction.arrays, 1 if instruction.opcode == 'copy-start' else None):
            if leaf.space == 0 and leaf.bytes:
                source = instruction.op_name or instruction.name
                found.setdefault((str(leaf), source), Allocation(str(leaf), leaf.padded_bytes, source, argument))
    return sorted(found.values(), key=lambda a: -a.bytes)[:count]


def _in_place(module: Module, step: Step) -> bool:
    instruction = step.instruction
    if instruction.opcode == 'fusion' and (called := module.called(instruction)):
        instruction, computation = called[called.root], called
        while instruction.opcode == 'bitcast' and computation.operand(instruction, 0) is not None:
            instruction = computation.operand(instruction, 0)
    return instruction.opcode in ('dynamic-update-slice', 'scatter')
