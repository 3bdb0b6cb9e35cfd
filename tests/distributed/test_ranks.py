"""The report of ranks: what a slowed rank's row says, who is named a straggler, how it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.health import stragglers as reports
from sffn_dist.health.stragglers import Row, StepTimers, requested, stragglers

CASES = Path(__file__).with_name("ranks_cases.py")
TREE: dict[str, Any] = {
    "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 64},
    "train": {"steps": 9, "global_batch_size": 8, "micro_batch_size": 2},
}


def row(rank: int, compute: float | None, flops: float = 1e12) -> Row:
    return Row(rank, "n", "cpu", 0.0, compute, 0.0, 1.0, 1.0, 1, flops)


def test_a_slow_rank_and_a_slow_reader(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Two micro-steps a step: rank 1's forward passes take 0.1 s longer each, then its batches do; rank 0
    waits, and is told apart.
    """
    slow = ranks(2, 1).run(CASES, "recorded", tree=TREE, steps=5, slow={1: (0.0, 0.1)}, run_dir=str(tmp_path))
    assert slow[0]["rows"] == slow[1]["rows"]
    fast, late = slow[0]["rows"]
    assert late["compute"] > fast["compute"] + 0.15
    assert late["data"] < 0.05
    assert fast["step"] > 0.2, "all steps are as slow as the slowest rank"
    assert abs(fast["tokens_per_s"] * fast["step"] - 64) < 1e-6
    assert late["peak_bytes"] > 1e8
    assert late["flops"] > 1e8
    (line,) = (tmp_path / "ranks.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["ranks"] == slow[0]["rows"]
    fast, late = ranks(2, 1).run(
        CASES, "recorded", tree=TREE, steps=5, slow={1: (0.1, 0.0)}, run_dir=str(tmp_path)
    )[0]["rows"]
    assert late["data"] > fast["data"] + 0.15
    assert late["compute"] < 0.15, "waiting for batches is not computing"
    assert len((tmp_path / "ranks.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=60), st.data())
def test_stragglers_by_computing(seconds: list[float], data: Any) -> None:
    """Never half of the ranks, never one within 15% of the median; the order of ranks and the unit of time
    do not matter.
    """
    found = stragglers([row(rank, value) for rank, value in enumerate(seconds)])
    middle = sorted(seconds)[len(seconds) // 2]
    assert len(found) < len(seconds) / 2
    assert all(seconds[rank] > 1.15 * sorted(seconds)[(len(seconds) - 1) // 2] for rank in found)
    order = data.draw(st.permutations(range(len(seconds))))
    assert set(found) == set(stragglers([row(rank, 2 * seconds[rank]) for rank in order]))
    one = [middle * (1 + 0.01 * (rank % 5)) for rank in range(len(seconds))]
    assert not stragglers([row(rank, value) for rank, value in enumerate(one)])
    one[-1] = 1.5 * middle
    assert list(stragglers([row(rank, value) for rank, value in enumerate(one)])) == [len(one) - 1]


def test_where_all_differ_nobody_is_a_straggler() -> None:
    assert not stragglers([row(rank, 1.0 + rank / 4) for rank in range(5)])


@given(st.lists(st.floats(1e9, 1e15), min_size=1, max_size=60))
def test_stragglers_by_matrix_products(rates: list[float]) -> None:
    found = stragglers([row(rank, None, rate) for rank, rate in enumerate(rates)])
    assert len(found) <= len(rates) / 2
    for rank, rate in enumerate(rates):
        assert (rank in found) == (rate < 0.85 * sorted(rates)[len(rates) // 2])


def test_the_table_names_the_straggler() -> None:
    rows = [row(rank, 2.0 if rank == 3 else 1.0, 4e11 if rank == 3 else 1e12) for rank in range(5)]
    text = reports.render(rows)
    assert text.count("\n") == 6
    assert text.splitlines()[-1] == (
        "straggler: rank 3 on n computes for 2 s a step, the median is 1 s and multiplies matrices at 0.4 "
        "TFLOP/s, the median is 1"
    )
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1, "columns stand under their names"
    assert "straggler" not in reports.render([row(0, None)])


def test_the_recorder_keeps_the_last_steps() -> None:
    recorder = StepTimers(torch.device("cpu"), window=4)
    assert set(recorder.medians().values()) == {None}
    for _ in range(9):
        recorder.begin()
        assert list(recorder.data(iter([1, 2]))) == [1, 2]
        recorder.end()
    seen = recorder.medians()
    assert len(recorder._step) == 4
    assert seen["wait"] == 0.0
    assert seen["step"] is not None
    assert 0 < seen["step"] < 0.1
    assert seen["compute"] == 0.0, "no forward pass has ended"


def test_a_request_is_answered_once(tmp_path: Path) -> None:
    assert not requested(tmp_path)
    (tmp_path / "report").touch()
    assert requested(tmp_path)
    assert not requested(tmp_path)
    assert not requested(tmp_path / "gone")
