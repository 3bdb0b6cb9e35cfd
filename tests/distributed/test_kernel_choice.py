"""Ranks choose the same kernels, whatever each one measures, has in its cache, or lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_name("kernel_choice_cases.py")
TURNS = 7
# torch, slow, quick: alone, the ranks would choose quick and slow
TIMES = [[[2.0] * TURNS, [3.0] * TURNS, [1.0] * TURNS], [[2.0] * TURNS, [1.9] * TURNS, [9.0] * TURNS]]
IN_TURNS = ["torch", "slow", "quick"] * TURNS


def test_the_mean_of_all_times_decides(ranks: Callable[..., Any]) -> None:
    tables = [{"known float16 128x8": "slow"}, {"known float16 128x8": "quick"}]
    found = ranks(2, 1).run(CASES, "choices", reasons=[None, None], tables=tables, times=TIMES)
    assert [rank["chosen"] for rank in found] == [["slow", "torch", "torch"]] * 2, (
        "the first rank's table; then the means"
    )
    assert found[0]["measured"] == [*IN_TURNS, "written"]
    assert found[1]["measured"] == IN_TURNS, "one rank writes the cache"


def test_no_rank_times_while_another_compiles(ranks: Callable[..., Any]) -> None:
    """A collective that waits for it would run beside what is timed."""
    found = ranks(2, 1).run(
        CASES, "choices", reasons=[None, None], tables=[{}, {}], times=TIMES, compiling=[0.0, 1.0]
    )
    assert min(rank["first_timed"] for rank in found) >= max(rank["last_compiled"] for rank in found)


def test_noise_leaves_all_ranks_with_plain_torch(ranks: Callable[..., Any]) -> None:
    """Quick is faster on each rank and in the mean, by less than times differ."""
    noisy = [1.0, 1.6, 1.1, 1.5, 1.2, 1.4, 1.3]
    times = [
        [[value + 0.1 for value in noisy], [9.0] * TURNS, noisy],
        [[value + 0.05 for value in noisy], [9.0] * TURNS, noisy],
    ]
    found = ranks(2, 1).run(CASES, "choices", reasons=[None, None], tables=[{}, {}], times=times)
    assert [rank["chosen"][1:] for rank in found] == [["torch"] * 2] * 2
    assert found[0]["table"] == found[1]["table"], "every time, to the last bit"
    assert found[0]["table"]["new float16 128x8"]["fastest"] == "quick"


def test_what_one_node_cannot_run_none_does(ranks: Callable[..., Any]) -> None:
    tables: list[dict[str, str]] = [{}, {}]
    found = ranks(2, 1).run(
        CASES, "choices", reasons=[None, "the package triton is not installed"], tables=tables, times=TIMES
    )
    assert [rank["chosen"] for rank in found] == [["torch"] * 3] * 2
    assert not any(rank["measured"] for rank in found)
