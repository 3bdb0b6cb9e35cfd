"""One rank's signal is everyone's, and all know the same loss: what the ranks do next hangs on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_name("agreement_cases.py")
STEPS: list[tuple[tuple[float, float], tuple[str | None, str | None], tuple[str | None, bool]]] = [
    ((1.0, 4.0), (None, None), (None, False)),
    ((0.1, 0.2), (None, "SIGTERM"), ("SIGTERM", False)),
    ((1e300, 1e300), ("SIGINT", None), ("SIGINT", False)),
    ((3.0, math.nan), ("SIGUSR1", "SIGTERM"), ("SIGTERM", False)),
    ((math.nan, 3.0), ("SIGINT", "SIGUSR1"), ("SIGUSR1", False)),
    ((math.inf, 2.0), (None, "SIGUSR2"), (None, True)),
    ((2.0, -math.inf), ("SIGUSR2", "SIGINT"), ("SIGINT", True)),
    ((math.inf, -math.inf), ("SIGTERM", "SIGTERM"), ("SIGTERM", False)),
]


def test_all_ranks_know_alike(ranks: Callable[..., Any]) -> None:
    found = ranks(2).run(
        CASES, "agreed", losses=[step[0] for step in STEPS], told=[step[1] for step in STEPS]
    )
    for (losses, _, (stop, report)), *seen in zip(STEPS, *found, strict=True):
        mean = losses[0] / 2 + losses[1] / 2
        for loss, *rest in seen:
            assert loss == mean or (math.isnan(loss) and math.isnan(mean)), losses
            assert rest == [stop, report], losses


def test_who_waited_for_whom(ranks: Callable[..., Any]) -> None:
    (first, asked), (second, heard) = ranks(2).run(CASES, "waited", seconds=1.5)
    assert first > second
    assert first > 0.5
    assert asked
    assert heard
