"""Tensors on their way between a file and the parameter tree, a block of rows at a time.

Reading: a header gives `Stored` tensors, `plan` pairs them with leaves and finds every fault before any
memory is allocated, `blocks` yields float32 rows in the leaf's own order, `read` fills preallocated leaves.
Writing is the same in reverse: `outgoing` yields the file's tensors, each as blocks of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import gguf
import ml_dtypes
import numpy as np

from backbone.config import ModelConfig
from backbone.errors import FormatError, TensorMismatch
from backbone.formats.names import Rule, rotary_rows

# Scalars handled at once: large enough for numpy, small enough to stay in a few tens of MB.
BLOCK = 1 << 21

PLAIN = {'F64': np.dtype('<f8'), 'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'),
         'BF16': np.dtype(ml_dtypes.bfloat16)}
QUANTISED = ('Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q4_K', 'Q6_K')


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a memory-mapped file. shape: outermost axis first, as the file's rows lie.

    encoding: a key of PLAIN or one of QUANTISED. offset: bytes from the start of `buffer`.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    buffer: Any = dataclasses.field(repr=False)
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return encoded_bytes(self.encoding, self.shape)

    def rows(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """float32 part of the tensor, [rows, columns] ([rows] of a vector)."""
        raw = np.frombuffer(self.buffer, np.uint8, self.nbytes, self.offset)
        if self.encoding in PLAIN:
            whole = raw.view(PLAIN[self.encoding]).reshape(self.shape)
            return whole[(rows, columns)[:whole.ndim]].astype(np.float32)
        size, step = block_size(self.encoding)
        first, last, _ = columns.indices(self.shape[-1])
        packed = raw.reshape(*self.shape[:-1], -1)[..., first // size * step:-(-last // size) * step]
        packed = packed[rows] if len(self.shape) > 1 else packed
        return _dequantise(packed, self.encoding)

    def release(self) -> None:
        """Lets go of the pages read so far, so that a large file does not fill the process's memory."""
        if isinstance(self.buffer, mmap.mmap) and hasattr(mmap, 'MADV_DONTNEED'):
            start = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, start, self.offset + self.nbytes - start)


def encoded_bytes(encoding: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a file. The last axis of a quantised one must hold whole blocks."""
    count = 1
    for size in shape:
        count *= size
    size, step = block_size(encoding)
    return count // size * step


def block_size(encoding: str) -> tuple[int, int]:
    """Scalars and bytes of the unit that a row is made of."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]


def map_file(path: Any) -> mmap.mmap:
    """The whole file, read only. Errors: FormatError when it is missing or empty."""
    try:
        with open(path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise FormatError(f'{path}: empty file') from None
    except OSError as error:
        raise FormatError(f'{path}: cannot be read: {error.strerror}') from None


def _dequantise(packed: np.ndarray, encoding: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[encoding]
    size, step = block_size(encoding)
    flat = np.ascontiguousarray(packed).reshape(-1, step)
    out = np.empty((len(flat), size), np.float32)
    # The package works on whole rows at a time; pieces that fit the processor's cache are several times faster.
    for first in range(0, len(flat), (1 << 18) // size):
        piece = flat[first:first + (1 << 18) // size]
        out[first:first + len(piece)] = gguf.quants.dequantize(piece.reshape(1, -1), kind).reshape(-1, size)
    return out.reshape(*packed.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree and the file's tensors it is made of: one a layer where it is stacked, and one an
    expert where those have experts."""

    rule: Rule
    shape: tuple[int, ...]
    tensors: tuple[Stored, ...]
    order: np.ndarray | None  # file row of each leaf row, where the two differ

    def blocks(self) -> Iterator[tuple[tuple, np.ndarray]]:
        """(index into the leaf, float32 values), first to last in C order; no gap, no overlap."""
        outer = outer_shape(self.rule, self.shape)
        shape = self.shape[len(outer):]
        for at, tensor in zip(np.ndindex(*outer), self.tensors, strict=True):
            # Columns of a quantised tensor are cut where its blocks end.
            step = block_size(tensor.encoding)[0] if self.rule.transposed else 1
            for part in _parts(shape[0], int(np.prod(shape[1:])), step):
                if self.rule.transposed:
                    block = tensor.rows(columns=part).T
                    block = block if self.order is None else block[:, self.order]
                elif self.order is not None:
                    block = tensor.rows()[self.order[part]]
                else:
                    block = tensor.rows(part)
                block = np.ascontiguousarray(block)
                if self.rule.shift:
                    block += np.float32(self.rule.shift)
                tensor.release()
                yield (*at, part), block


def outer_shape(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
    """The leading axes of a leaf that count its tensors: (), (layers,) or (layers, experts)."""
    return tuple(shape[:2 if rule.per_expert else 1 if rule.stacked else 0])


def _parts(rows: int, width: int, multiple: int) -> Iterator[slice]:
    step = max(BLOCK // max(width, 1) // multiple, 1) * multiple
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{'/'-joined path: leaf}, sorted by path."""
    return dict(sorted(flax.traverse_util.flatten_dict(params, sep='/').items()))


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(leaves), sep='/')


@functools.lru_cache(maxsize=64)
def leaf_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """{path: shape} of a model's parameters, sorted by path."""
    from backbone.model import abstract_params  # names and headers are read without loading JAX's tracer

    return {path: leaf.shape for path, leaf in flatten(abstract_params(cfg)).items()}


def check_leaves(cfg: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Errors: TensorMismatch lists every leaf in which {path: shape} differs from the tree of `cfg`."""
    check_shapes(leaf_shapes(cfg), found, where)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Errors: TensorMismatch lists every path in which the two {path: shape} differ."""
    faults = [f'{path} is {list(found[path]) if path in found else "missing"}, expected {list(shape)}'
              for path, shape in shapes.items() if found.get(path) != shape]
    faults += [f'{path} is left over' for path in found if path not in shapes]
    if faults:
        raise TensorMismatch(f'{where}: parameters do not fit the configuration: {", ".join(faults)}')


def _order(cfg: ModelConfig, rule: Rule, shape: Sequence[int]) -> np.ndarray | None:
    """Permutation over the tensor's outputs: the leaf's last axis."""
    if rule.heads is None:
        return None
    attention = cfg.attention
    return rotary_rows(shape[-1], attention.num_heads if rule.heads == 'q' else attention.num_kv_heads)


def _file_tensors(cfg: ModelConfig, rules: Sequence[Rule], where: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """{leaf path: [(file name, file shape), one a layer (and expert)]}, for every leaf of the model."""
    by_leaf = {rule.leaf: rule for rule in rules}
    shapes = leaf_shapes(cfg)
    homeless = [path for path in shapes if path not in by_leaf]
    if homeless:
        raise FormatError(f'{where}: this format has no name for {", ".join(homeless)}')
    found = {}
    for path, shape in shapes.items():
        rule = by_leaf[path]
        outer = outer_shape(rule, shape)
        inner = shape[len(outer):]
        inner = inner[::-1] if rule.transposed else inner
        found[path] = [(rule.name.format(*at), inner) for at in np.ndindex(*outer)]
    return found


def plan(cfg: ModelConfig, rules: Sequence[Rule], stored: Mapping[str, Stored], where: str,
         ignore: Callable[[str], bool] = lambda name: False) -> list[Leaf]:
    """Pairs every leaf with its tensors, sorted by path. Allocates nothing.

    ignore: names that may be there although no leaf takes them.
    Errors: TensorMismatch lists every tensor that is missing, left over or of the wrong shape.
    """
    wanted = _file_tensors(cfg, rules, where)
    names = {name: shape for tensors in wanted.values() for name, shape in tensors}
    missing = [name for name in names if name not in stored]
    extra = [name for name in stored if name not in names and not ignore(name)]
    wrong = [f'{name} is {list(stored[name].shape)}, expected {list(shape)}'
             for name, shape in names.items() if name in stored and stored[name].shape != shape]
    faults = [f'{len(found)} {what}: {", ".join(found)}' for what, found in
              (('missing', missing), ('left over', extra), ('of the wrong shape', wrong)) if found]
    if faults:
        raise TensorMismatch(f'{where}: tensors {"; ".join(faults)}')
    by_leaf = {rule.leaf: rule for rule in rules}
    return [Leaf(by_leaf[path], shape, tuple(stored[name] for name, _ in wanted[path]),
                 _order(cfg, by_leaf[path], shape)) for path, shape in leaf_shapes(cfg).items()]


class Digest:
    """sha256 over float32 parameters: for each path in sorted order its name, its shape, its values in C order."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def leaf(self, path: str, shape: Sequence[int]) -> None:
        self._hash.update(f'{path} {list(shape)}\n'.encode())

    def values(self, block: np.ndarray) -> None:
        self._hash.update(np.ascontiguousarray(block, np.float32).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def params_hash(params: Mapping[str, Any]) -> str:
    """sha256 (hex) that names a model by its parameters, whatever file they came from.

    Taken over float32 values, so it is the same for one model in float32 and in a narrower dtype that holds
    its values exactly, and differs after any rounding.
    """
    digest = Digest()
    for path, leaf in flatten(params).items():
        leaf = np.asarray(leaf)
        digest.leaf(path, leaf.shape)
        flat = leaf.reshape(-1)
        for part in _parts(flat.size, 1, 1):
            digest.values(flat[part])
    return digest.hexdigest()


def read(leaves: Sequence[Leaf], dtype: Any = np.float32, digest: bool = True) -> tuple[dict[str, Any], str]:
    """(parameter tree of numpy arrays in `dtype`, its params_hash before rounding to `dtype`)."""
    found, sha = {}, Digest()
    for leaf in leaves:
        sha.leaf(leaf.rule.leaf, leaf.shape)
        whole = found[leaf.rule.leaf] = np.empty(leaf.shape, dtype)
        for index, block in leaf.blocks():
            whole[index] = block
            if digest:
                sha.values(block)
    return unflatten(found), sha.hexdigest() if digest else ''


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor on its way into a file. shape: the file's; `blocks` yields its rows in `values`' own dtype."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray = dataclasses.field(repr=False)  # a view: the leaf's layer, transposed where the file's is
    order: np.ndarray | None  # leaf row of each file row
    shift: float

    def blocks(self) -> Iterator[np.ndarray]:
        for part in _parts(self.shape[0], int(np.prod(self.shape[1:])), 1):
            block = self.values[part if self.order is None else self.order[part]]
            if self.shift:
                block = (block.astype(np.float32) - np.float32(self.shift)).astype(block.dtype)
            yield np.ascontiguousarray(block)


def outgoing(cfg: ModelConfig, rules: Sequence[Rule], params: Mapping[str, Any], where: str) -> list[Outgoing]:
    """Every tensor of a file, in the order of the table, its middle once a layer. Copies nothing.

    Errors: TensorMismatch where `params` is not the tree of `cfg`.
    """
    leaves = flatten(params)
    check_leaves(cfg, {path: np.shape(leaf) for path, leaf in leaves.items()}, where)
    wanted = _file_tensors(cfg, rules, where)
    rules = [rule for rule in rules if rule.leaf in wanted]
    stacked = [i for i, rule in enumerate(rules) if rule.stacked]
    before, inside, after = rules[:stacked[0]], rules[stacked[0]:stacked[-1] + 1], rules[stacked[-1] + 1:]
    found = []
    each = {rule.leaf: len(wanted[rule.leaf]) // cfg.num_layers for rule in inside}  # tensors a layer
    middle = [(rule, layer * each[rule.leaf] + e) for layer in range(cfg.num_layers) for rule in inside
              for e in range(each[rule.leaf])]
    for rule, i in [(rule, 0) for rule in before] + middle + [(rule, 0) for rule in after]:
        name, shape = wanted[rule.leaf][i]
        leaf = leaves[rule.leaf]
        values = np.asarray(leaf[np.unravel_index(i, outer_shape(rule, leaf.shape))] if rule.stacked else leaf)
        order = _order(cfg, rule, values.shape)
        found.append(Outgoing(name, shape, values.T if rule.transposed else values,
                              None if order is None else np.argsort(order), rule.shift))
    return found


def narrow(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Errors: FormatError when a finite value becomes infinite."""
    with np.errstate(over='ignore'):
        found = np.ascontiguousarray(block, dtype)
    if found.dtype != block.dtype and not np.isfinite(found).all() and np.isfinite(block).all():
        raise FormatError(f'{name}: values too large for {dtype}')
    return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model brought into memory. params: base tree of numpy arrays; tokenizer: None where the file has none.

    decodes: of a model that is more than a plain base, what decodes it (harness/models.py); extra: {part: tree} of its
    parameters beside the base. `base_hash` is then of all of them.
    """

    config: ModelConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any
    name: str
    base_hash: str
    decodes: Mapping[str, Any] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def tree(self) -> dict[str, Any]:
        """The contract's whole tree: {'base': ...} and the parts beside it."""
        return {'base': self.params, **self.extra}

    def check_plain(self) -> None:
        """Errors: FormatError where the base is not the whole model, so that files of plain models cannot hold it."""
        if self.decodes is not None:
            raise FormatError(f'{self.name} has no plain form: {self.decodes["factory"]} decodes it, with parameters '
                              f'beside the base ({", ".join(self.extra) or "none here"})')


def check_sizes(cfg: ModelConfig, stored: Mapping[str, Stored], where: str) -> None:
    """Holds a header's sizes against the file, before a tree of shapes is made from them."""
    total = sum(int(np.prod([float(n) for n in tensor.shape])) for tensor in stored.values())
    attention = cfg.attention
    experts = cfg.moe.num_experts if cfg.moe is not None else 0
    if cfg.num_layers * max(experts, 1) > len(stored):
        each = f' of {experts} experts' if experts else ''
        raise FormatError(f'{where}: {cfg.num_layers} layers{each}, but only {len(stored)} tensors')
    for name, size in (('vocabulary size', cfg.vocab_size), ('hidden size', cfg.hidden_size),
                       ('intermediate size', cfg.mlp.intermediate_size),
                       ('heads x head size', attention.num_heads * attention.head_dim),
                       ('positions', cfg.max_seq_len if attention.position == 'learned' else 0)):
        if size > total:
            raise FormatError(f'{where}: {name} {size} exceeds the {total} scalars of the file')
