"""Signals: all ranks save and end with the signal's code, whichever got it; what goes on is what was never
stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("cycle_cases.py")


def test_stopped_four_times(nursery: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    """By each signal, at one rank or the other; once with all signals again, at all ranks, while the state
    is saved.
    """
    more = ["train.steps=24", "checkpoint.interval=0", "evaluation.interval=1", "logging.progress=false"]
    ends = {}
    for name in ("never", "often"):
        run = str(tmp_path / name)
        argv = ["--config", str(config), f"run.dir={run}", *more]
        if name == "often":
            for number, rank in ((signal.SIGUSR1, 1), (signal.SIGTERM, 0), (signal.SIGINT, 1)):
                codes = nursery(
                    CASES, "signalled", argv=argv, run=run, world=2, number=int(number), rank=rank
                )
                assert codes == [128 + number] * 2, (tmp_path / "often.log").read_text()[-3000:]
            codes = nursery(
                CASES,
                "signalled",
                argv=argv,
                run=run,
                world=2,
                number=int(signal.SIGUSR1),
                rank=0,
                again=True,
            )
            assert codes == [138, 138]
            (tmp_path / name / "report").touch()  # somebody asks how fast the ranks are
        cycles = nursery(CASES, "cycles", argv=argv, run=run, kills=0, seed=0, world=2)
        assert cycles[-1]["codes"] == [0, 0]
        ends[name] = nursery(CASES, "outcome", run=run)
    assert ends["often"] == ends["never"]
    (report,) = [json.loads(line) for line in (tmp_path / "often" / "ranks.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in report["ranks"]] == [0, 1]
    assert not (tmp_path / "often" / "report").exists()
    events = [json.loads(line) for line in (tmp_path / "often" / "events.jsonl").read_text().splitlines()]
    evaluations = [(tmp_path / name / "evaluations.jsonl").read_text() for name in ("never", "often")]
    assert evaluations[0] == evaluations[1], "what a stop did not wait for is made up for"
    stops = [event["signal"] for event in events if event["event"] == "stopped"]
    assert stops == ["SIGUSR1", "SIGTERM", "SIGINT", "SIGUSR1"]


@pytest.mark.parametrize(
    ("launcher", "number", "times"),
    [
        ("none", "SIGINT", 3),
        pytest.param("deepspeed", "SIGINT", 1, marks=pytest.mark.faults),
        pytest.param("torchrun", "SIGINT", 2, marks=pytest.mark.faults),
        ("deepspeed", "SIGTERM", 1),
    ],
)
def test_a_terminal_stops_a_long_step(
    launches: Any, config: Path, tmp_path: Path, launcher: str, number: str, times: int
) -> None:
    """Ctrl-C reaches launcher and ranks at once, and the deepspeed command dies of it; SIGTERM to that
    command reaches nobody else. The step would last two minutes: it is given up, its start is saved.
    """
    code, run, world = 128 + signal.Signals[number], tmp_path / "run", 1 if launcher == "none" else 2
    stop = {"launcher": launcher, "world": world, "fault": {"kind": "slow", "step": 3}}
    settings = ["train.steps=6", "guards.stop_seconds=12", "checkpoint.interval=0", "logging.progress=false"]
    started = launches.launch(config, run, *settings, **stop)
    started.until_step(3)
    # 12 and what a busy machine adds, long before the step would end
    assert started.stop(number, times) < 60.0, started.log.read_text()
    end = json.loads((tmp_path / "run.end.json").read_text())
    assert (end["code"], end["restart"]) == (code, False), started.log.read_text()
    assert "after step 3 of 6, within training, which was given up; saved in" in end["reason"]
    assert launches.saved(run) == [3]
    assert end["reason"].startswith(
        "stopped by SIGINT" if number == "SIGINT" else "stopped by the end of its"
    )
    (event,) = [row for row in launches.rows(run / "events.jsonl") if row["event"] == "stopped"]
    assert event["message"] == end["reason"]


@pytest.mark.parametrize(
    ("launcher", "number", "times", "fault"),
    [
        ("none", "SIGINT", 3, "encoding"),
        pytest.param("torchrun", "SIGINT", 1, "encoding", marks=pytest.mark.faults),
        ("deepspeed", "SIGINT", 1, "tokenizer training"),
        pytest.param("deepspeed", "SIGTERM", 1, "encoding", marks=pytest.mark.faults),
    ],
)
def test_a_stop_while_data_is_prepared(
    launches: Any, config: Path, tmp_path: Path, launcher: str, number: str, times: int, fault: str
) -> None:
    """All ranks end with the signal's code, those that wait for the data too. What was half done is removed,
    at the latest by the next start.
    """
    run, data, world = tmp_path / "run", tmp_path / "data", 1 if launcher == "none" else 2
    settings = [f"data.dir={data}", "train.steps=1", "logging.progress=false"]
    stop = {"launcher": launcher, "world": world, "fault": {"kind": fault}}
    started = launches.launch(config, run, *settings, **stop)
    deadline = time.monotonic() + 120.0
    while not started.mark.exists():
        assert started.process.poll() is None, started.log.read_text()
        assert time.monotonic() < deadline, started.log.read_text()
        time.sleep(0.05)
    assert started.stop(number, times) < 60.0, started.log.read_text()
    output, end = started.log.read_text(), json.loads((tmp_path / "run.end.json").read_text())
    assert end["code"] == 128 + signal.Signals[number], output
    cause = "SIGINT" if number == "SIGINT" else "the end of its launcher, pid "
    assert f": stopped by {cause}" in end["reason"]
    assert end["reason"].endswith(" before the first step of this start")
    left = list(data.glob(".*.tmp"))
    assert len(left) == (fault == "tokenizer training")
    if left:
        again = launches.launch(config, run, *settings, launcher="none").wait()
        assert again.code == 0, again.output
        assert f"removing {left[0]}, left by a preparation that did not end" in again.output
        assert not list(data.glob(".*.tmp"))


@pytest.mark.parametrize("doing", ["evaluation", "sample", "collective", "update"])
def test_a_stop_elsewhere(nursery: Callable[..., Any], config: Path, tmp_path: Path, doing: str) -> None:
    """An evaluation and a sample are given up at once; so is, near the deadline, a step whose collective
    waits for a rank. Where a rank is lost between an update and the next step nothing can be saved: the
    deadline ends the run.
    """
    run, record = tmp_path / "run", tmp_path / "end.json"
    more = ["train.steps=4", "evaluation.interval=2", "logging.progress=false", "checkpoint.interval=1"]
    argv = ["--config", str(config), f"run.dir={run}", "guards.stop_seconds=7", *more]
    codes, seconds = nursery(CASES, "stuck", argv=argv, run=str(run), doing=doing, record=str(record))
    assert codes == [143, 143], (tmp_path / "run.log").read_text()
    reason = json.loads(record.read_text())["reason"]
    if doing == "update":
        assert 7.0 <= seconds < 12.0
        assert "its state could not be saved in 7 s (guards.stop_seconds = 7)" in reason
    else:
        assert seconds < 7.5, "before the deadline that would end it"
        step = {"evaluation": 2, "collective": 2, "sample": 4}[doing]
        assert f"after step {step} of 4, within " in reason
        assert reason.endswith(f"which was given up; saved in {run}/checkpoints/step_{step:08d}")
        cycles = nursery(CASES, "cycles", argv=argv, run=str(run), kills=0, seed=0, world=2)
        assert cycles[-1]["codes"] == [0, 0]
        assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").open()] == [2, 4]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_under_torchrun(
    launches: Any, config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """It passes on the signals that it is told to handle, and ends with 1 itself; the record has the
    ranks' code.
    """
    run, record = tmp_path / "run", tmp_path / "end.json"
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command += [
        "--signals-to-handle",
        "SIGTERM,SIGINT,SIGUSR1",
        str(launches.ROOT / "sffn_dist" / "pretrain.py"),
    ]
    command += ["--config", str(config), f"run.dir={run}", "train.steps=3000", "logging.progress=false"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "SFFN_EXIT_FILE": str(record)}
    process = subprocess.Popen(command, cwd=launches.ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while len(launches.rows(run / "metrics.jsonl")) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    told = json.loads(record.read_text())
    assert (told["code"], told["restart"]) == (code, False), error
    assert f"stopped by {number.name} after step {max(launches.saved(run))}" in told["reason"]
