"""What a run says of itself: metrics.jsonl, TensorBoard, the loss curve, the progress bar.

metrics.jsonl is the record; every row is one JSON object {'step': n, 'kind': 'train' | 'eval' | 'event', ...} written
by one system call, so a kill leaves at most one torn line, the last. A run that continues from a checkpoint cuts what
lies past it and writes it again: rows are neither doubled nor lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backbone.errors import SaveError

ROWS, BOARD, CURVE = 'metrics.jsonl', 'tensorboard', 'loss.png'


class Metrics:
    """The rows of one run, open for more. enabled: False (every process but one) writes nothing.

    folder: the working directory, which must exist. start_step: the step that was restored (0: a new run).
    Errors: SaveError where a file cannot be written.
    """

    def __init__(self, folder: str | Path, start_step: int, enabled: bool = True):
        self._path, self._first, self._sink, self._board = Path(folder) / ROWS, start_step + 1, None, None
        if enabled:
            with self._faults():
                cut(self._path, start_step)
                self._sink = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, values: Mapping[str, Any], kind: str = 'train') -> None:
        """values: numbers (also scalar arrays), or JSON for an event; what is not finite becomes null."""
        if self._sink is None:
            return
        row = {'step': int(step), 'kind': kind} | {name: _plain(value) for name, value in values.items()}
        line = (json.dumps(row, allow_nan=False) + '\n').encode()
        with self._faults():
            written = os.write(self._sink, line)
            if written != len(line):  # the next start cuts it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._board is None:
                from harness.board import Board  # takes a moment to import

                self._board = Board(self._path.parent / BOARD, purge_step=self._first)
            self._board.write(row['step'], {f'{kind}/{name}': value for name, value in row.items() if name != 'step'
                                            and isinstance(value, (int, float)) and not isinstance(value, bool)})

    def flush(self) -> None:
        """Until the rows are on the disk: called before a checkpoint, which must not outlive the rows before it."""
        with self._faults():
            if self._sink is not None:
                os.fsync(self._sink)
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        with self._faults():
            if self._sink is not None:
                os.close(self._sink)
            if self._board is not None:
                self._board.close()
        self._sink = self._board = None

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f'cannot write {self._path}: {error.strerror}') from error


def cut(path: Path, last_step: int) -> None:
    """Leaves the whole rows up to last_step, by one rename. Errors: OSError."""
    if not path.exists():
        return
    text = path.read_bytes()
    kept = b''.join(line for line, row in _lines(text) if row['step'] <= last_step)
    if kept != text:
        new = path.with_name(f'.{path.name}')
        with new.open('wb') as sink:
            sink.write(kept)
            sink.flush()
            os.fsync(sink.fileno())
        shutil.copymode(path, new)
        os.replace(new, path)


def rows(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, in the order they were written; a torn line is left out."""
    path = Path(folder) / ROWS
    return [row for _, row in _lines(path.read_bytes())] if path.exists() else []


def _lines(text: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # torn, or zeros after a power cut
            continue
        if line.endswith(b'\n') and isinstance(row, dict) and isinstance(row.get('step'), int):
            yield line, row


def _plain(value: Any) -> Any:
    """JSON's types, and null for what is not finite."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(folder: str | Path) -> Path:
    """loss.png: training (line) and evaluation (dots) loss in nats a token against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, style in (('train', {'linewidth': 0.8}), ('eval', {'linestyle': '', 'marker': 'o', 'markersize': 5})):
        found = [(row['step'], row.get('loss', row.get('nll'))) for row in rows(folder) if row['kind'] == kind]
        points = [(step, loss) for step, loss in found if isinstance(loss, (int, float)) and loss > 0]
        if points:
            step, loss = points[-1]
            axes.plot(*zip(*points, strict=True), label=f'{kind} ({loss:.4g} at step {step})', **style)
    if axes.lines:
        axes.set_yscale('log')
        plain = FuncFormatter(lambda value, _: f'{value:.3g}')
        axes.yaxis.set_major_formatter(plain)
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
        axes.legend()
    else:
        axes.text(0.5, 0.5, 'no loss was logged', ha='center', transform=axes.transAxes)
    axes.set(xlabel='step', ylabel='loss (nats per token)', title=Path(folder).resolve().name)
    axes.grid(True, which='both', alpha=0.25)
    path = Path(folder) / CURVE
    try:
        figure.savefig(path)
    except OSError as error:
        raise SaveError(f'cannot write {path}: {error.strerror}') from error
    return path


class Progress:
    """The bar: step of num_steps, loss, tokens/s, MFU, time left. On stderr; a line now and then where no one looks."""

    def __init__(self, num_steps: int, start_step: int, enabled: bool = True):
        from tqdm import tqdm

        self._bar = tqdm(total=num_steps, initial=start_step, disable=not enabled, unit='step', dynamic_ncols=True,
                         mininterval=0.2 if sys.stderr.isatty() else 30)

    def update(self, step: int, loss: float | None = None, tokens_per_s: float | None = None,
               mfu: float | None = None) -> None:
        """mfu: a fraction of the peak. What is None is not shown."""
        said = [] if loss is None else [f'loss {loss:.4f}']
        said += [] if tokens_per_s is None else [f'{tokens_per_s:,.0f} tokens/s']
        said += [] if mfu is None else [f'MFU {mfu:.0%}']
        self._bar.set_postfix_str(', '.join(said), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
