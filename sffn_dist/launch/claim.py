"""Who holds a thing, told by a file with a heartbeat and never by ``flock`` alone.

``flock`` answers ENOSYS on some file systems and is local to one machine on others (BeeGFS, NFS with
``nolock``, Lustre with ``localflock``). A claim is a file that is created with O_EXCL, which is atomic on all
of them. It holds one JSON line about its holder, who touches it every ``BEAT_SECONDS``.

A holder is dead
    on this machine    when its process (pid and start time) is gone: at once
    elsewhere          when the file has not been touched for ``STILL_SECONDS``, by the file system's clock

Standard library only.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path

from sffn_dist.launch.processes import process_state, start_time

_log = getLogger(__name__)

BEAT_SECONDS = 5.0
# an NFS client may show a time of change that is 60 s old (acregmax), and a machine may be slow
STILL_SECONDS = 120.0
TAKE_OVER_TRIES = 3  # of one look at a claim, where others look at the same time


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim.

    ``machine`` is equal for processes that see each other's process ids; ``ticks`` is the start time in
    /proc; ``token`` is another for every claim.
    """

    host: str
    machine: str
    pid: int
    ticks: str
    started: str
    user: str
    command: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process, with a new token."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            user = str(os.getuid())
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            ticks=start_time(os.getpid()),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            user=user,
            command=shlex.join(sys.orig_argv),
            token=secrets.token_hex(8),
        )

    def line(self) -> bytes:
        """The JSON line of a claim's file."""
        return (json.dumps(asdict(self)) + "\n").encode()


@dataclass(frozen=True)
class Seen:
    """A claim's file as it was found. ``holder`` is None where its line cannot be read (yet)."""

    holder: Holder | None
    modified: int  # nanoseconds, the file system's clock
    age: float  # seconds since then, by the same clock

    @property
    def token(self) -> str:
        return self.holder.token if self.holder else "unreadable"

    def is_here(self) -> bool:
        """Whether the holder is a process that can be looked up on this machine."""
        return bool(self.holder and self.holder.ticks and self.holder.machine == _machine())

    def is_dead(self) -> bool:
        """Whether the holder is proven dead, or silent for ``STILL_SECONDS``."""
        if self.holder and self.is_here():
            return process_state(self.holder.pid, self.holder.ticks) == "gone"
        return self.age > STILL_SECONDS

    def describe(self) -> str:
        """Who, where, since when, and the last heartbeat, for messages."""
        if self.holder is None:
            return f"a process that has not said which (last heartbeat {max(0.0, self.age):.0f} s ago)"
        who = self.holder
        return (
            f"pid {who.pid} on {who.host}, since {who.started} (user {who.user}, last heartbeat "
            f"{max(0.0, self.age):.0f} s ago)"
        )


def look(path: Path, clock: Path | None = None) -> Seen | None:
    """The claim at ``path``; None where there is none. Raises OSError where it cannot be read.

    ``clock``: a folder of the same file system in which a file may be made for a moment (None: the claim's).
    """
    try:
        with open(path, "rb") as file:
            modified = os.fstat(file.fileno()).st_mtime_ns
            line = file.read(65536).split(b"\n", 1)[0]
    except FileNotFoundError:
        return None
    holder = None
    with contextlib.suppress(ValueError, TypeError):
        holder = Holder(**json.loads(line))
    return Seen(holder, modified, (file_system_time(clock or path.parent) - modified) / 1e9)


class Claim:
    """One process's hold on ``path``; its thread touches the file until :meth:`release`.

    ``on_lost`` is called, from that thread, when another process has taken the claim over: this one was
    stopped, or cut off from the file system, for longer than ``STILL_SECONDS``. With ``on_remade`` a removed
    folder is made anew with the file in it, then ``on_remade`` is called, from that thread.
    """

    def __init__(
        self,
        path: Path,
        on_lost: Callable[[Seen], None] | None = None,
        on_remade: Callable[[], None] | None = None,
    ):
        self.path = path
        self._on_lost, self._on_remade = on_lost, on_remade
        self._holder: Holder | None = None
        self._watched: tuple[str, int, float] | None = None  # token, time of change, since when by our clock
        self._stopping = threading.Event()
        self._using = threading.Lock()  # of the file, by the thread or by release()
        self._warned = False

    def try_take(self) -> Seen | None:
        """Take the claim and return None, or return the holder that is not proven dead.

        Waits for nobody. Raises OSError where the file cannot be written.
        """
        if self._holder is not None:
            return None
        holder = Holder.here()
        for _ in range(TAKE_OVER_TRIES):
            if _create(self.path, holder):
                self._hold(holder)
                return None
            seen = look(self.path)
            if seen is None:
                continue
            if not self._dead(seen):
                return seen
            if _take_over(self.path, seen, holder):
                _log.warning("%s: its holder is dead and is replaced: %s", self.path, seen.describe())
                self._hold(holder)
                return None
        return look(self.path) or self.try_take()

    def has_beaten(self, seen: Seen) -> bool:
        """Whether the holder touched the file since :meth:`try_take` first saw it."""
        return bool(self._watched and self._watched[0] == seen.token and self._watched[1] != seen.modified)

    def release(self) -> None:
        """Let go; nothing happens if the claim is not held by this process."""
        holder, self._holder = self._holder, None
        if holder is None or holder.pid != os.getpid():  # a forked child holds nothing
            return
        self._stopping.set()
        with self._using, contextlib.suppress(OSError):
            seen = look(self.path)
            if seen and seen.token == holder.token:
                self.path.unlink()

    def _dead(self, seen: Seen) -> bool:
        """Dead, also where the file system's clock is no clock: still for as long as this process looks."""
        now = time.monotonic()
        if self._watched is None or self._watched[0] != seen.token:
            self._watched = (seen.token, seen.modified, now)
        still = self._watched[1] == seen.modified and now - self._watched[2] > STILL_SECONDS
        return seen.is_dead() or (still and not seen.is_here())

    def _hold(self, holder: Holder) -> None:
        self._holder = holder
        self._stopping = threading.Event()
        arguments = (holder, self._stopping)
        threading.Thread(target=self._beat_until, args=arguments, name="claim", daemon=True).start()

    def _beat_until(self, holder: Holder, stopping: threading.Event) -> None:
        while not stopping.wait(BEAT_SECONDS):
            try:
                with self._using:
                    if stopping.is_set():
                        return
                    self.beat(holder)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    _log.warning(
                        "%s cannot be touched (%s): after %g s another machine may take its holder for dead",
                        self.path,
                        error.strerror or error,
                        STILL_SECONDS,
                    )

    def beat(self, holder: Holder) -> None:
        """Touch the file; make it anew where it was removed. Raises OSError."""
        try:
            token = Holder(**json.loads(self.path.read_bytes())).token
        except FileNotFoundError:
            if self._on_remade:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            if _create(self.path, holder) and self._on_remade:
                self._on_remade()
            return
        except (ValueError, TypeError):  # being written
            return
        if token == holder.token:
            os.utime(self.path)  # without times: the file server's own clock
            return
        seen = look(self.path)
        if seen and self._on_lost and self._holder is holder:
            self._on_lost(seen)


def _create(path: Path, holder: Holder) -> bool:
    """Make the claim's file if there is none; whether this process made it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(path)) from None
        return False
    try:
        os.write(descriptor, holder.line())
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _take_over(path: Path, seen: Seen, holder: Holder) -> bool:
    """Put ``holder`` in the place of the dead one that was seen; whether this process did.

    The right to replace one dead holder is a file that only one process can create. Who was late finds
    another holder than the one it saw, and leaves it.
    """
    right = path.with_name(f".{path.name}.{seen.token}.dead")
    if not _create(right, holder):
        other = look(right)
        if other and other.is_dead():
            right.unlink(missing_ok=True)
        return False
    part = path.with_name(f".{path.name}.{holder.token}.part")
    try:
        now = look(path)
        if now is None or now.token != seen.token or not _create(part, holder):
            return False
        part.replace(path)
        return True
    finally:
        part.unlink(missing_ok=True)
        right.unlink(missing_ok=True)


def _machine() -> str:
    """Equal for two processes if and only if they see each other's process ids."""
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)


def file_system_time(folder: Path) -> int:
    """Now, in nanoseconds, by the clock that stamps the files of ``folder``."""
    probe = folder / f".now.{os.getpid()}.{secrets.token_hex(4)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
