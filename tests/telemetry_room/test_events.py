"""Events outlive full disks and torn lines, in order."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sffn_dist.telemetry.events import KEPT, EventLog, read


def steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in read(path)]


def test_events_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    row = EventLog(path).write("skipped", 3, message="é\n", loss=math.nan)
    EventLog(path).write("rolled back", 4)
    assert read(path)[0] == {**row, "loss": "nan"}, "strict JSON has no such number"
    assert [row["event"] for row in read(path)] == ["skipped", "rolled back"]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_torn_line_is_ended_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).write("a", 1)
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "st')
    EventLog(path).write("b", 2)
    EventLog(path).write("c", 3)
    assert steps(path) == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 4


def test_what_cannot_be_written_comes_later_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder is gone and comes back; one warning, and at most as many lines are kept as memory shall
    hold.
    """
    path = tmp_path / "run" / "events.jsonl"
    log, quiet = EventLog(path), EventLog(path, warns=False)
    with caplog.at_level(logging.WARNING):
        quiet.write("a", 0)
        assert not caplog.records
        for step in range(KEPT + 5):
            log.write("a", step)
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text
    path.parent.mkdir()
    log.write("b", KEPT + 5)
    assert steps(path) == list(range(6, KEPT + 6))
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "none")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from sffn_dist.telemetry.events import EventLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
path = Path(sys.argv[1])
log = EventLog(path)
log.write("a", 0)
whole = path.read_bytes()
limit(len(whole) + 20)  # the next line fits in part
log.write("a", 1)
log.write("a", 2)
assert path.read_bytes() == whole, path.read_bytes()
limit(resource.RLIM_INFINITY)
log.write("a", 3)
"""


def test_a_full_disk_tears_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
