"""One writer for each run directory. Standard library only; runs before torch is imported.

Two means: ``flock`` on ``run_dir/lock``, which the kernel drops however the holder ends, and the claim
``run_dir/heartbeat`` (claim.py), which keeps a second run away where ``flock`` is missing or local to a
machine.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import sys
import time
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import Any

from sffn_dist.launch import claim, exit_codes
from sffn_dist.launch.claim import Claim, Holder, Seen
from sffn_dist.spec.config import ConfigError

_log = getLogger(__name__)

LOCK_NAME = "lock"
HEARTBEAT_NAME = "heartbeat"
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
    """Exclusive hold on a run directory.

    ``run_dir/lock`` holds one JSON line (host, pid, started, user, command) about its holder; the file stays
    and names who held it last. ``run_dir/heartbeat`` is removed when the holder ends in order. A killed
    holder of this machine is replaced at once, one of another machine after ``claim.STILL_SECONDS`` without
    a heartbeat.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)
        self._fd: int | None = None
        self._claim = Claim(self.run_dir / HEARTBEAT_NAME, self._lost, self._remake)

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
            holder = self._describe_holder(fd)
            os.close(fd)
            rule = f"another run is writing there: {holder}; let it end, stop it, or choose another run.dir"
            raise ConfigError([self._message(rule)]) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(fd)
                raise ConfigError([self._message(f"cannot be locked: {error.strerror}")]) from None
            _log.info(
                "%s", self._message(f"no flock there ({error.strerror}); {HEARTBEAT_NAME} keeps others away")
            )
        try:
            self._take_claim()
            _write_holder(fd)
        except OSError as error:
            self._claim.release()
            os.close(fd)
            raise ConfigError([self._message(f"cannot be written: {error.strerror}")]) from None
        except BaseException:  # refused, or Ctrl-C while it waits
            os.close(fd)
            raise
        self._fd = fd
        _held.add(fd)
        atexit.register(self.release)

    def _take_claim(self) -> None:
        """Take ``run_dir/heartbeat``, or raise ConfigError; a silent holder of another machine is waited
        for.
        """
        deadline, told = time.monotonic() + PATIENCE, False
        while (seen := self._claim.try_take()) is not None:
            if self._claim.has_beaten(seen) or (seen.is_here() and time.monotonic() > deadline):
                rule = (
                    f"another run is writing there: {seen.describe()}; let it end, stop it, or choose "
                    f"another run.dir"
                )
                raise ConfigError([self._message(rule)])
            if not seen.is_here() and not told:
                told = True
                _log.warning(
                    "%s",
                    self._message(
                        f"held by {seen.describe()}, a process that cannot be looked up from here; waiting: "
                        f"it is replaced once it has been silent for {claim.STILL_SECONDS:g} s, and this "
                        f"start is refused at its next heartbeat"
                    ),
                )
            time.sleep(0.2)

    def _describe_holder(self, fd: int) -> str:
        """Who holds the flock; with the last heartbeat, unless an older version holds it."""
        try:
            seen = claim.look(self._claim.path)
        except OSError:
            seen = None
        return seen.describe() if seen and seen.holder else _read_holder(fd)

    def _remake(self) -> None:
        """Lock again where run.dir was removed: the descriptor's file is at no path any more."""
        fd = self._fd
        with contextlib.suppress(ConfigError, OSError):
            if fd is None or (self.run_dir / LOCK_NAME).exists():
                return
            new = self._open()
            with contextlib.suppress(OSError):  # none there, or a start that the heartbeat refuses
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_holder(new)
            self._fd = new
            _held.add(new)
            _held.discard(fd)
            os.close(fd)

    def _lost(self, seen: Seen) -> None:
        """Another run took run.dir while this process was stopped: end before both write."""
        text = self._message(f"taken over by another run, {seen.describe()}; this one ends")
        sys.stderr.write(f"pretrain.py: error: {text}\n")
        exit_codes.record(exit_codes.REFUSED, text)
        os._exit(exit_codes.REFUSED)

    def release(self) -> None:
        """Let go; nothing happens if the lock is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        atexit.unregister(self.release)
        self._claim.release()
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
    here = Holder.here()
    holder = {key: getattr(here, key) for key in ("host", "pid", "started", "user", "command")}
    line = (json.dumps(holder) + "\n").encode()
    # over the old line, then cut: a reader sees the new first line or the old one, hardly ever an empty file
    os.pwrite(fd, line, 0)
    os.ftruncate(fd, len(line))


def _read_holder(fd: int) -> str:
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
