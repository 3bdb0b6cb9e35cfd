"""The table of faults: each in a real run of two to four ranks by the launcher; how soon it shows, what is
told, what is lost.

With FAULT_TABLE=FILE.csv the rows are written there: `make test-faults` does.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
INTERVAL = 10  # steps between saves


@dataclass
class Row:
    """One fault's line in the table."""

    fault: str
    ranks: int
    detected_s: float | None
    ended_s: float | None
    exit_code: int
    steps_lost: int
    message: str


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """The rows so far; written at the end."""
    rows: list[Row] = []
    yield rows
    print()
    for row in rows:
        print(" | ".join("" if value is None else str(value) for value in asdict(row).values()))
    if path := os.environ.get("FAULT_TABLE"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


@pytest.fixture
def trial(launches: Any, config: Path, tmp_path: Path, table: list[Row]) -> Callable[..., tuple[Any, Row]]:
    """``trial(name, fault, act=...)`` runs one, and notes its row; ``act`` is what somebody does to the
    run from outside.
    """

    def run(
        name: str,
        fault: dict[str, Any] | None = None,
        *over: str,
        world: int = 2,
        at: int = 23,
        act: Callable[[Any], None] | None = None,
        folder: Path | None = None,
        **more: Any,
    ) -> tuple[Any, Row]:
        launch = launches.launch(config, folder or tmp_path / "run", *over, world=world, fault=fault, **more)
        when = time.time()
        if act:
            launch.until_step(at)
            when = time.time()
            act(launch)
        launch.wait()
        if launch.mark.exists():
            when = float(launch.mark.read_text())
        told = [
            event
            for event in launches.rows(launch.run / "events.jsonl")
            if event["event"] not in ("pre-flight", "continued")
        ]
        reached = max([row["step"] + 1 for row in launches.rows(launch.run / "metrics.jsonl")], default=0)
        kept = max(launches.saved(launch.run), default=0)
        errors = launch.messages()
        row = Row(
            fault=name,
            ranks=world,
            detected_s=round(told[0]["time"] - when, 1) if told else None,
            ended_s=round(launch.ended - when, 1) if launch.code else None,
            exit_code=launch.code,
            steps_lost=reached - kept,
            message=(errors[0] if errors else told[0]["message"] if told else "")
            .removeprefix("warning: ")
            .replace(str(tmp_path), "..."),
        )
        table.append(row)
        return launch, row

    return run


def one_reason(launch: Any, *words: str) -> None:
    """One error, the first, and no other rank's story."""
    errors = launch.messages()
    assert len(errors) == 1, launch.output
    for word in words:
        assert word in errors[0], errors
    assert launch.output.count("Traceback") <= 1


def test_rank_killed(trial: Any, launches: Any) -> None:
    launch, row = trial(
        "rank 1 SIGKILLed", world=2, act=lambda it: os.kill(launches.ranks(it.run)[1], signal.SIGKILL)
    )
    one_reason(launch, "rank 1", "exited without an error message")
    assert row.detected_s < 10
    assert row.ended_s < 60
    assert row.steps_lost < INTERVAL + 2


def test_rank_0_killed_of_four(trial: Any, launches: Any) -> None:
    """Rank 0 serves the store that the others meet in."""
    act = lambda it: os.kill(launches.ranks(it.run)[0], signal.SIGKILL)  # noqa: E731
    launch, row = trial("rank 0 of 4 SIGKILLed", None, "parallel.tensor=2", world=4, act=act)
    one_reason(launch, "rank 0", "exited without an error message")
    assert row.ended_s < 60


def test_rank_stopped(trial: Any, launches: Any) -> None:
    """It hangs, and cannot say so: the others do."""
    launch, row = trial(
        "rank 1 SIGSTOPped", act=lambda it: os.kill(launches.ranks(it.run)[1], signal.SIGSTOP)
    )
    one_reason(launch, "rank 1", "no heartbeat", "its process is stopped")
    assert row.ended_s < 60
    assert "Thread" in next(launch.run.glob("stacks/*/rank_00000.txt")).read_text()


def test_rank_waits_for_ever(trial: Any) -> None:
    """It lives but gets nowhere: stacks of every rank, and the one furthest behind is named."""
    launch, row = trial(
        "rank 1 hangs in Python", {"kind": "hang", "rank": 1, "step": 23}, "guards.hang_seconds=10"
    )
    one_reason(launch, "no progress for", "rank 1 on")
    assert row.ended_s < 60
    stacks = {path.name: path.read_text() for path in launch.run.glob("stacks/*/rank_*.txt")}
    assert "faulty.py" in stacks["rank_00001.txt"], "where it hangs"
    assert "backward" in stacks["rank_00000.txt"] or "step" in stacks["rank_00000.txt"]


def test_exception(trial: Any) -> None:
    launch, row = trial("exception on rank 1", {"kind": "exception", "rank": 1, "step": 23})
    one_reason(launch, "rank 1", "ValueError: an injected fault")
    assert (row.exit_code, row.steps_lost) == (1, 3)
    assert row.ended_s < 30


def test_nan_gradient(trial: Any, launches: Any) -> None:
    """Four steps in a row on one rank: three are skipped, the run goes back and passes them over, then
    skips the fourth.
    """
    launch, row = trial(
        "NaN in a gradient of rank 1, 4 steps", {"kind": "nan", "rank": 1, "step": 23, "steps": 4}
    )
    assert row.exit_code == 0, launch.output
    events = [event["event"] for event in launches.rows(launch.run / "events.jsonl")]
    assert events == ["pre-flight", *["skipped"] * 3, "rolled back", *["batch skipped"] * 3, "skipped"]


def test_loss_spike(trial: Any, launches: Any) -> None:
    over = ("guards.spike_deviations=4", "guards.spike_margin=0.2")
    launch, row = trial("loss spike, a batch of noise", {"kind": "spike", "step": 53, "steps": 1}, *over)
    assert row.exit_code == 0, launch.output
    skipped = [event for event in launches.rows(launch.run / "events.jsonl") if event["event"] == "skipped"]
    assert [event["skipped"] for event in skipped] == [53]
    assert "median" in skipped[0]["message"]


def test_newest_checkpoint_corrupted(trial: Any, launches: Any, config: Path, tmp_path: Path) -> None:
    launches.launch(
        config, tmp_path / "run", "train.steps=60", fault={"kind": "exception", "rank": 0, "step": 33}
    ).wait()
    file = next(tmp_path.glob("run/checkpoints/step_00000030/rank_00000.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    launch, row = trial("newest checkpoint corrupted, a bit flipped", folder=tmp_path / "run")
    assert row.exit_code == 0
    assert any("checkpoint skipped" in line for line in launch.output.splitlines())
    assert any("continuing at step 20" in line for line in launch.output.splitlines())
    row.steps_lost = 13  # 33 reached, the checkpoint of 20 is the newest whole one
    row.detected_s, row.message = (
        0.0,
        next(line for line in launch.output.splitlines() if "checkpoint skipped" in line)[:160],
    )
    row.message = row.message.replace(str(tmp_path), "...")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(path)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False)


def test_disk_full(trial: Any, disk: Path, tmp_path: Path) -> None:
    """It fills before a save and is freed later: training goes on, the later saves succeed."""

    def fill(launch: Any) -> None:
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 12))
        time.sleep(2.5)  # some saves fall into it
        (disk / "filler").unlink()

    launch, row = trial(
        "disk full during a save", None, "train.steps=400", folder=disk / "run", at=4, act=fill
    )
    assert row.exit_code == 0, launch.output
    assert row.steps_lost == 0
    assert "not written" in launch.output
    assert "training goes on" in launch.output
    told = next(line for line in launch.output.splitlines() if "not written" in line)
    row.message = told.removeprefix("warning: ").replace(str(tmp_path), "...")


def test_read_only_folder(trial: Any, tmp_path: Path) -> None:
    """Mid-run its checkpoints can no longer be written, until they can again."""
    folder = tmp_path / "run" / "checkpoints"

    def turn(launch: Any) -> None:
        made = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, text=True)
        if made.returncode:
            launch.wait()
            pytest.skip(f"nothing can be mounted: {made.stderr.strip()}")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        time.sleep(2.0)
        subprocess.run(["umount", "-l", str(folder)], check=True)

    launch, row = trial("checkpoints read-only for a while", None, "train.steps=400", at=12, act=turn)
    assert row.exit_code == 0, launch.output
    assert row.steps_lost == 0
    told = next(line for line in launch.output.splitlines() if "Read-only" in line)
    row.message = told.removeprefix("warning: ").replace(str(tmp_path), "...")


def test_replica_tampered(trial: Any) -> None:
    over = ("zero.stage=0", "guards.replicas_interval=5")
    launch, row = trial(
        "a weight of rank 1 changed by 1e-3", {"kind": "tamper", "rank": 1, "step": 23}, *over
    )
    one_reason(launch, "replicas", "decoder.layers.0.mlp.linear_fc1.bias")
    assert (row.exit_code, row.steps_lost) == (4, 5)


def test_wrong_config_on_one_node(trial: Any) -> None:
    launch, row = trial("another config on rank 1", {"kind": "config", "rank": 1})
    one_reason(launch, "train.learning_rate", "0.123")
    assert row.exit_code == 2
    assert not list(launch.run.glob("checkpoints/*"))


def test_port_in_use(trial: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        launch, row = trial("MASTER_PORT in use", port=taken.getsockname()[1])
    one_reason(launch, "MASTER_PORT", "in use")
    assert row.exit_code == 6
    row.detected_s = None
