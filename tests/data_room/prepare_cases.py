"""Ranks that prepare one corpus: a real store, a real watch, real ends. Called inside the nursery."""

from __future__ import annotations

import datetime
import errno
import fcntl
import logging
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sffn_dist.data import build
from sffn_dist.data.prepare import prepare
from sffn_dist.data.ranks import Ranks
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.launch.ports import free_port
from sffn_dist.parallel import rendezvous
from sffn_dist.spec.config import Guards
from sffn_dist.spec.loading import from_tree

SLOW = 3.0  # seconds that preparing takes: longer than every time-out here
GUARDS = Guards(hang_seconds=0.5, lost_seconds=8.0)


def _build_slowly(preparer_dies: bool) -> None:
    describe = build._describe

    def slowly(*arguments: Any) -> Any:
        print("inside", file=os.fdopen(os.dup(2), "w"), flush=True)
        if preparer_dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SLOW)
        return describe(*arguments)

    build._describe = slowly


def _flock(file: Any, operation: int) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _rank(rank: int, world: int, tree: dict[str, Any], dies: bool) -> int:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world)})
    fcntl.flock = _flock  # type: ignore[assignment]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    if rank == 0:
        logging.getLogger("sffn_dist").setLevel(logging.INFO)
    watchdog = Watchdog()
    store = rendezvous.connect(rank, world)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=1.5),
    )
    watchdog.start(store, rank, world, GUARDS, Path(tree["run"]["dir"]))
    _build_slowly(dies)
    try:
        with watchdog.waiving_hangs("preparing data"):
            folder = prepare(from_tree(tree), Ranks(store, rank, world))
        dist.barrier()
    except Exception as error:
        return watchdog.fail(error)
    os.write(2, f"has {folder}\n".encode())
    watchdog.stop()
    return 0


def play(tree: dict[str, Any], data_dirs: list[str], logs: str, dies: bool = False) -> list[tuple[int, str]]:
    """Each rank's exit code (or minus its signal), and what it said; rank i has ``data_dirs[i]``."""
    port = free_port()
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    pids = []
    for rank, data_dir in enumerate(data_dirs):
        pids.append(os.fork())
        if not pids[-1]:
            code = 99
            try:
                log = os.open(f"{logs}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(log, 2)
                own = {**tree, "data": {**tree["data"], "dir": data_dir}}
                code = _rank(rank, len(data_dirs), own, dies)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [(code, Path(logs, str(rank)).read_text()) for rank, code in enumerate(codes)]
