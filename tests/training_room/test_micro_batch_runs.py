"""train.micro_batch_size=auto in real runs: one number for all ranks, recorded, and taken by a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def outcome(nursery: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("micro"))
    return nursery(Path(__file__).with_name("micro_batch_cases.py"), "runs", folder=folder)


def test_the_least_of_the_ranks_devices_decides(outcome: dict[str, Any]) -> None:
    run = outcome["least"]
    assert run["codes"] == [0, 0], run["log"]
    assert "train.micro_batch_size = auto: 1, the largest divisor of the 2 sequences" in run["log"]
    assert run["record"]["config"]["train"]["micro_batch_size"] == 1


def test_a_restart_takes_the_recorded_number(outcome: dict[str, Any]) -> None:
    """On a CPU it would be 4 otherwise."""
    run = outcome["again"]
    assert run["codes"] == [0], run["log"]
    assert "train.micro_batch_size = auto: 1, recorded by run.json" in run["log"]
    assert "1 sequence: recorded by run.json" in run["log"], "the plan says so too"
    assert run["record"]["config"]["train"]["micro_batch_size"] == 1
    assert [row["step"] for row in run["rows"]] == [0, 1, 2, 3]
