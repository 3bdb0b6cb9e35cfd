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
