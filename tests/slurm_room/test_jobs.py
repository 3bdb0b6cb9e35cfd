"""Runs as jobs of a real Slurm: its nodes, signals, requeues, arrays, a dead node. ``make test-slurm``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1", "--time", "20")


def same(curve: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    """Equal but for the order of sums over ranks."""
    return len(curve) == len(other) and all(
        row == pytest.approx(reference, rel=2e-4) for row, reference in zip(curve, other, strict=True)
    )


def test_two_nodes_train_what_one_process_does(cluster: Any, tiny: Path, alone: Any, curve: Any) -> None:
    run = tiny / "two_nodes"
    began = time.monotonic()
    (number,) = cluster.submit("--config", f"{tiny}/tiny.json", *TWO_NODES, f"run.dir={run}")
    assert cluster.end(number) == ("COMPLETED", "0"), cluster.log(cluster.job(number))
    assert same(curve(run), alone)
    logs = run / "logs" / number / "start_0"
    print(time.monotonic() - began, sorted(path.name for path in logs.iterdir()))
    print(cluster.log(cluster.job(number)))
    print((logs / "launcher.n1.log").read_text())
    print((logs / "rank_1.n2.log").read_text())
    print((logs / "environment.n2.txt").read_text())
