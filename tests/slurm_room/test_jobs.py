"""Runs as jobs of a real Slurm: its nodes, signals, requeues, arrays, a node that dies.

``make test-slurm``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
ONE_NODE = ("--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1", "--time", "20")
TWO_NODES = ("--nodes", "2", *ONE_NODE[2:])
LAUNCHERS = {  # with GPUs that only Slurm takes for such
    "srun": ("--launcher", "srun"),
    "torchrun": ("--launcher", "torchrun", "--gpus-per-node", "1", "--cpus-per-rank", "2"),
    "deepspeed": ("--launcher", "deepspeed", "--gpus-per-node", "1", "--cpus-per-rank", "2"),
}


def saved(run: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    found = [
        int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json")
    ]
    return max(found, default=0)


def started(cluster: Any, number: str, run: Path, curve: Any, steps: int) -> None:
    """Wait until the run has done ``steps``."""
    cluster.wait(number, lambda job: len(curve(run)) >= steps, pause=0.05)


@contextmanager
def held(cluster: Any, number: str, run: Path, curve: Any, steps: int) -> Iterator[list[int]]:
    """Once the run has done ``steps``, its ranks stand still, so that what happens to it happens before
    its end.
    """
    started(cluster, number, run, curve, steps)
    ranks = ranks_of(run)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def ends(run: Path, number: str) -> list[dict[str, Any]]:
    """What followed each start of a job."""
    return [json.loads(line) for line in (run / "logs" / number / "starts.jsonl").read_text().splitlines()]


def warn(cluster: Any, number: str, run: Path, curve: Any) -> None:
    """Slurm's warning, on the run's way."""
    with held(cluster, number, run, curve, 3):
        cluster.command("scancel", "--batch", "--signal=USR1", number)
        cluster.wait(number, lambda job: "SIGUSR1: the ranks save" in cluster.log(job), pause=0.05)
        time.sleep(1.0)  # from the batch script to the ranks


def restarted(number: str, cluster: Any, times: int = 1) -> None:
    cluster.wait(number, lambda job: job["JobState"] == "RUNNING" and job["Restarts"] == str(times))


def ranks_of(run: Path) -> list[int]:
    """Process ids of a run's ranks, on all nodes: they share the machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:2] and words[1].endswith(b"sffn_dist/pretrain.py") and f"run.dir={run}".encode() in words:
            found.append(int(entry.parent.name))
    return sorted(found)


# -------------------------------------------------------------------------------------------------- two nodes


@pytest.fixture(scope="module")
def whole(cluster: Any, tiny: Path, alone: Any) -> tuple[str, Path]:
    """Id and run.dir of an uninterrupted run on two nodes."""
    run = tiny / "whole"
    (number,) = cluster.submit("--config", f"{tiny}/tiny.json", *TWO_NODES, f"run.dir={run}")
    assert cluster.end(number) == ("COMPLETED", "0"), cluster.log(cluster.job(number))
    return number, run


def test_two_nodes_train_what_one_process_does(cluster: Any, whole: Any, alone: Any, curve: Any) -> None:
    number, run = whole
    assert len(curve(run)) == len(alone) > 10
    for row, reference in zip(curve(run), alone, strict=True):
        assert row == pytest.approx(reference, rel=2e-4), "equal but for the order of sums over ranks"
    logs = run / "logs" / number / "start_0"
    assert {path.name for path in logs.iterdir()} == {
        *(
            "rank_0.n1.log",
            "rank_1.n2.log",
            "environment.n1.txt",
            "environment.n2.txt",
            "launcher.n1.log",
            "launcher.n2.log",
        )
    }
    rank, log = (logs / "rank_0.n1.log").read_text(), cluster.log(cluster.job(number))
    assert "held-out loss" in rank
    assert rank in log, "the job's log has rank 0's lines"
    assert "n1 n2: 1 ranks a node by srun, rendezvous n1:" in log
    assert log.endswith("finished\n")
    report = (logs / "environment.n2.txt").read_text()
    assert "node         n2 (n2)" in report
    assert "MASTER_ADDR=n1" in report


def test_sbatchs_refusals_are_passed_on(cluster: Any, tiny: Path) -> None:
    config = ("--config", f"{tiny}/tiny.json", *TWO_NODES, f"run.dir={tiny}/refused")
    for words, says in (
        (("--nodes", "3", "train.global_batch_size=6"), "Node count specification invalid"),
        (("--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("--constraint", "h100"), "Invalid feature specification"),
    ):
        done = cluster.command(sys.executable, "tools/submit.py", "--submit", *config, *words)
        assert done.returncode == 1
        assert says in done.stderr
        assert not done.stdout


def test_the_script_by_itself_refuses_and_is_not_requeued(cluster: Any, tiny: Path, root: Path) -> None:
    """Handed to sbatch as it is, with a mistake that shows at once, and one that shows on the nodes."""
    words = (
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        f"--output={tiny}/%j.log",
    )
    words += ("slurm/pretrain.sbatch", "--config", f"{tiny}/tiny.json")
    for mistake in (f"train.stps={tiny}", "kernels=triton"):
        done = cluster.command(
            *words, f"run.dir={tiny}/mistake", mistake, VENV=sys.prefix, TRITON_INTERPRET="0"
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        assert cluster.end(number) == ("FAILED", "2"), cluster.log(cluster.job(number))
        assert cluster.job(number)["Restarts"] == "0"
        assert mistake.split("=")[0] in cluster.log(cluster.job(number))


# ---------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def warned(cluster: Any, tiny: Path, alone: Any, curve: Any) -> dict[str, tuple[str, Path]]:
    """A run by each launcher, side by side, that is given Slurm's warning in its first start."""
    found = {}
    for launcher in LAUNCHERS:
        run = tiny / f"warned_{launcher}"
        (number,) = cluster.submit(
            "--config", f"{tiny}/tiny.json", *TWO_NODES, *LAUNCHERS[launcher], f"run.dir={run}"
        )
        found[launcher] = (number, run)
    for number, run in found.values():
        warn(cluster, number, run, curve)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_warned_run_saves_requeues_itself_and_goes_on(
    launcher: str, cluster: Any, warned: Any, whole: Any, curve: Any
) -> None:
    number, run = warned[launcher]
    assert cluster.end(number) == ("COMPLETED", "0"), cluster.log(cluster.job(number))
    assert cluster.job(number)["Restarts"] == "1"
    log = cluster.log(cluster.job(number))
    assert "SIGUSR1: the ranks save and stop" in log
    assert "start 1 on n1 n2" in log
    first, second = ends(run, number)
    assert first["asked"] == "USR1"
    assert 3 <= int(first["newest"].removeprefix("step_")) < len(curve(run)), "it was stopped on its way"
    assert second["end"] == "finished"
    report = (run / "logs" / number / "start_1" / "environment.n2.txt").read_text()
    assert ("CUDA_VISIBLE_DEVICES=" in report) == ("--gpus-per-node" in LAUNCHERS[launcher])
    assert curve(run) == curve(whole[1]), "to the last digit"


def test_a_time_limit_requeues_and_scancel_ends_both_with_a_save(
    cluster: Any, tiny: Path, alone: Any, curve: Any, four: str
) -> None:
    """Slurm looks at the limits every half a minute: the array trains meanwhile."""
    run = tiny / "long"
    (number,) = cluster.submit(
        "--config", f"{tiny}/tiny.json", *TWO_NODES, f"run.dir={run}", "train.steps=100000"
    )
    started(cluster, number, run, curve, 3)
    minutes = 2 + int(cluster.job(number)["RunTime"].split(":")[-2])
    done = cluster.command(
        "scontrol", "update", f"jobid={number}", f"TimeLimit={minutes}"
    )  # nearer than the grace time
    assert done.returncode == 0, done.stderr
    restarted(number, cluster)
    first = saved(run)
    assert first >= 3
    started(cluster, number, run, curve, first + 3)
    cluster.command("scancel", number)
    state, _ = cluster.end(number)
    assert state == "CANCELLED"
    assert saved(run) >= first + 3
    assert [row[0] for row in curve(run)] == list(range(saved(run))), "each step once, and all of them saved"
    log = cluster.log(cluster.job(number))
    assert "SIGTERM: the ranks save and stop" in log
    assert "ended by Slurm; newest checkpoint: step_" in log
    assert not ranks_of(run)


def test_a_preempted_run_saves_and_goes_on(cluster: Any, tiny: Path, whole: Any, curve: Any) -> None:
    """Slurm signals the ranks alone, and would take the end of the batch script for a failure."""
    run = tiny / "preempted"
    (number,) = cluster.submit(
        "--config",
        f"{tiny}/tiny.json",
        *TWO_NODES,
        "--partition=low",
        "--sbatch=--exclusive",
        f"run.dir={run}",
    )
    with held(cluster, number, run, curve, 3):
        other = cluster.command(
            "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
        )
        assert other.returncode == 0, other.stderr
        cluster.wait(number, lambda job: job["PreemptTime"] != "None", pause=0.05)
        time.sleep(1.0)  # from Slurm to the ranks
    assert cluster.end(number) == ("COMPLETED", "0"), cluster.log(cluster.job(number))
    assert cluster.end(other.stdout.strip()) == ("COMPLETED", "0")
    assert cluster.job(number)["Restarts"] == "1"
    first, _ = ends(run, number)
    assert first["asked"] == "PREEMPTED"
    assert 3 <= int(first["newest"].removeprefix("step_")) < len(curve(run))
    assert curve(run) == curve(whole[1])


# ----------------------------------------------------------------------------------------------------- deaths


@pytest.fixture
def mended(cluster: Any) -> Iterator[Callable[[], None]]:
    """Call it to start node n2's daemon again; whatever happens, it runs afterwards."""
    done: list[bool] = []

    def mend() -> None:
        if not done:
            cluster.administer("start", "n2")
            done.append(True)

    yield mend
    mend()


def test_a_killed_rank_and_a_dead_node(
    cluster: Any, tiny: Path, whole: Any, curve: Any, mended: Callable[[], None]
) -> None:
    run, words = tiny / "deaths", ("checkpoint.interval=2", "guards.lost_seconds=5")
    (number,) = cluster.submit("--config", f"{tiny}/tiny.json", *TWO_NODES, f"run.dir={run}", *words)
    with held(cluster, number, run, curve, 5) as ranks:
        os.kill(ranks[-1], signal.SIGKILL)
    restarted(number, cluster)
    assert "ended (rank lost): " in ends(run, number)[0]["end"], "the rank that is left says why"
    before = saved(run)
    assert before >= 2
    with held(cluster, number, run, curve, before + 5):
        cluster.administer("kill", "n2")
        cluster.wait(number, lambda job: job["JobState"] in ("PENDING", "REQUEUED") or job["Restarts"] == "2")
    mended()
    assert cluster.end(number, 240) == ("COMPLETED", "0"), cluster.log(cluster.job(number))
    assert cluster.job(number)["Restarts"] == "2"
    assert curve(run) == curve(whole[1])


# ------------------------------------------------------------------------------------------ chains and sweeps


def test_a_chain_goes_on_where_the_one_before_stopped(
    cluster: Any, tiny: Path, alone: Any, curve: Any
) -> None:
    run = tiny / "chain"
    numbers = cluster.submit("--config", f"{tiny}/tiny.json", *ONE_NODE, "--chain", "4", f"run.dir={run}")
    assert len(numbers) == 4
    assert cluster.job(numbers[1])["Dependency"].startswith(f"afternotok:{numbers[0]}")
    warn(cluster, numbers[0], run, curve)
    assert cluster.end(numbers[0])[0] == "FAILED"
    assert cluster.job(numbers[0])["Restarts"] == "0"
    assert cluster.end(numbers[1]) == ("COMPLETED", "0")
    for number in numbers[
        2:
    ]:  # there is nothing left to do, and the last would take the third's end for a failure
        assert cluster.end(number)[0] == "CANCELLED"
        assert cluster.job(number)["RunTime"] == "00:00:00"
    assert curve(run) == alone


@pytest.fixture(scope="module")
def four(cluster: Any, tiny: Path, root: Path, alone: Any) -> str:
    """Number of an array of four runs, two at a time."""
    tree = {
        "name": "four",
        "configs": ["tiny.json"],
        "overrides": {"train.steps": 4},
        "grid": {
            "structure": {"low": {"ffn.rank": 8}, "shuffle": {"ffn.kind": "block_shuffle", "ffn.blocks": 4}},
            "train.learning_rate": [1e-3, 1e-2],
        },
    }
    (tiny / "sweep.json").write_text(json.dumps(tree))
    words = ("--submit", "--sweep", "sweep.json", *ONE_NODE, "--max-parallel", "2")
    done = cluster.command(sys.executable, str(root / "tools/submit.py"), *words, cwd=tiny)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.strip())


def test_an_array_trains_a_sweep_of_four(cluster: Any, tiny: Path, four: str, curve: Any) -> None:
    times = []
    for index in range(4):
        assert cluster.end(f"{four}_{index}") == ("COMPLETED", "0"), cluster.log(
            cluster.job(f"{four}_{index}")
        )
        job = cluster.job(f"{four}_{index}")
        times.append((job["StartTime"], job["EndTime"]))
    # how many ran when each began
    assert max(sum(other[0] <= start < other[1] for other in times) for start, _ in times) == 2
    runs = sorted(path for path in (tiny / "runs/four").iterdir() if path.name != "logs")
    assert [run.name for run in runs] == [
        f"{kind}-learning_rate_{rate}" for kind in ("low", "shuffle") for rate in (0.001, 0.01)
    ]
    losses = {json.loads((run / "summary.json").read_text())["heldout_loss"] for run in runs}
    assert len(losses) == 4
    assert all(len(curve(run)) == 4 for run in runs)
    assert sorted(path.name for path in (tiny / "runs/four/logs").iterdir()) == [
        f"{four}_{index}.log" for index in range(4)
    ]
