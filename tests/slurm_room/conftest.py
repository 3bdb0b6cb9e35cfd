"""A real Slurm of two nodes, and a tiny run to train on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "cluster.sh"
STEPS = 120
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GONE_ON = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


class Cluster:
    """The cluster, as a user and an administrator see it."""

    def __init__(self, folder: str, root: Path):
        self.folder, self.root = folder, root
        leave = ("SLURM_", "SBATCH_", "SFFN_", "GLOO_", "NCCL_")
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(leave) and key not in LAUNCHED
        }
        self.environment |= {"SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1"}

    def administer(self, verb: str, *words: str) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), verb, self.folder, *words], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def command(self, *words: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Any command with the cluster's configuration."""
        return subprocess.run(
            words,
            cwd=cwd or self.root,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def submit(self, *words: str, **more: str) -> list[str]:
        """tools/submit.py --submit; the jobs' ids."""
        done = self.command(sys.executable, "tools/submit.py", "--submit", *words, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job (of an array: of its first part)."""
        shown = self.command("scontrol", "show", "job", number).stdout.split("\n\n")[0]
        found = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        path = re.search(r"StdOut=(.*)", shown)  # it may hold spaces
        return found | ({"StdOut": path[1]} if path else {})

    def wait(
        self,
        number: str,
        until: Callable[[dict[str, str]], bool],
        seconds: float = 120.0,
        pause: float = 0.25,
    ) -> dict[str, str]:
        """What Slurm says of the job once ``until`` holds of it; the job's log if it never does."""
        deadline = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < deadline, f"job {number} is {job}\n{self.log(job)}"
            time.sleep(pause)
        return job

    def end(self, number: str, seconds: float = 180.0) -> tuple[str, str]:
        """(state, exit code) of a job that has ended."""
        job = self.wait(number, lambda job: bool(job) and job["JobState"] not in GONE_ON, seconds)
        return job["JobState"], job["ExitCode"].split(":")[0]

    def log(self, job: dict[str, str]) -> str:
        """All that a job printed."""
        path = Path(job.get("StdOut", "none"))
        return path.read_text(errors="replace") if path.is_file() else f"no log {path}"


@pytest.fixture(scope="session")
def cluster(root: Path, no_idle_ranks: None) -> Iterator[Cluster]:
    """The cluster; the test is skipped, with the reason, where it cannot be had."""
    reason = subprocess.run(["bash", str(SCRIPT), "lacks"], capture_output=True, text=True).stdout.strip()
    if reason:
        pytest.skip(reason)
    parent = tempfile.mkdtemp(prefix="slurm")  # not pytest's folder: sockets want a short path
    cluster = Cluster(f"{parent}/c", root)
    try:
        cluster.administer("up")
        yield cluster
    finally:
        cluster.administer("down")
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose training takes a second or two, on real text."""
    folder = tmp_path_factory.mktemp("some jobs")
    (folder / "text").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "datetime", "enum", "glob"):
        (folder / "text" / f"{name}.txt").write_text(
            (stdlib / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    settings: dict[str, Any] = {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512},
        "ffn": {"kind": "low_rank", "width": 128, "rank": 16, "dense_layers": []},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.2},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        "precision": "fp32",
        "checkpoint": {"interval": 0},
        "evaluation": {"sequences": 6},
        "sample": {"tokens": 0},
    }
    (folder / "tiny.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def curve() -> Callable[[Path], list[tuple[Any, ...]]]:
    return _curve


def _curve(run: Path) -> list[tuple[Any, ...]]:
    """(step, tokens, loss, learning rate, gradient norm) of every step of a run."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


@pytest.fixture(scope="session")
def alone(root: Path, tiny: Path, cluster: Cluster) -> list[tuple[Any, ...]]:
    """The curve of one process, without a cluster; the corpus is prepared on the way."""
    run = tiny / "alone"
    done = cluster.command(
        sys.executable, "sffn_dist/pretrain.py", "--config", f"{tiny}/tiny.json", f"run.dir={run}"
    )
    assert done.returncode == 0, done.stderr
    return _curve(run)
