"""The shape of `results.json`: one dataclass a level, and a check that names what is wrong.

docs/compare.md explains every field to a reader; a test holds that the two lists agree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from backbone.errors import FormatError

SCHEMA = 'headway.compare/1'
MODES = ('lossless', 'approximate')
# Fields of a row that the first files of this schema do not have.
LATER = ('model', 'perplexity', 'bits_per_byte', 'kv_bytes_per_token', 'kv_bytes_formula', 'predicted_ms')
VERDICTS = ('baseline', 'yes', 'no', 'even', 'untimed')


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its quartiles and extremes over the repeats."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: typing.Sequence[float]) -> Spread:
        ordered = sorted(map(float, values))
        def at(share):
            place = share * (len(ordered) - 1)
            low, part = math.floor(place), place - math.floor(place)
            return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        return cls(at(0.5), at(0.25), at(0.75), ordered[0], ordered[-1])


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """The first new token where an output leaves plain decoding's.

    logit_gap: the float32 reference's logit of plain's token minus that of ours, at that position.
    rounding: the largest difference of any logit there between the row's dtype and float32.
    near_tie: abs(logit_gap) <= 2 * rounding, so rounding alone explains the choice.
    """

    prompt: int
    position: int
    plain_token: int
    token: int
    logit_gap: float
    rounding: float
    near_tie: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one setting, dtype and batch size. Times in ms, bytes in bytes; None: not measured."""

    method: str
    mode: str
    dtype: str
    batch: int
    settings: dict[str, Any]
    tokens_per_s: float | None
    speedup: float | None
    mean_accepted_tokens: float
    identical_rate: float
    quality: float | None
    bytes_per_token: float
    peak_memory: int
    usd_per_million: float | None
    pays: str
    verdict: str
    tokens_per_s_spread: Spread | None = None
    tokens_per_s_repeats: list[float] = dataclasses.field(default_factory=list)
    tokens_per_s_with_prefill: float | None = None
    ms_per_token: float | None = None
    prefill_ms: float | None = None
    compile_s: float | None = None
    speedup_spread: Spread | None = None
    speedup_any_dtype: float | None = None
    over_floor: float | None = None
    bandwidth_share: float | None = None
    acceptance_by_position: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    rounds: int = 0
    draft_ms: float | None = None
    verify_ms: float | None = None
    host_ms: float | None = None
    round_ms: float | None = None
    draft_cost: float | None = None
    verify_cost: float | None = None
    break_even: float | None = None
    mismatches: list[Mismatch] = dataclasses.field(default_factory=list)
    model: str = ''
    perplexity: float | None = None
    bits_per_byte: float | None = None
    kv_bytes_per_token: float | None = None
    kv_bytes_formula: float | None = None
    predicted_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Floor:
    """Reading the weights of one token, and nothing else, in this run."""

    source: str
    note: str
    threads: int
    weight_bytes: int
    bytes_per_s: Spread
    ms_per_token: float


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One forward of k tokens; ratio is T(k)/T(1)."""

    dtype: str
    k: int
    context: int
    ms: Spread
    ratio: float


@dataclasses.dataclass(frozen=True)
class Results:
    """The whole file. Rows are in the order of the config."""

    schema: str
    command: str
    config: dict[str, Any]
    versions: dict[str, Any]
    device: dict[str, Any]
    git: dict[str, Any]
    rows: list[Row]
    floor: dict[str, Floor]
    curve: list[CurvePoint]
    model: dict[str, Any]
    prompts: list[dict[str, Any]]
    notes: list[str]
    seed: int
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """Errors: FormatError names the first field that is missing, unknown or of the wrong type."""
        results = _read(cls, data, 'results')
        if results.schema != SCHEMA:
            raise FormatError(f'results.schema is {results.schema!r}, this reads {SCHEMA!r}')
        for i, row in enumerate(results.rows):
            if row.mode not in MODES or row.pays not in VERDICTS:
                raise FormatError(f'results.rows[{i}]: mode {row.mode!r} or pays {row.pays!r} is not known')
        return results


def read(path: str | os.PathLike) -> Results:
    """Reads and checks a results.json. Errors: FormatError."""
    try:
        data = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f'cannot read {path}: {error}') from error
    return Results.from_dict(data)


def _plain(value: Any) -> Any:
    """JSON's types only: numpy scalars become numbers, tuples lists, and what is not finite None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, 'tolist'):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(next(a for a in args if a is not type(None)), value, where)
    if origin is list:
        _expect(isinstance(value, list), where, 'a list', value)
        return [_read(args[0], v, f'{where}[{i}]') for i, v in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, Mapping), where, 'an object', value)
        return {k: _read(args[1], v, f'{where}.{k}') for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, Mapping), where, 'an object', value)
        hints = typing.get_type_hints(kind)
        late = {f.name for f in dataclasses.fields(kind) if f.name in LATER and f.default is not dataclasses.MISSING}
        odd = sorted((set(value) - set(hints)) | (set(hints) - set(value) - late))
        if odd:
            raise FormatError(f'{where}: {"missing" if odd[0] in hints else "unknown"} field {odd[0]!r}')
        return kind(**{name: _read(hint, value[name], f'{where}.{name}') for name, hint in hints.items()
                       if name in value})
    if kind is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), where, 'a number', value)
        return float(value)
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _expect(ok: bool, where: str, what: str, value: Any) -> None:
    if not ok:
        raise FormatError(f'{where} must be {what}, got {value!r:.60}')
