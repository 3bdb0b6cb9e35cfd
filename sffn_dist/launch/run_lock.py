"""One writer for each run directory. Standard library only; runs before torch is imported."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
import time
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import Any

from sffn_dist.spec.config import ConfigError

_log = getLogger(__name__)

LOCK_NAME = "lock"
PATIENCE = 3.0  # seconds to wait for a holder that is about to end
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


def _drop_inherited_locks() -> None:
    """In a forked child: close the descriptors, so that a data worker that outlives a killed rank does not
    keep its lock.
    """
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_drop_inherited_locks)


class RunLock:
    """Exclusive hold on a run directory, through ``flock`` on ``run_dir/lock``.

    The file holds one JSON line (host, pid, started, user, command) about its holder. The kernel drops the
    lock when the holder ends, however it ends; the file itself stays and names who held it last.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise ConfigError naming ``run.dir``: held by another process, or not a
        writable folder.
        """
        if self._fd is not None:
            return
        fd = self._open()
        try:
            _flock(fd, time.monotonic() + PATIENCE)
        except BlockingIOError:
            holder = _describe_holder(fd)
            os.close(fd)
            rule = f"another run is writing there: {holder}; let it end, stop it, or choose another run.dir"
            raise ConfigError([self._message(rule)]) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(fd)
                raise ConfigError([self._message(f"cannot be locked: {error.strerror}")]) from None
            _log.warning(
                "%s",
                self._message(
                    f"its file system has no locks ({error.strerror}), a second run is not kept away"
                ),
            )
        try:
            _write_holder(fd)
        except OSError as error:
            os.close(fd)
            raise ConfigError([self._message(f"cannot be written: {error.strerror}")]) from None
        self._fd = fd
        _held.add(fd)

    def release(self) -> None:
        """Let go; nothing happens if the lock is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if fd in _held:  # a forked child has closed it already, and the number may be another file's by now
            _held.discard(fd)
            os.close(fd)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _message(self, rule: str) -> str:
        return f"run.dir = {str(self.run_dir)!r}: {rule}"

    def _open(self) -> int:
        """Descriptor of the lock file: read and write, not truncated (the holder's line is in it), closed
        on exec.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(self.run_dir, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return os.open(self.run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise ConfigError([self._message("is a file; must be a folder")]) from None
        except OSError as error:
            raise ConfigError([self._message(f"cannot be written: {error.strerror}")]) from None


def _flock(fd: int, deadline: float) -> None:
    """Take the lock; raises BlockingIOError if it is still held at the deadline.

    Ranks notice within two seconds that their launcher was killed: a restart at once should find the run
    free, not held by them.
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def _write_holder(fd: int) -> None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": user,
        "command": shlex.join(sys.orig_argv),
    }
    line = (json.dumps(holder) + "\n").encode()
    # over the old line, then cut: a reader sees the new first line or the old one, hardly ever an empty file
    os.pwrite(fd, line, 0)
    os.ftruncate(fd, len(line))


def _describe_holder(fd: int) -> str:
    """Who holds the lock, as far as its file states (through the same descriptor: on NFS closing another
    would drop locks).
    """
    for _ in range(5):
        try:
            holder: Any = json.loads(os.pread(fd, 65536, 0).split(b"\n", 1)[0])
            return (
                f"pid {holder['pid']} on {holder['host']}, since {holder['started']} (user {holder['user']})"
            )
        except (ValueError, KeyError, TypeError, OSError):
            time.sleep(0.05)  # it has the lock and is about to write
    return "a process that has not said which"
