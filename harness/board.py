"""TensorBoard's event files, written in place: no queue that a kill empties, and no thread that dies on a full disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

EVERY_S = 10  # how old what a viewer sees may be


class Board:
    """Scalars of one process's part of a run. Errors: OSError, from every method.

    purge_step: from this step on a viewer forgets what earlier parts in the folder had written.
    """

    def __init__(self, folder: str | Path, purge_step: int):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Its own suffix: viewers read files by name, and two starts within a second would write the same one.
        self._writer = EventsWriter(str(Path(folder) / 'events'), f'.{time.time_ns()}')
        self._event(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._event(step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _event(self, step: int, **what) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
