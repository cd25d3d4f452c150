"""Reads the text of a compiled XLA program: instructions, shapes, and how often each one runs.

`parse` turns the text into a `Module`; `schedule` walks what the device really runs (the entry, loop bodies, called
computations; not the insides of fusions) and multiplies by the trip counts of the loops around it. The trip count is
what the compiler wrote down, or else is worked out from the loop's start, bound and stride.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_LEAF = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a shape. `tile` is the device's layout tile of the minor dimensions; `space` 0 is main memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # minor to major
    tile: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Of the numbers themselves."""
        return self.size * _bits(self.dtype) / 8

    @property
    def padded_bytes(self) -> float:
        """As the device stores them: the minor dimensions rounded up to the tile."""
        sizes = [self.dims[i] for i in reversed(self.order)] if len(self.order) == len(self.dims) else list(self.dims)
        for back, tile in enumerate(reversed(self.tile[-len(sizes):] if sizes else ()), 1):
            sizes[-back] = -(-sizes[-back] // tile) * tile
        return math.prod(sizes) * _bits(self.dtype) / 8

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r'[a-z]+(\d+)', dtype)
    return int(digits[1]) if digits else 0


@functools.lru_cache(maxsize=4096)
def leaves(shape: str) -> tuple[Leaf, ...]:
    """The arrays of a shape, those of a tuple in order."""
    found = []
    for dtype, dims, layout in _LEAF.findall(re.sub(r'/\*.*?\*/', '', shape)):
        order, _, memory = layout.partition(':')
        tile = re.match(r'T\(([\d,]+)\)', memory)
        space = re.search(r'S\((\d+)\)', memory)
        found.append(Leaf(dtype, _ints(dims.replace('<=', '')), _ints(order), _ints(tile[1]) if tile else (),
                          int(space[1]) if space else 0))
    return tuple(found)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(',') if n.strip().isdigit())


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = shape opcode(operands), attributes`. literal: what stands in the parentheses."""

    name: str
    shape: str
    opcode: str
    literal: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r'%([\w.\-]+)', self.literal))

    @property
    def arrays(self) -> tuple[Leaf, ...]:
        return leaves(self.shape)

    def attribute(self, key: str) -> str:
        """A plain attribute's value ('' where it is not there): `dim_labels`, `body`, `calls`."""
        found = re.search(rf'\b{key}=%?([^,\s{{}}]+)', self.attributes)
        return found[1] if found else ''

    @property
    def op_name(self) -> str:
        """The place in the traced function it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ''

    @property
    def index(self) -> int:
        return int(self.attribute('index') or 0)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]  # in the order they run
    root: str

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __contains__(self, name: str) -> bool:
        return name in self.instructions

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        return self.instructions.get(instruction.operands[index]) if index < len(instruction.operands) else None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == 'parameter'}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> Computation | None:
        """What a fusion, call or async-start runs."""
        name = instruction.attribute('calls') or instruction.attribute('to_apply')
        return self.computations.get(name)


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction the device runs `count` times; `known` is False inside a loop whose trips are unknown (one)."""

    instruction: Instruction
    computation: Computation
    count: int
    known: bool


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Errors: ValueError where there is no entry computation."""
    computations, name, entry, root, body = {}, '', '', '', {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, body, root = header[2], {}, ''
            entry = name if header[1] else entry
        elif line == '}' and name:
            computations[name] = Computation(name, body, root)
            name = ''
        elif name and line.startswith('  '):
            instruction = _instruction(line.strip())
            if instruction:
                body[instruction.name] = instruction
                root = instruction.name if line.lstrip().startswith('ROOT ') else root
    if entry not in computations:
        raise ValueError('no ENTRY computation: this is not the text of a compiled program')
    return Module(computations, computations[entry])


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.removeprefix('ROOT ').partition(' = ')
    if not equals:
        return None
    end = _closing(rest) + 1 if rest.startswith('(') else rest.find(' ')
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition('(')
    inside = rest[len(opcode):]
    end = _closing(inside)
    return Instruction(name.lstrip('%'), shape, opcode, inside[1:end], inside[end + 1:])


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one `text` starts with."""
    depth = 0
    for found in re.finditer(r'[()]', text):
        depth += 1 if found[0] == '(' else -1
        if depth == 0:
            return found.start()
    return len(text)


# --- how often ------------------------------------------------------------------------------------------------


def schedule(module: Module) -> Iterator[Step]:
    """Everything the device runs, with its count. Of a conditional the branch with most instructions counts."""
    yield from _walk(module, module.entry, 1, True, {})


def _walk(module, computation, count, known, constants) -> Iterator[Step]:
    for instruction in computation.instructions.values():
        yield Step(instruction, computation, count, known)
        if instruction.opcode == 'while':
            body = module.computations[instruction.attribute('body')]
            condition = module.computations[instruction.attribute('condition')]
            kept = _loop_constants(computation, instruction, body, constants)
            trips = _trips(module, computation, instruction, body, condition, constants, kept)
            inside = (count * (1 if trips is None else trips), known and trips is not None, kept)
            yield from _walk(module, body, *inside)
            yield from _walk(module, condition, *inside)
        elif instruction.opcode == 'conditional':
            names = re.findall(r'%([\w.\-]+)', ' '.join(re.findall(
                r'(?:branch_computations=\{[^}]*\}|(?:true|false)_computation=%[\w.\-]+)', instruction.attributes)))
            branches = [module.computations[n] for n in names if n in module.computations]
            if branches:
                yield from _walk(module, max(branches, key=lambda b: len(b.instructions)), count, known, {})
        elif instruction.opcode in ('call', 'async-start'):
            called = module.called(instruction)
            if called is not None:
                yield from _walk(module, called, count, known, {})


def _constant(computation: Computation, name: str, constants: Mapping[int, int]) -> int | None:
    """The integer an instruction is known to be; `constants`: elements of the computation's tuple parameter."""
    instruction = computation.instructions.get(name)
    while instruction is not None:
        if instruction.opcode == 'constant':
            return int(instruction.literal) if re.fullmatch(r'-?\d+', instruction.literal) else None
        source = computation.operand(instruction, 0)
        if instruction.opcode == 'get-tuple-element' and source is not None:
            if source.opcode == 'parameter':
                return constants.get(instruction.index)
            if source.opcode != 'tuple':
                return None
            instruction = computation.operand(source, instruction.index)
        elif instruction.opcode in ('copy', 'bitcast', 'convert', 'reshape'):
            instruction = source
        else:
            return None
    return None


def _loop_constants(computation, loop, body, constants) -> dict[int, int]:
    """Elements of the loop's state that are a known integer before it, and that the body hands on unchanged."""
    start, end = computation.operand(loop, 0), body[body.root]
    if start is None or start.opcode != 'tuple' or end.opcode != 'tuple':
        return {}
    kept = {}
    for i, (before, after) in enumerate(zip(start.operands, end.operands, strict=False)):
        value = _constant(computation, before, constants)
        if value is not None and _element(body, after) == i:
            kept[i] = value
    return kept


def _element(computation: Computation, name: str) -> int | None:
    """Which element of the tuple parameter this instruction is."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ('copy', 'bitcast'):
        instruction = computation.operand(instruction, 0)
    if instruction is None or instruction.opcode != 'get-tuple-element':
        return None
    source = computation.operand(instruction, 0)
    return instruction.index if source is not None and source.opcode == 'parameter' else None


def _trips(module, computation, loop, body, condition, constants, kept) -> int | None:
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    test = _spell(module, condition, condition.root, kept)
    start, end = computation.operand(loop, 0), body[body.root]
    if test is None or test[0] != 'compare' or start is None or start.opcode != 'tuple' or end.opcode != 'tuple':
        return None
    _, left, right, direction = test
    if left[0] == 'constant':  # bound > i
        left, right, direction = right, left, {'GT': 'LT', 'GE': 'LE', 'LT': 'GT', 'LE': 'GE'}.get(direction, direction)
    if left[0] != 'element' or right[0] != 'constant':
        return None
    first = _constant(computation, start.operands[left[1]], constants)
    step = _spell(module, body, end.operands[left[1]], kept)
    if first is None or step is None or step[0] != 'add' or ('element', left[1]) not in step[1:3]:
        return None
    stride = next((part[1] for part in step[1:3] if part[0] == 'constant'), 0)
    span = {'LT': right[1] - first, 'LE': right[1] - first + 1, 'NE': right[1] - first,
            'GT': right[1] - first, 'GE': right[1] - first - 1}.get(direction)
    if not stride or span is None:
        return None
    return max(0, math.ceil(span / stride))


def _spell(module, computation, name, kept, inside: Mapping[int, tuple] | None = None) -> tuple | None:
    """An integer expression as nested tuples: ('constant', n), ('element', i of the tuple parameter),
    ('compare', left, right, direction), ('add', left, right); None for anything else. Looks into fusions."""
    instruction = computation.instructions.get(name)
    spell = lambda operand: _spell(module, computation, operand, kept, inside) or ('unknown',)
    if instruction is None:
        return None
    if inside is not None and instruction.opcode == 'parameter':
        return inside.get(int(instruction.literal))
    value = _constant(computation, name, kept) if inside is None or instruction.opcode == 'constant' else None
    if value is not None:
        return 'constant', value
    if inside is None and (element := _element(computation, name)) is not None:
        return 'element', element
    if instruction.opcode == 'fusion':
        called = module.called(instruction)
        arguments = {i: spell(operand) for i, operand in enumerate(instruction.operands)}
        return None if called is None else _spell(module, called, called.root, kept, arguments)
    if instruction.opcode in ('copy', 'bitcast', 'convert'):
        return spell(instruction.operands[0])
    if instruction.opcode in ('compare', 'add'):
        parts = tuple(spell(operand) for operand in instruction.operands)
        return instruction.opcode, *parts, instruction.attribute('direction')
    return None
