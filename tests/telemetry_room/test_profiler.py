"""What is asked of torch on CUDA, of which a profile on a CPU shows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from sffn_dist.telemetry import profiler
from sffn_dist.telemetry.time_by_cause import Cause, Event, Kind


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch's calls in order, none of which reaches a driver."""
    calls: list[Any] = []

    class Profile:
        profiler: Any = None

        def __init__(self, activities: list[ProfilerActivity]):
            calls.append([activity.name for activity in activities])
            self.profiler = self
            self.kineto_results = self

        def events(self) -> list[Any]:
            return []

        def start(self) -> None:
            calls.append("start")

        def stop(self) -> None:
            calls.append("stop")

    def dump(file: str) -> None:
        calls.append("dump")
        Path(file).write_bytes(b"snapshot")

    monkeypatch.setattr(profiler, "profile", Profile)
    step = Event("ProfilerStep#7", Kind.RANGE, 0, 10, 1)
    monkeypatch.setattr(profiler, "read_events", lambda *_: [step, Event("gemm", Kind.KERNEL, 2, 8, 7)])
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("synchronize"))
    return calls


def test_on_cuda_the_history_of_memory_is_recorded_dumped_and_stopped(
    asked: list[Any], tmp_path: Path
) -> None:
    recording = profiler.Profiler(torch.device("cuda", 0))
    recording.start()
    recording.collect()
    text = recording.write(tmp_path / "profile", 3, {"layers": Cause.ATTENTION})
    assert asked == [
        {"max_entries": 100_000},
        *("synchronize", ["CPU", "CUDA"], "start", "stop"),
        *("dump", {"enabled": None}),
    ]
    names = ["rank_00003.json", "rank_00003.memory.pickle", "rank_00003.trace.json.gz", "rank_00003.txt"]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    assert (tmp_path / "profile" / names[1]).read_bytes() == b"snapshot"
    assert text.startswith("time by cause, rank 3 on a GPU, step 7, ms a step\n")


def test_recording_ends_whatever_fails(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: str) -> None:
        Path(file).write_bytes(b"snap")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    recording = profiler.Profiler(torch.device("cuda", 0))
    recording.start()
    with pytest.raises(OSError, match="No space left"):
        recording.write(tmp_path / "profile", 0, {})
    assert asked[-2:] == [{"enabled": None}, "stop"]
    assert not list((tmp_path / "profile").iterdir()), "no half of it is left"


def test_on_a_cpu_no_memory_is_recorded(asked: list[Any], tmp_path: Path) -> None:
    recording = profiler.Profiler(torch.device("cpu"))
    recording.start()
    recording.collect()
    recording.write(tmp_path, 0, {})
    assert asked == [["CPU"], "start", "stop"]
