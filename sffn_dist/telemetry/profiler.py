"""torch's profiler over some steps of one rank, and on CUDA the history of its memory.

Writes ``rank_00000.trace.json.gz``, ``rank_00000.txt`` and ``.json`` (time_by_cause.py), on CUDA
``rank_00000.memory.pickle`` (for pytorch.org/memory_viz).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sffn_dist import atomic_io, strict_json
from sffn_dist.telemetry import time_table
from sffn_dist.telemetry.chrome_trace import write_trace
from sffn_dist.telemetry.profiler_events import read_events
from sffn_dist.telemetry.time_by_cause import Cause, Event, attribute

MEMORY_EVENTS = 100_000  # allocations and frees that the history keeps, the newest


class Profiler:
    """Records the steps between :meth:`start` and :meth:`collect`, until :meth:`write` or :meth:`close`.

    Each step is a recording of its own: to end one takes 7 s for a million events with Python's lock held,
    and no heartbeat goes out meanwhile. What torch's profiler and the disk raise comes out.
    """

    def __init__(self, device: torch.device):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports each start and stop
        self.device = device
        self._cuda = device.type == "cuda"
        self._profile: Any = None  # while it records
        self._events: list[Event] = []
        self._recordings = 0
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def start(self) -> None:
        """A step begins, once the device has done what it was given before."""
        self._stop_recording()  # of a step that was not collected
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self.synchronize()
        recording = profile(activities=activities)
        recording.start()
        self._profile = recording

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def collect(self) -> None:
        """The step is over."""
        recording = self._stop_recording()
        self._recordings += 1
        self._events += read_events(recording.profiler.kineto_results.events(), self._recordings)

    def close(self, memory_file: Path | None = None) -> None:
        """Record no longer; the history of memory goes to ``memory_file``."""
        try:
            if self._cuda and memory_file:
                torch.cuda.memory._dump_snapshot(str(memory_file))
        finally:
            try:
                if self._cuda:
                    torch.cuda.memory._record_memory_history(enabled=None)
            finally:
                self._stop_recording()

    def _stop_recording(self) -> Any:
        recording, self._profile = self._profile, None
        if recording is not None:
            recording.stop()
        return recording

    def write(self, folder: Path, rank: int, regions: Mapping[str, Cause]) -> str:
        """Close, write all files into ``folder``, and return the table as text.

        ``regions``: names of ranges -> what runs inside.
        """
        names = {
            "memory": f"rank_{rank:05d}.memory.pickle",
            "trace": f"rank_{rank:05d}.trace.json.gz",
            "json": f"rank_{rank:05d}.json",
            "text": f"rank_{rank:05d}.txt",
        }
        parts = {key: folder / f".{name}.part" for key, name in names.items()}
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            finally:
                self.close(parts["memory"])
            table = time_table.as_json(attribute(self._events, regions), rank, self._device_name())
            text = time_table.render(table)
            write_trace(parts["trace"], self._events, rank)
            parts["json"].write_text(strict_json.dumps(table, indent=1) + "\n", encoding="utf-8")
            parts["text"].write_text(text, encoding="utf-8")
            for key, part in parts.items():
                if part.exists():
                    atomic_io.sync(part)
                    part.replace(folder / names[key])
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        return text

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self._cuda else "cpu"
