"""No rank without its launcher: a rank whose launcher is gone saves and stops.

Ctrl-C in a terminal ends the ``deepspeed`` command at once, long before its ranks have saved: its end is a
request to stop, as SIGTERM is. Standard library only; runs before torch is imported.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from sffn_dist.launch import processes


def watch_launcher(stop: Callable[[str], None], interval: float = 1.0) -> threading.Thread | None:
    """Call ``stop`` with a description of the launcher that started this process, once it is gone.

    Polls every ``interval`` seconds.

    The watched launcher is the parent process. DeepSpeed has two: the ``deepspeed`` command and, below it,
    its ``launch.py``, which goes on without the first; so under it that command is watched as well. Nothing
    is watched, and None returned, where no launcher started this process (no LOCAL_RANK in the environment,
    or an interactive shell as the parent).
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    parent = os.getppid()
    command = processes.command_line(parent)
    if processes.is_shell(command) and not any(not word.startswith("-") for word in command[1:]):
        return None  # LOCAL_RANK set by hand, and a shell that the user may leave
    runner = _deepspeed_runner(parent, command)
    thread = threading.Thread(
        target=_watch, args=(parent, runner, stop, interval), name="watch-launcher", daemon=True
    )
    thread.start()
    return thread


def _watch(parent: int, runner: int | None, stop: Callable[[str], None], interval: float) -> None:
    names = {pid: processes.described(pid) for pid in (parent, runner) if pid is not None}
    while True:
        if os.getppid() != parent:
            return stop(names[parent])
        if runner is not None and processes.parent_of(parent) not in (runner, None):
            return stop(names[runner])
        time.sleep(interval)


def _deepspeed_runner(launch: int, command: list[str]) -> int | None:
    """Process id of the ``deepspeed`` command above a DeepSpeed ``launch.py``.

    None where that is not the chain.
    """
    line = " ".join(command)
    if "deepspeed.launcher.launch" not in line and "deepspeed/launcher/launch.py" not in line:
        return None
    runner = processes.parent_of(launch)
    if runner is None:
        return None
    above = processes.command_line(runner)
    # a shell may name deepspeed too (`bash -c "... deepspeed.launcher.launch ... &"`), and its end means
    # nothing
    return runner if "deepspeed" in " ".join(above) and not processes.is_shell(above) else None
