"""What happened to a run besides its steps: ``run_dir/events.jsonl``, one JSON line an event, for good.

Unlike the metrics it is never cut: a step that was skipped, undone and taken again has three rows.
Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from sffn_dist import strict_json

_log = getLogger(__name__)
KEPT = 1000  # lines kept in memory while the disk is full


class EventLog:
    """Append-only; a line is ``{"time": seconds since 1970, "step": ..., "event": kind, ...}``.

    Never raises for a disk's sake. ``on_removed`` is called where the file was removed since the last row; it
    may make the folder anew.
    """

    def __init__(self, path: Path, *, warns: bool = True, on_removed: Callable[[], None] = lambda: None):
        self.path = path
        self._on_removed, self._written = on_removed, False
        self._pending: deque[bytes] = deque(maxlen=KEPT)
        self._warned = not warns

    def write(self, event: str, step: int, **facts: Any) -> dict[str, Any]:
        """Append one event, and what could not be written before it; returns the row."""
        row = {"time": round(time.time(), 3), "step": step, "event": event, **facts}
        self._pending.append((strict_json.dumps(row) + "\n").encode())
        try:
            if self._written and not self.path.exists():
                _log.warning("%s was removed while the run goes on: its events are lost", self.path)
                self._on_removed()
            self._flush()
            self._written = True
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "%s cannot be written (%s); training goes on", self.path, error.strerror or error
                )
        return row

    def _flush(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")  # a killed process's torn line ends here
            while self._pending:
                _whole(descriptor, self._pending[0])
                self._pending.popleft()
        finally:
            os.close(descriptor)


def _whole(descriptor: int, line: bytes) -> None:
    """Write all of a line or, on a full disk, nothing of it."""
    start = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def read(path: Path) -> list[Mapping[str, Any]]:
    """The events of a run; torn lines are left out. Raises OSError where there is none."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
