"""Ranks choose the same kernels, whatever each one measures, has in its cache, or lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_name("kernel_choice_cases.py")
TIMES = [[2.0, 3.0, 1.0], [2.0, 1.9, 9.0]]  # torch, slow, quick: alone, the ranks would choose quick and slow


def test_the_mean_of_all_times_decides(ranks: Callable[..., Any]) -> None:
    tables = [{"known float16 128x8": "slow"}, {"known float16 128x8": "quick"}]
    found = ranks(2, 1).run(CASES, "choices", reasons=[None, None], tables=tables, times=TIMES)
    assert [rank["chosen"] for rank in found] == [["slow", "torch", "torch"]] * 2, (
        "the first rank's table; then the means"
    )
    assert found[0]["measured"] == ["torch", "slow", "quick", "written"]
    assert found[1]["measured"] == ["torch", "slow", "quick"], "one rank writes the cache"


def test_what_one_node_cannot_run_none_does(ranks: Callable[..., Any]) -> None:
    tables: list[dict[str, str]] = [{}, {}]
    found = ranks(2, 1).run(
        CASES, "choices", reasons=[None, "the package triton is not installed"], tables=tables, times=TIMES
    )
    assert [rank["chosen"] for rank in found] == [["torch"] * 3] * 2
    assert not any(rank["measured"] for rank in found)
