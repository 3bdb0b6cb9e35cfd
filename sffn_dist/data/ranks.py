"""Which ranks of a run see the same data.dir, and waiting for the one of them that prepares.

All of it goes through the rendezvous store, by polling. Preparing may take hours, longer than any collective
may wait. Who sees the same folder is found by content: each rank that lacks the corpus makes a file of a name
of its own, and looks for those of the ranks before it. ``flock`` and mount tables tell nothing that can be
relied on.

    usable, lacking    how many ranks have the corpus, and how many do not
    token              part of the files' names: the run's
    looked             how many ranks have found their preparer
    done/<rank>        that rank has published the corpus on its file system
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL = 0.1  # seconds
_calls = itertools.count()  # every rank prepares equally often: the keys of one call are its own


@dataclass(frozen=True)
class Ranks:
    """This rank among those of its run, and the rendezvous store."""

    store: Any
    rank: int
    world: int

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll; whether the others are alive is the watch's to see (health/watchdog.py)."""
        pause = _POLL
        while not condition():
            time.sleep(pause)
            pause = min(1.0, 1.1 * pause)


class Preparation:
    """One preparation of a corpus in ``data_dir`` by the ranks of a run. Every rank makes one."""

    def __init__(self, ranks: Ranks, data_dir: Path):
        from torch._C._distributed_c10d import PrefixStore  # a config is checked before torch is loaded

        self._ranks, self._data_dir = ranks, data_dir
        self._store = PrefixStore(f"prepare {next(_calls)}", ranks.store)

    def find_preparer(self, usable: bool) -> int:
        """The first rank that sees this rank's data.dir and lacks the corpus; this rank itself, if usable.

        Raises OSError where data.dir cannot be written.
        """
        rank, world = self._ranks.rank, self._ranks.world
        if usable:
            self._store.add("usable", 1)
            return rank
        token = self._store.compare_set("token", "", secrets.token_hex(8)).decode()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        mark = self._mark(token, rank)
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        try:
            self._store.add("lacking", 1)
            self._ranks.wait_until(lambda: self._count("usable") + self._count("lacking") == world)
            # by name, not by a listing: clients of network file systems keep listings
            preparer = next(other for other in range(rank + 1) if self._mark(token, other).exists())
            self._store.add("looked", 1)
            self._ranks.wait_until(lambda: self._count("looked") == self._count("lacking"))
        finally:
            mark.unlink(missing_ok=True)
        return preparer

    def report_done(self) -> None:
        """This rank has published the corpus."""
        self._store.set(f"done/{self._ranks.rank}", "")

    def wait_for(self, preparer: int, is_visible: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``preparer`` has published; whether this rank then sees it, within ``seconds``."""
        self._ranks.wait_until(lambda: bool(self._store.check([f"done/{preparer}"])))
        deadline = time.monotonic() + seconds
        self._ranks.wait_until(lambda: is_visible() or time.monotonic() > deadline)
        return is_visible()

    def _count(self, key: str) -> int:
        return int(self._store.add(key, 0))

    def _mark(self, token: str, rank: int) -> Path:
        return self._data_dir / f".{token}.{rank}.rank"
