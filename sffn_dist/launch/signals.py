"""Signals that stop a run: noted when they come, acted on where all ranks can save.

    SIGUSR1  the warning before a time limit (Slurm's --signal); no deadline
    SIGTERM  scancel, a preemption, a launcher, or a launcher that is gone (launcher_watch.py)
    SIGINT   Ctrl-C

Until :meth:`SignalHandler.defer` there is nothing to save: StopRequested is raised in the main thread. From
then on a stop is taken after the step (step_agreement.py), or given up in time (training/interruption.py).

SIGTERM and SIGINT set a deadline, guards.stop_seconds later: the deepspeed launcher, torchrun and Slurm kill
what still runs after 30 seconds. A process that has not ended by then ends itself, and says so. Further
signals change nothing. Standard library only.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from sffn_dist.launch import exit_codes

# where several came, the first of these gives the exit code
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPORT_SIGNAL = signal.SIGUSR2  # for stacks, and for a report of all ranks
# seconds in which Python code must have ended before training; what waits in a collective is ended then
START_SECONDS = 5.0
_POLL_SECONDS = 0.5
_Handler = Callable[[int, FrameType | None], Any] | int | None


@dataclass(frozen=True)
class Stop:
    """Why a run stops before its last step, and the exit code that it then has."""

    name: str
    exit_code: int


class StopRequested(BaseException):
    """A stop signal came before training: as with KeyboardInterrupt, only clean-up runs."""

    def __init__(self, received: signal.Signals, cause: str):
        super().__init__(f"stopped by {cause} before the first step of this start")
        self.exit_code = exit_codes.for_signal(received)


class SignalHandler:
    """The signals that this process received since :meth:`catch`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at = math.inf  # by the monotonic clock
        self.cause = ""  # "SIGTERM", or what stands for it
        self.deadline = math.inf  # by the monotonic clock: the process has ended by then
        self.report_wanted = False
        self.on_report: Callable[[], None] | None = None  # called beside the main thread
        self.finished = False  # the run is complete and on disk
        self._deferred, self._raised, self._stop_seconds = False, False, START_SECONDS
        self._before: dict[int, _Handler] = {}
        self._wakeup: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def catch(self) -> None:
        """Handle the signals from now on.

        Nothing happens outside of the main thread, where Python allows no handlers. Python's handlers run in
        the main thread only, which may wait in a collective: numbers of signals come through a pipe too.
        """
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, REPORT_SIGNAL):
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._read_numbers, name="signals", daemon=True)
        self._thread.start()

    def defer(self, stop_seconds: float) -> None:
        """There is a state to save from now on: note signals, raise nothing."""
        self._stop_seconds, self._deferred = stop_seconds, True

    def ignore(self) -> None:
        """The process is about to end, with a reason of its own: a signal interrupts nothing any more.

        A launcher sends SIGTERM to all ranks once one has ended.
        """
        self._raised = True

    def release(self) -> None:
        """Put back what was handled before."""
        if not self._before:
            return
        signal.set_wakeup_fd(-1)
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        wakeup, self._wakeup = self._wakeup, None
        assert wakeup
        assert self._thread
        self._thread.join()
        for descriptor in wakeup:
            os.close(descriptor)

    def launcher_gone(self, launcher: str) -> None:
        """The launcher has ended or was killed: a stop request as SIGTERM is one."""
        self.note(signal.SIGTERM, f"the end of its launcher, {launcher}")
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread may sleep

    def note(self, number: int, cause: str = "") -> None:
        """A stop was asked for; the first one stays. Any thread may call it."""
        received, now = signal.Signals(number), time.monotonic()
        if self.received is None:
            self.received_at, self.cause = now, cause or received.name
            self.received = received
        if received != signal.SIGUSR1 or not self._deferred:
            self.deadline = min(self.deadline, now + self._stop_seconds)

    def stop(self) -> Stop:
        """What the received signal asks for."""
        assert self.received
        return Stop(self.cause, exit_codes.for_signal(self.received))

    # ----------------------------------------------------------------------------------------------- handlers

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions of Python."""
        if number == REPORT_SIGNAL:
            self.report_wanted = True
            return
        self.note(number)
        if not self._deferred and not self._raised:
            self._raised = True  # once: a second one would interrupt the clean-up
            assert self.received
            raise StopRequested(self.received, self.cause)

    def _read_numbers(self) -> None:
        """In a thread: whatever the main thread waits in."""
        while (wakeup := self._wakeup) is not None:
            waiting = select.poll()  # unlike select(), for any descriptor: a store's server has thousands
            waiting.register(wakeup[0], select.POLLIN)
            numbers = b""
            if waiting.poll(1000 * min(_POLL_SECONDS, max(0.01, self.deadline - time.monotonic()))):
                with suppress(OSError):
                    numbers = os.read(wakeup[0], 4096)
            for number in numbers:
                if number in STOP_SIGNALS:
                    self.note(number)
            if REPORT_SIGNAL in numbers and self.on_report:
                with suppress(Exception):
                    self.on_report()
            if time.monotonic() > self.deadline:
                self._end()

    def _end(self) -> None:
        """Past the deadline: the main thread waits for what may never come."""
        assert self.received
        code = exit_codes.for_signal(self.received)
        seconds = time.monotonic() - self.received_at
        text = f"stopped by {self.cause} before the first step of this start"
        if self.finished:
            text = f"stopped by {self.cause} after its last step, with everything saved"
        elif self._deferred:
            text = (
                f"stopped by {self.cause}; its state could not be saved in {seconds:.0f} s "
                f"(guards.stop_seconds = {self._stop_seconds:g}): a restart goes on from the newest "
                f"checkpoint"
            )
        try:
            exit_codes.record(code, text)
            if os.environ.get("RANK", "0") == "0":
                write_stderr(f"pretrain.py: {text}\n")
        finally:
            os._exit(code)


def write_stderr(text: str) -> None:
    """Straight to the descriptor: the main thread may hold the stream's lock, and a full pipe that nobody
    reads would block.
    """
    flush_stdout()
    with suppress(OSError, ValueError):
        data = text.encode(errors="replace")
        while data:
            waiting = select.poll()
            waiting.register(2, select.POLLOUT)
            if not waiting.poll(1000.0):
                return
            data = data[os.write(2, data[:4096]) :]


def flush_stdout() -> None:
    """Write out what is buffered for standard output, if that takes no longer than a second: it may be a
    full pipe.
    """

    def flush() -> None:
        with suppress(Exception):
            sys.stdout.flush()

    with suppress(RuntimeError):  # no thread can be started
        thread = threading.Thread(target=flush, name="flush", daemon=True)
        thread.start()
        thread.join(1.0)
