"""Signals that stop a run: noted when they come, acted on after the step at which all ranks know of them
(step_agreement.py).

    SIGUSR1  the warning before a time limit (Slurm's --signal)
    SIGTERM  scancel, a preemption, a launcher
    SIGINT   Ctrl-C

Launchers signal ranks one after the other, or one of them only; a second signal, while the state is saved,
changes nothing. Standard library only.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# where several came, the first of these gives the exit code
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPORT_SIGNAL = signal.SIGUSR2  # for stacks, and for a report of all ranks
_Handler = Callable[[int, FrameType | None], Any] | int | None


class SignalHandler:
    """The signals that this process received since :meth:`catch`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.report_wanted = False
        self._before: dict[int, _Handler] = {}

    def catch(self) -> None:
        """Handle the signals from now on.

        Nothing happens outside of the main thread, where Python allows no handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*STOP_SIGNALS, REPORT_SIGNAL):
            self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Put back what was handled before."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == REPORT_SIGNAL:
            self.report_wanted = True
        elif self.received is None:
            self.received = signal.Signals(number)
