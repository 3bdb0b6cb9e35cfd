"""A stop in the middle of a step, an evaluation or a sample, where the end of it would come too late.

Weights, moments and counts change in an optimizer step alone: while a forward or backward pass runs they are
those of the last step. So a thread can save them, whatever the main thread waits in, once it knows that no
rank updates and that all are at one step:

    main thread   allow(step, doing)  forward, backward, ...  forbid()  update, hooks
    thread        a stop was asked for, and this pass may not end in time
                  -> rank 0 opens a round; each rank holds its main thread back at forbid()
                  -> all held, at one step: save, exit. Else: let them go on, another round a little later

Ranks agree through the rendezvous store: their collectives may be busy. An evaluation or a sample is given up
at once, the next start makes up for it; a training step only when the deadline of the stop comes near
(launch/signals.py). A step that ends in time is followed by the save of training/loop.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from sffn_dist.launch.signals import SignalHandler, Stop
from sffn_dist.parallel.topology import Topology

TRAINING = "training"
# seconds before the deadline at which a step is given up, at least; a save takes its own time twice
RESERVE_SECONDS = 5.0
_HOLD_SECONDS = 1.0  # that a round waits for a rank's main thread
_PAUSE_SECONDS = 0.2  # between looks, and between rounds


class Interruption:
    """One a rank. The thread that constructs it is the one that is held back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the main thread has it wherever the state may change
        self._lock.acquire()
        self._doing: tuple[int, str] | None = None  # step and what, while the main thread may be interrupted
        self._closed = threading.Event()

    def allow(self, step: int, doing: str) -> None:
        """From here to :meth:`forbid` the state is that before ``step``, complete on every rank."""
        self._doing = step, doing
        self._lock.release()

    def forbid(self) -> None:
        """Wait here if a round holds this rank; it may end the process.

        Nothing where it is forbidden already.
        """
        if self._doing is not None:
            self._lock.acquire()
            self._doing = None

    @contextlib.contextmanager
    def allowed(self, step: int, doing: str) -> Iterator[None]:
        """:meth:`allow` and :meth:`forbid` around what computes and changes nothing."""
        self.allow(step, doing)
        try:
            yield
        finally:
            self.forbid()

    def start(
        self,
        store: Any,
        topology: Topology,
        signals: SignalHandler,
        save_and_end: Callable[[Stop, str], None],
        save_seconds: Callable[[], float],
    ) -> None:
        """Begin to look for stops. ``save_and_end`` is called in the thread and must end the process; all
        ranks must call it. ``save_seconds``: how long the last save took.
        """

        def run() -> None:
            while not self._closed.is_set() and signals.received is None:
                time.sleep(_PAUSE_SECONDS)
            if self._closed.is_set():
                return
            assert signals.received
            agreement = None
            if topology.world_size > 1:
                agreement = PrefixStore("interruption", store.clone() if hasattr(store, "clone") else store)
            with suppress(RuntimeError):  # the store is gone: the deadline ends this process
                self._rounds(
                    agreement,
                    topology,
                    lambda: self._due(signals, save_seconds()),
                    lambda doing: save_and_end(signals.stop(), doing),
                )

        threading.Thread(target=run, name="interruption", daemon=True).start()

    def close(self) -> None:
        """The run ends by itself."""
        self._closed.set()

    # ------------------------------------------------------------------------------------------------- rounds

    def _rounds(
        self, store: Any, topology: Topology, due: Callable[[], bool], save_and_end: Callable[[str], None]
    ) -> None:
        number = 0
        while not self._closed.is_set():
            if due() if store is None else _opened(store, topology, number, due()):
                doing = self._hold(store, topology, number)
                if doing is not None:
                    with _own_stream():
                        save_and_end(doing)
                number += 1
            time.sleep(_PAUSE_SECONDS)

    def _due(self, signals: SignalHandler, save_seconds: float) -> bool:
        """Whether what the main thread does now should be given up."""
        doing = self._doing
        if doing is None:
            return False
        reserve = max(RESERVE_SECONDS, 2.0 * save_seconds + 2.0)
        return doing[1] != TRAINING or time.monotonic() > signals.deadline - reserve

    def _hold(self, store: Any, topology: Topology, number: int) -> str | None:
        """Hold the main threads of all ranks: what they do, or None where they go on, on every rank."""
        held = self._lock.acquire(timeout=_HOLD_SECONDS)
        doing = self._doing if held else None
        own = "busy" if doing is None else f"{doing[0]} {doing[1]}"
        agreed = own
        if store is not None:
            store.set(f"held/{number}/{topology.rank}", own)
            if topology.is_rank_zero:
                keys = [f"held/{number}/{rank}" for rank in range(topology.world_size)]
                reports = {report.decode() for report in store.multi_get(keys)}
                store.set(f"agreed/{number}", own if len(reports) == 1 else "busy")
            agreed = store.get(f"agreed/{number}").decode()
        if agreed != "busy":
            return agreed.partition(" ")[2]
        if held:
            self._lock.release()
        return None


def _opened(store: Any, topology: Topology, number: int, due: bool) -> bool:
    """Whether rank 0 has opened this round, which it does once any rank asked for one."""
    if due:
        store.set("due", "")
    if topology.is_rank_zero and store.check(["due"]):
        store.set(f"round/{number}", "")
    return bool(store.check([f"round/{number}"]))


@contextlib.contextmanager
def _own_stream() -> Iterator[None]:
    """Copies must not queue behind what the main thread's stream still computes, perhaps for ever."""
    if not torch.cuda.is_initialized():
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
