"""Bad steps in real training: skipped without a trace, undone where there are several, and what is then
passed over stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.launch.signals import Stop

CASES = Path(__file__).with_name("setback_cases.py")
# each ZeRO stage and precision; stage 0 in bf16 is refused (spec/validation.check_precision)
ENGINES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]


def tree(run_dir: Path, stage: int = 1, **guards: Any) -> dict[str, Any]:
    """20 steps, saves after every fourth; guided until step 10."""
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
        "ffn": {"width": 64, "kind": "low_rank", "rank": 12, "dense_layers": []},
        "guide": {"mode": "fixed_step", "fraction": 0.5, "stochastic": True},
        "train": {
            "steps": 20,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 3e-3,
            "epsilon": 1e-5,
        },
        "checkpoint": {"interval": 4, "keep": 3},
        "zero": {"stage": stage},
        "guards": {"spike_window": 8, "replicas_interval": 5, **guards},
    }


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_bad_step_leaves_no_trace(
    ranks: Callable[..., Any], tmp_path: Path, stage: int, precision: str
) -> None:
    """Weights, moments and Adam's counts, of a spike on all ranks and of a gradient that is nan on one;
    others are taken.
    """
    bad = {12: "spike", 14: "nan"}
    for rank in ranks(2, 1).run(CASES, "trained", tree=tree(tmp_path, stage), bad=bad, precision=precision):
        assert rank["unchanged"] == [12, 14]
        assert rank["taken"] == list(range(20))
        assert len(rank["losses"]) == 8
        assert max(rank["losses"]) < 5, "a spike is no loss to compare others with"


@pytest.mark.parametrize("stage", [1, 3])
def test_going_back_is_as_if_the_bad_batches_were_not_there(
    ranks: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    """Back over the boundary where the guide goes; also when a signal stops the run on the way, and
    another start ends it.
    """
    bad = dict.fromkeys((9, 10, 11), "nan")
    pool = ranks(2, 1)
    without = pool.run(CASES, "trained", tree=tree(tmp_path / "without", stage), bad={}, passed=[9, 10, 11])
    back = pool.run(CASES, "trained", tree=tree(tmp_path / "back", stage), bad=bad)
    for mine, others in zip(back, without, strict=True):
        assert mine["taken"] == [*range(12), 8, *range(12, 20)]
        assert others["taken"] == [*range(9), *range(12, 20)]
        assert [event for event, _ in mine["told"]] == ["rolled back", *["batch skipped"] * 3]
        assert mine["told"][0][1] == {"first": 9, "last": 11, "reached": 12}
        assert (mine["state"], mine["losses"]) == (others["state"], others["losses"])
    stopped = pool.run(CASES, "trained", tree=tree(tmp_path / "stopped", stage), bad=bad, stop_at=13)
    assert {rank["stopped"] for rank in stopped} == {Stop("SIGTERM", 143)}
    assert stopped[0]["taken"] == [*range(12), 8, 12, 13]
    (found, _) = pool.run(CASES, "begun", tree=tree(tmp_path / "stopped", stage))
    assert found == {"step": 14, "losses": stopped[0]["losses"], "passed": [9, 10, 11]}
    ended = pool.run(CASES, "trained", tree=tree(tmp_path / "stopped", stage), bad=bad)
    for mine, others in zip(ended, without, strict=True):
        assert mine["taken"] == list(range(14, 20))
        assert (mine["state"], mine["losses"]) == (others["state"], others["losses"])


def test_without_a_checkpoint_it_starts_anew(ranks: Callable[..., Any], tmp_path: Path) -> None:
    bad = dict.fromkeys((1, 2), "nan")
    (back,) = ranks(1).run(CASES, "trained", tree=tree(tmp_path / "back", rollback_after=2), bad=bad)
    (without,) = ranks(1).run(
        CASES, "trained", tree=tree(tmp_path / "without", rollback_after=2), bad={}, passed=[1, 2]
    )
    assert back["taken"] == [0, 1, 2, 0, *range(3, 20)]
    assert back["state"] == without["state"]


def test_where_that_does_not_help_it_ends(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """The second time one checkpoint further back; no checkpoint is saved amid bad steps."""
    config = tree(tmp_path, max_rollbacks=2)
    for rank in ranks(2, 1).run(CASES, "trained", tree=config, bad=dict.fromkeys(range(9, 20), "nan")):
        assert rank["taken"] == [*range(12), 8, 12, 13, 14, 4, 5, 6, 7, 8, 15, 16, 17]
        assert rank["error"].startswith("steps 15 to 17 were bad again after 2 rollbacks")
        assert rank["passed"] == list(range(9, 15))
    assert not (tmp_path / "checkpoints" / "step_00000012").exists()


def test_no_going_back_where_none_is_wanted(ranks: Callable[..., Any], tmp_path: Path) -> None:
    config = tree(tmp_path, rollback_after=0, spike_deviations=0)
    bad = {**dict.fromkeys(range(9, 14), "nan"), 15: "spike"}
    (rank,) = ranks(1).run(CASES, "trained", tree=config, bad=bad)
    assert rank["taken"] == list(range(20))
    assert rank["unchanged"] == list(range(9, 14)), "and a spike is learned from where none is looked for"
