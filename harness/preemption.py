"""Being told to stop: SIGTERM (a scheduler takes the machine back) and SIGINT (Ctrl-C) end a run at a step's end.

One process catches the signals itself. Among several, the step must be the same everywhere: JAX's own preemption
service receives SIGTERM on any host and names a step that all of them reach.
"""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context; `asked(step)` after every step tells whether to save and leave. A second signal kills at once."""

    def __init__(self):
        self._signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)

    def asked(self, step: int) -> bool:
        """Every process must call it after every step, with the same number."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None
