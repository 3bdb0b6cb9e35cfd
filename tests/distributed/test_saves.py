"""Saves beside training: they change nothing of it, one at a time, and the last one is not given up at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = Path(__file__).with_name("save_cases.py")
TRAINING = Path(__file__).with_name("training_cases.py")


def tree(run_dir: Path, asynchronous: bool = True) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir)},
        "model": {
            "layers": 1,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "attention_dim": 16,
            "sequence": 16,
            "vocab": 64,
        },
        "ffn": {"width": 64, "kind": "low_rank", "rank": 12},
        "guide": {"mode": "fixed_step", "fraction": 0.5, "stochastic": True},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2},
        "checkpoint": {"interval": 2, "keep": 9, "asynchronous": asynchronous},
    }


NAMES = [f"step_{step:08d}" for step in (2, 4, 6, 8)]


@pytest.mark.parametrize("world", [1, 2])
def test_slow_saves_in_the_background_change_nothing(
    ranks: Callable[..., Any], tmp_path: Path, world: int
) -> None:
    """Training takes a step while a save is written, waits before the next save, and every checkpoint has
    its step's tensors.
    """
    slow = ranks(world, 1).run(CASES, "trained", tree=tree(tmp_path / "slow"), slow=True)
    plain = ranks(world, 1).run(CASES, "trained", tree=tree(tmp_path / "plain", asynchronous=False))
    for background, foreground in zip(slow, plain, strict=True):
        assert background["state"] == foreground["state"]
        assert (background["names"], background["news"], background["lost"]) == (NAMES, [], "")
        assert (foreground["names"], foreground["news"], foreground["lost"]) == (NAMES, [], "")
        events = background["events"]
        for step in (2, 4, 6):
            assert events.index(f"step {step + 1}") < events.index(f"written {step}"), (
                "training went on meanwhile"
            )
        writes = [event for event in events if event.startswith("w")]
        assert writes == [f"{what} {step}" for step in (2, 4, 6, 8) for what in ("writing", "written")], (
            "one at a time"
        )
    for step in (2, 4, 6, 8):
        first, second = (
            ranks(1).run(TRAINING, "full_weights", tree=tree(tmp_path / name), step=step)[0]
            for name in ("slow", "plain")
        )
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first), step


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_last_save_has_a_second_try(
    ranks: Callable[..., Any], tmp_path: Path, world: int, asynchronous: bool
) -> None:
    """Others have not: training goes on without them."""
    config = tree(tmp_path, asynchronous)
    for rank in ranks(world, 1).run(CASES, "trained", tree=config, failures={4: 1, 8: 1}):
        assert rank["lost"] == ""
        assert rank["names"] == [NAMES[0], NAMES[2], NAMES[3]]
        assert [text.split(":")[0] for text in rank["news"]] == [
            f"checkpoint of step {step} not written" for step in (4, 8)
        ]
        assert rank["events"].count("writing 4") == 1


@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_are_lost_are_an_error_on_every_rank(
    ranks: Callable[..., Any], tmp_path: Path, world: int
) -> None:
    for rank in ranks(world, 1).run(CASES, "trained", tree=tree(tmp_path), failures={8: 9}):
        assert "weights could not be saved" in rank["lost"]
        assert rank["events"].count("writing 8") == 2
        assert rank["names"] == NAMES[:3]
        assert len(rank["news"]) == 2
        assert "No space left" in rank["news"][0]
