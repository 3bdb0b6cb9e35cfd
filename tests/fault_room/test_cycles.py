"""Killed and started again, many times: the same weights in the end, to the last bit, as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("cycle_cases.py")
Nursery = Callable[..., Any]


def check(
    nursery: Nursery, config: Path, folder: Path, *, kills: int, steps: int, world: int, seed: int
) -> list[dict[str, Any]]:
    more = [
        f"train.steps={steps}",
        "checkpoint.interval=3",
        "logging.progress=false",
        "parallel.tensor=1",
        "guards.lost_seconds=10",
    ]
    ends = {}
    for name, number in (("never", 0), ("often", kills)):
        argv = ["--config", str(config), f"run.dir={folder / name}", *more]
        cycles = nursery(
            CASES, "cycles", argv=argv, run=str(folder / name), kills=number, seed=seed, world=world
        )
        assert cycles[-1]["codes"] == [0] * world, (folder / f"{name}.log").read_text()[-4000:]
        ends[name] = nursery(CASES, "outcome", run=str(folder / name))
    assert ends["never"]["step"] == steps
    assert ends["often"] == ends["never"]
    killed = [row for row in cycles if row["killed"] is not None]
    assert len(killed) == kills, "the run was long enough"
    for row in killed:
        assert row["codes"][row["killed"]] == -9
        assert all(code != 0 for code in row["codes"]), (
            "nobody takes a run for finished whose rank was killed"
        )
    assert sum(row["to"] > row["from"] for row in killed) > kills / 3, "some got on before"
    return cycles


def test_five_kills(nursery: Nursery, config: Path, tmp_path: Path) -> None:
    """Two ranks, data parallel: any of them is killed, the other one notices."""
    check(nursery, config, tmp_path, kills=5, steps=60, world=2, seed=3)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [1, 2])
def test_fifty_kills(nursery: Nursery, config: Path, tmp_path: Path, world: int) -> None:
    cycles = check(nursery, config, tmp_path, kills=50, steps=500, world=world, seed=world)
    print(f"{world} ranks: 50 kills, weights as without")
    assert len(cycles) == 51
