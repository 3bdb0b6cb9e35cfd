"""Beside a run: who is alive, who makes progress, and one reason for all ranks when it ends early.

    main thread   tick("training", 12) whenever it gets on             fail(error) when it cannot
    heartbeat     every beat: own progress to the ranks' store, the others' and the verdict from it
                  (heartbeat.py)
    watchdog      every half second, from memory alone: a rank lost? no progress? a verdict? -> stacks, one
                  message, exit

The first verdict in the store stands for all ranks: the rank that wrote it prints it, the others leave with
the same code. So an exception on one rank is reported once, not with the broken connections that it leaves
behind on the others. Exit codes: launch/exit_codes.py.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sffn_dist.health.heartbeat import Heartbeat, Verdict
from sffn_dist.launch import exit_codes
from sffn_dist.launch.signals import SignalHandler, StopRequested, flush_stdout, write_stderr
from sffn_dist.spec.config import ConfigError, Guards
from sffn_dist.telemetry.events import EventLog

POLL_SECONDS = 0.5  # seconds between looks
# seconds that who serves the store, or wrote the verdict, waits for the others to have read it
LINGER_SECONDS = 5.0
STARTUP_FACTOR = 3  # times guards.hang_seconds until the first progress: weights are read, kernels compiled
SLOW_FACTOR = 10  # times the longest recent wait for progress: a step may take so long
# what is left of that longest wait at each further progress: one compilation counts for some steps only
LONGEST_DECAY = 0.98
# seconds beyond guards.lost_seconds that a broken connection waits for the rank with the cause
EXPLANATION_SECONDS = 10.0
# faulthandler, the last resort, is armed every REARM seconds, to fire BEYOND seconds after the hang limit
REARM, BEYOND = 30.0, 120.0
EXIT_SECONDS = 30.0  # seconds that an end may take: a pipe or a file system may block for ever
# a wait of POLL_SECONDS that takes longer than this: this process was stopped (Ctrl-Z) or kept from running
STARVED_SECONDS = 3.0


class Watchdog:
    """One a rank; inert until :meth:`start`."""

    def __init__(self, signals: SignalHandler | None = None) -> None:
        self._signals = signals or SignalHandler()
        self._heartbeat: Heartbeat | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ticks, self._ticked, self._longest, self._doing = 0, time.monotonic(), 0.0, "start"
        self._guards, self._run_dir, self._rank, self._step = Guards(), Path(), 0, 0
        self._armed = -math.inf
        self._waived = False  # no hang is looked for

    def start(self, store: Any, rank: int, world: int, guards: Guards, run_dir: Path) -> None:
        """Begin to watch; every rank must call it at the same place. Waits until all have."""
        self._guards, self._run_dir, self._rank = guards, run_dir, rank
        self._heartbeat = Heartbeat(store, rank, world, guards.lost_seconds, self._progress)
        self._heartbeat.start()
        # a run is asked for stacks from now on: unhandled, the signal would end this process
        self._signals.on_report = self._write_stacks
        self._signals.catch()
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def started(self) -> bool:
        return self._heartbeat is not None

    def tick(self, doing: str, step: int) -> None:
        """The main thread got on, and is ``doing`` something at a step; costs a microsecond."""
        now = time.monotonic()
        if self._ticks:
            self._longest = max(LONGEST_DECAY * self._longest, now - self._ticked)
        self._ticks, self._ticked, self._doing = self._ticks + 1, now, f"step {step}, {doing}"
        self._step = step

    @contextmanager
    def waiving_hangs(self, doing: str) -> Iterator[None]:
        """A block that may take hours without progress: lost ranks and verdicts end it, silence does not."""
        self._waived, self._doing = True, doing
        try:
            yield
        finally:
            self._ticked, self._waived = time.monotonic(), False

    def with_progress(self, function: Callable[..., Any], doing: str, step: int) -> Callable[..., Any]:
        """``function``, each call of which is progress."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.tick(doing, step)
            return function(*args, **kwargs)

        return wrapper

    def fail(self, error: BaseException) -> int:
        """The main thread ends with ``error``: the exit code, once the rank that has the reason printed it.

        A broken connection is what another rank's end looks like from here: such an error waits for the
        verdict of the rank with the cause.
        """
        code = _own_code(error) or (
            exit_codes.REFUSED if isinstance(error, ConfigError) else exit_codes.FAILED
        )
        if self._heartbeat and self._thread and not self._ended.is_set():
            if is_consequence(error):
                self._heartbeat.check_now()  # no beat from a rank that has gone: see who, now
                self._ended.wait(self._guards.lost_seconds + EXPLANATION_SECONDS)
            self._heartbeat.propose(
                Verdict(code, self._rank, f"{self._where()}{_short(error)}", self._text(error))
            )
            # it ends this process, unless it waits for the store
            self._thread.join(EXIT_SECONDS + LINGER_SECONDS)
        write_stderr(self._text(error))
        exit_codes.record(code, _short(error))
        return code

    def stop(self) -> None:
        """The rank's part is done: nobody need miss it.

        Rank 0, which may serve the store, waits for the others' beats.
        """
        if self._thread is None or self._ended.is_set():
            return
        assert self._heartbeat
        self._ended.set()
        self._thread.join()
        self._heartbeat.stop()
        faulthandler.cancel_dump_traceback_later()
        self._signals.on_report = None

    # --------------------------------------------------------------------------------------- the watch thread

    def _run(self) -> None:
        assert self._heartbeat
        warned = False
        while not self._ended.is_set():
            fault = self._heartbeat.fault
            try:
                self._poll()
            except Exception:  # a fault of the watch ends no healthy run, nor does it leave one alone
                fault = traceback.format_exc()
                self._ended.wait(POLL_SECONDS)
            if fault and not warned:
                warned = True
                write_stderr(
                    f"rank {self._rank}: warning: the watchdog raised an error and continues:\n{fault}"
                )

    def _poll(self) -> None:
        assert self._heartbeat
        before = time.monotonic()
        self._ended.wait(POLL_SECONDS)
        now = time.monotonic()
        if now - before > STARVED_SECONDS:
            self._heartbeat.resumed_at = now  # nobody is late for that
        if self._guards.hang_seconds and now - self._armed > REARM:
            # where this thread cannot run either, because somebody keeps the interpreter's lock: C code,
            # which needs none
            self._armed = now
            faulthandler.dump_traceback_later(self._limit() + BEYOND, exit=True)
        self._share_stop()
        verdict = self._heartbeat.verdict or self._lost() or self._hung()
        if verdict:
            self._end(verdict)

    def _share_stop(self) -> None:
        """A signal that one rank received is one for all, whatever their main threads wait in."""
        assert self._heartbeat
        received = self._signals.received
        if received is not None and self._heartbeat.stop_signal is None:
            self._heartbeat.stop_signal = int(received)
            self._heartbeat.check_now()
        elif received is None and self._heartbeat.stop_signal is not None:
            self._signals.note(self._heartbeat.stop_signal)

    def _progress(self) -> dict[str, Any]:
        return {"ticks": self._ticks, "doing": self._doing, "idle": round(time.monotonic() - self._ticked, 1)}

    def _limit(self) -> float:
        first = STARTUP_FACTOR if self._ticks < 2 else 1
        return max(first * self._guards.hang_seconds, SLOW_FACTOR * self._longest)

    def _lost(self) -> Verdict | None:
        assert self._heartbeat
        reason = self._heartbeat.lost()
        if reason is None:
            return None
        return self._heartbeat.propose(Verdict(exit_codes.LOST_RANK, self._rank, reason, ""))

    def _hung(self) -> Verdict | None:
        """No progress here for too long: everybody waits for the rank that is furthest behind."""
        assert self._heartbeat
        limit = self._limit()
        idle = time.monotonic() - max(self._ticked, self._heartbeat.resumed_at)
        if self._waived or not self._guards.hang_seconds or idle < limit:
            return None
        self._heartbeat.refresh_all()
        reason = (
            f"no progress for {limit:.0f} seconds (guards.hang_seconds = {self._guards.hang_seconds:g}): "
            f"{self._heartbeat.progress_by_rank()}"
        )
        return self._heartbeat.propose(Verdict(exit_codes.HUNG, self._rank, reason, ""))

    def _end(self, verdict: Verdict) -> None:
        """The reason if it is this rank's to print, stacks, and out: the main thread may be in a collective
        for ever.
        """
        assert self._heartbeat
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
        folder = self._run_dir / "stacks" / self._heartbeat.run_id
        try:
            should_report = verdict.rank == self._rank and self._heartbeat.should_report(folder)
            stuck = verdict.code in (exit_codes.HUNG, exit_codes.LOST_RANK)
            if should_report:  # first of all: folders and files may be what hangs
                stacks_note = f"stacks of the ranks that still run: {folder}/\n" if stuck else ""
                write_stderr((verdict.text or f"pretrain.py: error: {verdict.reason}\n") + stacks_note)
            with suppress(Exception):
                if stuck:
                    self.dump_stacks(folder)
            if should_report:
                self._record(verdict)
            self._heartbeat.wait_for_others(verdict, LINGER_SECONDS)
            flush_stdout()
        finally:
            os._exit(verdict.code)

    def _record(self, verdict: Verdict) -> None:
        exit_codes.record(verdict.code, verdict.reason)
        log = EventLog(self._run_dir / "events.jsonl", warns=False)
        log.write("ended", self._step, code=verdict.code, message=verdict.reason, doing=self._doing)

    def dump_stacks(self, folder: Path) -> Path | None:
        """Every thread's Python stack into ``folder``, or to standard error where that cannot be written."""
        header = (
            f"rank {self._rank}, pid {os.getpid()}: {self._doing}, for "
            f"{time.monotonic() - self._ticked:.1f} seconds\n\n"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank_{self._rank:05d}.txt"
            with path.open("a", encoding="utf-8") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + header)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            return path
        except OSError:
            write_stderr(header)
            faulthandler.dump_traceback(all_threads=True)
            return None

    def _write_stacks(self) -> None:
        """On REPORT_SIGNAL."""
        assert self._heartbeat
        path = self.dump_stacks(self._run_dir / "stacks" / self._heartbeat.run_id)
        if path:
            write_stderr(f"rank {self._rank}: stacks written to {path}\n")

    def _where(self) -> str:
        assert self._heartbeat
        return f"rank {self._rank} on {self._heartbeat.host}: "

    def _text(self, error: BaseException) -> str:
        """What is printed: problems of the input as they are, anything else with its traceback."""
        rank_prefix = self._where() if self._heartbeat and self._heartbeat.world > 1 else ""
        if isinstance(error, ConfigError):
            return "".join(
                f"pretrain.py: error: {rank_prefix if self._rank else ''}{problem}\n"
                for problem in error.problems
            )
        if isinstance(error, StopRequested):
            return f"pretrain.py: {error}\n"
        if _own_code(error):
            return f"pretrain.py: error: {error}\n"
        trace = "".join(traceback.format_exception(error))
        return f"{trace}pretrain.py: error: {rank_prefix}{_short(error)}\n"


def is_consequence(error: BaseException) -> bool:
    """True for what a collective or the store raises: most often because another rank has gone."""
    markers = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")
    kinds = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
    return type(error).__name__ in kinds or (
        isinstance(error, RuntimeError) and any(marker in str(error) for marker in markers)
    )


def _own_code(error: BaseException) -> int | None:
    """The exit code that an error of this package brings along.

    Others' exceptions have an attribute of that name too.
    """
    code = getattr(error, "exit_code", None)
    return (
        code
        if isinstance(code, int) and type(error).__module__.startswith(__name__.partition(".")[0] + ".")
        else None
    )


def _short(error: BaseException) -> str:
    first = str(error).strip().split("\n", 1)[0]
    return first if isinstance(error, ConfigError) or _own_code(error) else f"{type(error).__name__}: {first}"
