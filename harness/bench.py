"""One row of the comparison while it is being measured."""

from __future__ import annotations

import dataclasses
import pathlib
import resource
from typing import Any

import jax
import numpy as np

from harness import decode, steps
from harness.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Work:
    """What every row decodes."""

    prompts: list[Prompt]
    stops: tuple[int, ...]
    max_new_tokens: int
    seed: int


@dataclasses.dataclass
class Bench:
    """One row while it is being measured: a target and a drafter with the prompts in groups of `batch`."""

    method: str
    spec: Any
    dtype: str
    batch: int
    timed: bool
    target: Any
    drafter: Any
    params: Any
    groups: list[list[int]]  # prompt numbers
    model: str = ''  # of its own; '' is the one that is compared
    outputs: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    accepted: np.ndarray | None = None
    drafted: np.ndarray | None = None
    rounds: int = 0
    cold_s: float = 0.0
    decode_s: list[float] = dataclasses.field(default_factory=list)
    prefill_s: list[float] = dataclasses.field(default_factory=list)
    floor_s: list[float] = dataclasses.field(default_factory=list)
    peak_memory: int = 0
    bytes_per_round: float = 0.0
    kv_bytes_per_token: float = 0.0
    kv_bytes_formula: float | None = None
    timers: dict[str, steps.Timer] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f'{self.method} {self.dtype} batch {self.batch}'

    @property
    def stepwise(self) -> bool:
        """Plain decoding of its model."""
        return self.drafter.block == 0 and self.target.exact and not self.by_host

    @property
    def by_host(self) -> bool:
        """Decodes outside of the jitted loop: it has no parts to time, and no state to start them from."""
        return hasattr(self.target, 'host_loop')

    @property
    def plain(self) -> bool:
        """What the comparison is against: plain decoding of the model that is compared."""
        return self.stepwise and not self.model

    @property
    def tokens(self) -> int:
        return sum(len(out) for out in self.outputs.values())

    @property
    def decoded(self) -> int:
        """Tokens that decoding made: the first of each prompt belongs to prefill."""
        return self.tokens - len(self.outputs)


def generate(bench: Bench, work: Work, group: list[int]) -> decode.Generation:
    return decode.generate(bench.target, bench.drafter, bench.params, [work.prompts[i].ids for i in group],
                           max_new_tokens=work.max_new_tokens, stop_tokens=work.stops, seed=work.seed)


def first_run(bench: Bench, work: Work) -> None:
    """Compiles, warms up and keeps the outputs, which are the same on every later run."""
    reset_peak_memory()
    for group in bench.groups:
        out = generate(bench, work, group)
        bench.cold_s += out.prefill_s + out.decode_s
        bench.outputs |= dict(zip(group, out.tokens, strict=True))
        bench.accepted = out.accepted_hist + (0 if bench.accepted is None else bench.accepted)
        bench.drafted = out.drafted_hist + (0 if bench.drafted is None else bench.drafted)
        # A batch's time is that of its longest row; a round is one pass of the whole batch.
        bench.rounds += int(np.max(out.rounds))
    bench.peak_memory = peak_memory()


def timed_run(bench: Bench, work: Work) -> None:
    reset_peak_memory()
    outs = [generate(bench, work, group) for group in bench.groups]
    bench.prefill_s.append(sum(o.prefill_s for o in outs))
    bench.decode_s.append(sum(o.decode_s for o in outs))
    bench.peak_memory = peak_memory()


def state_after_prefill(bench: Bench, work: Work) -> decode.DecodeState:
    """What the loop starts from for the first group: same shapes as `generate`, so nothing new is compiled."""
    request = decode.prepare(bench.target, [work.prompts[i].ids for i in bench.groups[0]],
                             max_new_tokens=work.max_new_tokens, stop_tokens=work.stops)
    return decode.start(bench.target, bench.drafter, bench.params, request, work.seed)


def reset_peak_memory() -> None:
    """Starts the high-water mark anew where Linux allows it; elsewhere the mark is the process's own."""
    try:
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pass


def peak_memory() -> int:
    """Bytes at the high-water mark: of the device where it counts, else of this process (every row's weights)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in stats:
        return int(stats['peak_bytes_in_use'])
    try:
        status = pathlib.Path('/proc/self/status').read_text()
        return int(status.split('VmHWM:')[1].split()[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
