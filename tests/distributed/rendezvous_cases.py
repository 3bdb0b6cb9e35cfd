"""Ranks that look for each other; called inside the nursery, which forks them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from sffn_dist.launch.ports import free_port
from sffn_dist.parallel import rendezvous
from sffn_dist.spec.config import ConfigError

Join = Callable[[float], str]


def _in_children(functions: list[Callable[[], str]]) -> list[str]:
    """What each returns, called in a process of its own."""
    pipes, pids = [os.pipe() for _ in functions], []
    for function, (_, writing) in zip(functions, pipes, strict=True):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                os.write(writing, function().encode())
            except BaseException:
                os.write(writing, traceback.format_exc().encode())
            finally:
                os._exit(0)
        os.close(writing)
    words = []
    for pid, (reading, _) in zip(pids, pipes, strict=True):
        with os.fdopen(reading) as file:
            words.append(file.read())
        os.waitpid(pid, 0)
    return words


def _join(rank: int, world: int, address: tuple[str, int], patience: float, start: int | None = None) -> str:
    """The other ranks' words, or what the ConfigError says."""
    os.environ.update({"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(start is not None)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start)
    try:
        store = rendezvous.connect(rank, world, patience)
    except ConfigError as error:
        return "; ".join(error.problems)
    before = store.compare_set(f"word/{rank}", "", f"{rank} at start {start}").decode()
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(world)])
    words = " and ".join(store.get(f"word/{other}").decode() for other in range(world))
    time.sleep(0.5 if rank == 0 else 0.0)  # it serves the store
    return words if before == f"{rank} at start {start}" else f"heard of {before}"


def meet(world: int, absent: tuple[int, ...] = (), patience: float = 30.0) -> list[str]:
    """Ranks that find each other, but for some."""
    address = ("127.0.0.1", free_port())
    there = [rank for rank in range(world) if rank not in absent]
    return _in_children([lambda rank=rank: _join(rank, world, address, patience) for rank in there])


def meet_again(starts: int) -> list[list[str]]:
    """Two ranks started again and again by an agent that serves the store all the while."""
    address = ("127.0.0.1", free_port())
    server = TCPStore(*address, is_master=True, wait_for_workers=False)
    found = []
    for start in range(starts):
        found.append(
            _in_children(
                [lambda rank=rank, start=start: _join(rank, 2, address, 20.0, start) for rank in range(2)]
            )
        )
    del server
    return found


def reach_nobody() -> str:
    """The port is nobody's."""
    return _in_children([lambda: _join(1, 2, ("127.0.0.1", free_port()), 1.0)])[0]


def go_early(folder: str) -> list[str]:
    """Rank 0 ends while rank 1 waits for rank 2."""
    address = ("127.0.0.1", free_port())
    mark = Path(folder) / "there"

    def first() -> str:
        store = TCPStore(*address, is_master=True, wait_for_workers=False)
        store.wait(["here/1"])
        mark.touch()
        return "gone"

    return _in_children([first, lambda: _join(1, 3, address, 20.0)])
