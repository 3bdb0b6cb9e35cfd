"""Heartbeats of all ranks in the rendezvous store, and the first verdict on the run, which stands for all.

    beat/<rank>     {"n": number of the beat, "ticks", "doing", "idle": progress, "done"}
    place/<rank>    host, pid and start time of the process
    stop            number of the signal that a rank received
    verdict         {"code", "rank", "reason", "text"}; written once
    heard           how many ranks have read it
    run             id of this start, by rank 0's clock

A rank is lost when its beat stands still for guards.lost_seconds, or at once when its process on this very
machine is gone. Who serves the store, rank 0 or torchrun's agent, may go or stop too: the thread that talks
to it may then hang, so what others need of it is memory.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from sffn_dist.launch.processes import process_state, start_time


@dataclass(frozen=True)
class Verdict:
    """Why a run ends."""

    code: int
    rank: int  # that proposed it
    reason: str  # a line
    text: str  # all that is printed, where it is more than the line


class Heartbeat:
    """This rank's heartbeat and those of the others.

    One thread, the only one that uses the store between :meth:`start` and :meth:`stop`.
    """

    def __init__(
        self, store: Any, rank: int, world: int, patience: float, progress: Callable[[], dict[str, Any]]
    ):
        # a connection of its own: the groups' one may be busy waiting
        self._store = PrefixStore("watch", store.clone() if hasattr(store, "clone") else store)
        self.rank, self.world, self.host = rank, world, platform.node()
        self._patience, self._progress = patience, progress
        self.interval = min(2.0, max(0.2, patience / 10)) if patience else 2.0
        self.verdict: Verdict | None = None
        self.run_id = ""
        self.stop_signal: int | None = None  # a signal that some rank received; set it to tell the others
        self._stop_shared = False
        self._mine: Verdict | None = None
        self._places: dict[int, tuple[str, int, str]] = {}
        self._near: list[int] = []  # ranks whose processes can be seen from here
        # when it last changed, by this rank's clock
        self._beats: dict[int, tuple[float, dict[str, Any]]] = {}
        self._contact, self._broken = time.monotonic(), False
        self._gone: dict[int, float] = {}  # since when processes of this machine are seen to be gone
        self._heard = 0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._exchange_beats, name="heartbeat", daemon=True)
        self._number, self._asked, self.fault = 0, 0.0, ""
        self._all = rank == 0  # read the beats of every rank, not only of those of this machine
        # when this process last came back from having been stopped: no silence counts from before
        self.resumed_at = 0.0

    def start(self) -> None:
        """Publish this rank's place, wait until all have, and begin."""
        self._store.set(f"place/{self.rank}", json.dumps([self.host, os.getpid(), start_time(os.getpid())]))
        self._beat()
        if self.rank == 0:
            self._store.set("run", time.strftime("%Y%m%d-%H%M%S"))
        self.run_id = self._store.get("run").decode()
        places = self._store.multi_get([f"place/{rank}" for rank in range(self.world)])
        self._places = {rank: self._visible(*json.loads(place)) for rank, place in enumerate(places)}
        self._near = [
            rank for rank, (host, _, started) in self._places.items() if host == self.host and started
        ]
        now = time.monotonic()
        self._beats = {rank: (now, {}) for rank in range(self.world)}
        self._contact = now
        self._thread.start()

    def stop(self, patience: float = 60.0) -> None:
        """This rank is done.

        Rank 0 goes last, so that no other finds the store gone before it is done too.
        """
        self._stopping.set()
        self._wake.set()
        self._thread.join(patience)
        if self._thread.is_alive():  # the store does not answer: this thread would hang there too
            return
        with suppress(Exception):
            self._beat(done=True)
            deadline = time.monotonic() + patience
            while self.rank == 0 and time.monotonic() < deadline:
                self._read_beats()
                if all(
                    self._done(rank) or process_state(pid, started) == "gone"
                    for rank, (_, pid, started) in self._places.items()
                ):
                    return
                time.sleep(0.05)

    def propose(self, verdict: Verdict) -> Verdict | None:
        """Ask that this be the verdict.

        Returns the one that stands, None while the store has not answered.
        """
        if self._mine is None:
            self._mine = verdict
            self._wake.set()
        deadline = time.monotonic() + 2 * self.interval
        while self.verdict is None and not self._broken and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.verdict is None and (self._broken or self._out_of_contact()):
            self.verdict = self._mine  # nobody to ask: each for itself
        return self.verdict

    def check_now(self) -> None:
        """A connection broke: somebody may be gone, look at once."""
        self._wake.set()

    def refresh_all(self) -> None:
        """Read the beats of all ranks once, whatever they are at now: for :meth:`progress_by_rank`."""
        self._all, now = True, time.monotonic()
        self._wake.set()
        while not self._broken and self._asked < now and time.monotonic() < now + 2 * self.interval:
            time.sleep(0.02)

    def _visible(self, host: str, pid: int, started: str) -> tuple[str, int, str]:
        """A rank's place.

        Without start time where its process cannot be seen from here, though it lives: in another container,
        for example.
        """
        return (
            host,
            pid,
            started if host == self.host and process_state(pid, started) not in ("gone", None) else "",
        )

    # ------------------------------------------------------------------------------------------------- asking

    def lost(self) -> str | None:
        """Which rank is lost, and how that shows; None if all are there. From memory alone."""
        gone_rank = self._near_and_gone()
        if gone_rank is not None:
            return self._exited(gone_rank)
        if not self._patience:
            return None
        if self._broken or self._out_of_contact():
            if self.rank == 0:
                return "the rendezvous store does not answer: its process is gone or cannot be reached"
            if self._done(0):
                return None
            if 0 in self._near and process_state(*self._places[0][1:]) == "gone":  # since it was looked for
                return self._exited(0)
            return self._describe(0, "cannot be reached: the rendezvous store does not answer")
        now = time.monotonic()
        for rank in range(self.world) if self.rank == 0 else (0,):
            silence = now - max(self._beats[rank][0], self.resumed_at)
            if rank != self.rank and silence > self._patience and not self._done(rank):
                symptom = f"no heartbeat for {silence:.0f} s (guards.lost_seconds = {self._patience:g})"
                return self._describe(rank, symptom)
        return None

    def _exited(self, rank: int) -> str:
        host, pid, _ = self._places[rank]
        return (
            f"rank {rank} (pid {pid}) on {host} exited without an error message: "
            f"killed from outside, out of memory, or crashed"
        )

    def _near_and_gone(self) -> int | None:
        """A rank of this machine whose process is gone though it never reported that it was done, looked
        up after it was gone.
        """
        for rank in self._near:
            _, pid, started = self._places[rank]
            if rank == self.rank or self._done(rank) or process_state(pid, started) != "gone":
                continue
            since = self._gone.setdefault(rank, time.monotonic())
            self._wake.set()
            if (self._broken and rank == 0) or (self._contact > since and self._asked > since):
                return rank
        return None

    def _describe(self, rank: int, symptom: str) -> str:
        host, pid, started = self._places[rank]
        state = process_state(pid, started)
        process_note = {"gone": "; its process is gone", "T": "; its process is stopped"}.get(state or "", "")
        doing = self._beats[rank][1].get("doing")
        return f"rank {rank} (pid {pid}) on {host}: {symptom}{process_note}" + (
            f"; it was last at {doing}" if doing else ""
        )

    def progress_by_rank(self) -> str:
        """Who is how far, as far as it is known here; furthest behind first."""
        beats = {rank: beat for rank, (_, beat) in self._beats.items() if beat} | {
            self.rank: self._progress()
        }
        order = sorted(beats, key=lambda rank: (beats[rank].get("ticks", 0), rank))
        positions = [
            f"rank {rank} on {self._places[rank][0]} at {beats[rank].get('doing', 'start')}"
            for rank in order[:8]
        ]
        return ", ".join(positions) + (", ..." if len(order) > 8 else "")

    def should_report(self, folder: Path) -> bool:
        """True if this rank is to report the reason: always, unless the store does not answer and another
        rank has reported it.
        """
        if not self._broken and not self._out_of_contact():
            return True
        time.sleep(min(0.2 * self.rank, 5.0))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(folder / "told", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def wait_for_others(self, verdict: Verdict, linger: float) -> None:
        """Wait until the others have read the verdict, where this rank wrote it or serves the store.

        End what cannot end by itself.
        """
        for rank, (_, pid, started) in self._places.items():
            if rank != self.rank and process_state(pid, started) == "T":
                # stopped: no signal but this one reaches it, and launchers wait for it
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if self._broken or (verdict.rank != self.rank and self.rank):
            return
        deadline = time.monotonic() + linger
        alive = [rank for rank in self._places if not self._done(rank) and not self._silent(rank)]
        while time.monotonic() < deadline and self._heard < len(alive):
            time.sleep(0.05)

    def _silent(self, rank: int) -> bool:
        """No answer can be expected of it.

        A process that can be seen to run is late, not silent, however old its beat: on a machine with more
        processes than cores a beat of 0.6 s was 2.5 s late, and its rank then found the store gone.
        """
        _, pid, started = self._places[rank]
        if rank in self._near:
            return process_state(pid, started) in ("gone", "T")
        return time.monotonic() - self._beats[rank][0] > 4 * self.interval

    def _done(self, rank: int) -> bool:
        return bool(self._beats[rank][1].get("done"))

    def _out_of_contact(self) -> bool:
        return (
            bool(self._patience) and time.monotonic() - max(self._contact, self.resumed_at) > self._patience
        )

    # ---------------------------------------------------------------------------------------- the line itself

    def _exchange_beats(self) -> None:
        acknowledged = False
        while not self._stopping.is_set():
            try:
                asked = time.monotonic()
                self._beat()
                self._read_beats()
                self._asked = asked
                self._settle_verdict()
                self._share_stop()
                if self.verdict and not acknowledged:
                    acknowledged = True
                    self._heard = self._store.add("heard", 1)
                elif self.verdict:
                    self._heard = self._store.add("heard", 0)
                self._contact = time.monotonic()
            except RuntimeError:  # what the store raises once it is gone
                self._broken = not self._stopping.is_set()
                return
            except (
                Exception
            ):  # not the store's: again at the next beat; should it last, the others miss this rank's beat
                self.fault = traceback.format_exc()
            self._wake.wait(0.05 if self.verdict else self.interval)
            self._wake.clear()

    def _beat(self, done: bool = False) -> None:
        self._number += 1
        self._store.set(
            f"beat/{self.rank}", json.dumps({"n": self._number, "done": done, **self._progress()})
        )

    def _read_beats(self) -> None:
        """Rank 0 reads everyone's, the others those of rank 0 and of this machine."""
        wanted = list(range(self.world)) if self._all else sorted({0, *self._near})
        beats = self._store.multi_get([f"beat/{rank}" for rank in wanted])
        now = time.monotonic()
        for rank, raw in zip(wanted, beats, strict=True):
            beat = json.loads(raw)
            if beat["n"] != self._beats.get(rank, (0.0, {}))[1].get("n"):
                self._beats[rank] = (now, beat)

    def _share_stop(self) -> None:
        if self._stop_shared:
            return
        if self.stop_signal is not None:
            self._store.set("stop", str(self.stop_signal))
            self._stop_shared = True
        elif self._store.check(["stop"]):
            self.stop_signal, self._stop_shared = int(self._store.get("stop")), True

    def _settle_verdict(self) -> None:
        if self.verdict is None:
            if self._mine is not None:
                verdict_json = self._store.compare_set("verdict", "", json.dumps(asdict(self._mine)))
            elif self._store.check(["verdict"]):
                verdict_json = self._store.get("verdict")
            else:
                return
            self.verdict = Verdict(**json.loads(verdict_json))
