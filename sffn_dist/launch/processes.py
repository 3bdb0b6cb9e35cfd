"""What /proc shows of other processes of this machine. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh", "ash", "busybox"}


def command_line(pid: int) -> list[str]:
    """The words of a process's command line; empty where there is no /proc or no such process."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word for word in raw.decode(errors="replace").split("\0") if word]


def is_shell(command: list[str]) -> bool:
    """Whether a command line runs a shell."""
    return bool(command) and os.path.basename(command[0]).lstrip("-") in _SHELLS


def described(pid: int) -> str:
    """A process for messages: its number, and its command line as far as that is known."""
    command = " ".join(command_line(pid))
    return f"pid {pid}" + (f" ({command[:100]})" if command else "")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name, which may hold anything: state, parent, ..., start at
    19. Raises OSError.
    """
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii", "replace").split()
    if len(fields) < 20:
        raise OSError(f"/proc/{pid}/stat holds {fields}")
    return fields


def parent_of(pid: int) -> int | None:
    """The parent's process id; None where it cannot be read."""
    try:
        return int(_stat(pid)[1])
    except (OSError, ValueError):
        return None


def start_time(pid: int) -> str:
    """When a process began, in ticks since boot: a number given to another process later has another start.

    Empty if unknown.
    """
    try:
        return _stat(pid)[19]
    except OSError:
        return ""


def process_state(pid: int, started: str) -> str | None:
    """The word "gone", or the letter of its state.

    None where it cannot be told, because it lives in another namespace, say.

    ``started`` is its :func:`start_time` when it was known to live.
    """
    if not started:
        return None
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return None
    return "gone" if fields[0] in "ZX" or fields[19] != started else fields[0]
