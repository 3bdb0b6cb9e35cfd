"""The record of a run: one JSON line a step, each step once, also after kills, resumes and full disks.

``metrics.jsonl`` (training) and ``evaluations.jsonl`` are written by the same class. The lines are strict
JSON; JSON has no NaN or infinities, so those stand as the strings "nan", "inf" and "-inf", and :func:`read`
turns them back into floats. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.atomic_io import sync

_log = getLogger(__name__)

PENDING_LINES = 10_000  # kept in memory while the disk is full: a few MB


class MetricsLog:
    """Append-only log of rows, each with an integer ``step``.

    Opening drops every line of ``resume_step`` or later and what a kill left torn; the other lines stay byte
    for byte. So ``step`` is the index of the optimiser's step a row belongs to, and ``resume_step`` the first
    index still to be done: with s steps done the last row has step s - 1 and the run resumes at s.

    A disk that cannot be written never raises from :meth:`write`: it warns once, keeps the newest
    ``PENDING_LINES`` lines in memory and tries again with every later row. Reading an existing file may raise
    OSError.

    A file that was removed or replaced is noticed at the next row: it warns, calls ``on_removed`` (which may
    make the folder anew) and goes on in a new file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resume_step: int,
        on_removed: Callable[[], None] = lambda: None,
    ):
        self.path = Path(path)
        self._on_removed = on_removed
        self._resume_step = resume_step
        self._pending: deque[bytes] = deque(maxlen=PENDING_LINES)
        self._fd: int | None = None
        self._size = 0  # bytes of whole lines in the file
        self._torn = False  # more than those may be in it
        self._warned = False
        self._closed = False
        self._last, self._clean = self._scan()
        self._flush()

    @property
    def last(self) -> int | None:
        """The step of the last row, None where there is none."""
        return self._last

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system.

        Raises:
            ValueError: ``step`` is missing, no integer, or not above the last one; the log is closed.
            TypeError: a value that JSON cannot hold.
        """
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"step = {step!r} in a row of {self.path}: must be an integer")
        if self._last is not None and step <= self._last:
            raise ValueError(
                f"step = {step} in a row of {self.path}: must be above the last one, {self._last}"
            )
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        self._pending.append((strict_json.dumps(row) + "\n").encode())
        self._last = step
        self._flush()

    def close(self) -> None:
        """Write what is left and bring it to the disk; warns if that fails."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        if self._pending:
            _log.warning("%s: %d lines could not be written and are lost", self.path, len(self._pending))
        if self._fd is not None:
            with suppress(OSError):  # pipes and some network file systems have none
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ opening

    def _scan(self) -> tuple[int | None, bool]:
        """Last step that stays, and whether the file is already as it should be."""
        last, clean = None, True
        for line in _lines(self.path):
            kept, step = self._kept(line)
            clean = clean and kept == line
            if kept and step is not None:
                last = step if last is None else max(last, step)
        return last, clean

    def _kept(self, line: bytes) -> tuple[bytes, int | None]:
        """What stays of a line (all of it, or nothing), and its step.

        A line whole but for its end of line gets that.
        """
        row = _parse(line)
        if row is None:
            return b"", None
        step = row.get("step")
        if isinstance(step, int) and step >= self._resume_step:
            return b"", step
        return (line if line.endswith(b"\n") else line + b"\n"), step if isinstance(step, int) else None

    def _open(self) -> int:
        if not self._clean:
            part = self.path.with_name(self.path.name + ".part")
            with open(part, "wb") as file:
                for line in _lines(self.path):
                    file.write(self._kept(line)[0])
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
            sync(self.path.parent)
            self._clean = True
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(fd).st_size
        return fd

    # ------------------------------------------------------------------------------------------------ writing

    def _flush(self) -> None:
        try:
            if self._fd is not None and self._is_removed(self._fd):
                descriptor, self._fd = self._fd, None
                os.close(descriptor)
                self._torn = False
                _log.warning(
                    "%s was removed while the run goes on: the rows that it held are lost, the next ones go "
                    "to a new file",
                    self.path,
                )
                self._on_removed()
            if self._fd is None:
                self._fd = self._open()
            if self._torn:
                os.ftruncate(self._fd, self._size)
                self._torn = False
            while self._pending:
                self._append(self._fd, self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "%s cannot be written (%s); training goes on; the newest %d lines are kept and written "
                    "once it can",
                    self.path,
                    error.strerror or error,
                    PENDING_LINES,
                )

    def _is_removed(self, fd: int) -> bool:
        """Whether the open file is not the one at ``path`` any more."""
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return not os.path.samestat(there, os.fstat(fd))

    def _append(self, fd: int, line: bytes) -> None:
        """Write one line; on failure the file ends with a torn one, cut off again before the next attempt."""
        written = 0
        while written < len(line):
            try:
                written += os.write(fd, line[written:])
            except OSError:
                self._torn = written > 0
                raise
        self._size += len(line)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a log, "nan", "inf" and "-inf" as floats.

    A torn last line (a run writing, or killed) is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: another line is no JSON object.
    """
    rows: list[dict[str, Any]] = []
    torn: int | None = None
    for number, line in enumerate(_lines(Path(path), missing_ok=False), 1):
        if torn is not None:
            raise ValueError(f"{os.fspath(path)}, line {torn}: not a JSON object")
        row = _parse(line)
        if row is None:
            torn = number
        else:
            rows.append(strict_json.floats(row))
    if torn is not None and line.endswith(b"\n"):
        raise ValueError(f"{os.fspath(path)}, line {torn}: not a JSON object")
    return rows


def _lines(path: Path, missing_ok: bool = True) -> Iterator[bytes]:
    if missing_ok and not path.exists():
        return
    with open(path, "rb") as file:
        yield from file


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
