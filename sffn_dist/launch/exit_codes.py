"""What a run's exit code means, and the record of an end that a job script reads. Standard library only.

    0  finished                      4  replicas of the weights differ
    1  an exception                  5  hung: no progress, stacks were written
    2  input refused                 6  a rank was lost, or did not come
    3  diverged: skipped and rolled-back steps did not help
    128 + n  stopped by signal n after its state was saved: 130 SIGINT, 138 SIGUSR1, 143 SIGTERM

Where several ranks end, launchers give the code of one of them, or their own. So the rank that knows why the
run ends also leaves a record, in the file that the environment variable SFFN_EXIT_FILE names: the first one
stays.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from contextlib import suppress
from typing import Any

from sffn_dist import strict_json

DONE, FAILED, REFUSED, DIVERGED, REPLICAS_DIFFER, HUNG, LOST_RANK = range(7)
RESTARTABLE = frozenset(
    {FAILED, HUNG, LOST_RANK}
)  # starting again may help; a signalled stop goes on by whoever sent the signal
VARIABLE = "SFFN_EXIT_FILE"


def for_signal(number: int) -> int:
    """The exit code of a run that saved and stopped because of a signal."""
    return 128 + number


def name(code: int) -> str:
    """A word or two for a code."""
    names = ("finished", "exception", "refused", "diverged", "replicas differ", "hung", "rank lost")
    if 0 <= code < len(names):
        return names[code]
    try:
        return f"stopped by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"exit code {code}"


def record(code: int, reason: str) -> None:
    """Record the end, once for all ranks; never raises: it is printed on standard error too."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    rank = os.environ.get("RANK", "0")
    tree: dict[str, Any] = {
        "code": code,
        "name": name(code),
        "restart": code in RESTARTABLE,
        "reason": reason,
        "rank": int(rank) if rank.isdecimal() else rank,
        "host": platform.node(),
        "time": time.time(),
    }
    with suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, (strict_json.dumps(tree) + "\n").encode())
        finally:
            os.close(descriptor)
