"""profile.steps in whole runs: what it writes, and that it changes nothing else."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("profile_cases.py")
MODEL_ROWS = ("structured FFN", "dense FFN", "attention", "output layer", "loss", "embedding, norms, rest")


def tree(
    folder: Path,
    profiled: str | None,
    *,
    ranks: tuple[int, ...] = (0,),
    length: int = 4,
    tensor: int = 1,
    stage: int = 1,
    **extra: Any,
) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder)},
        "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 64},
        "ffn": {"kind": "low_rank", "width": 64, "rank": 12},
        "guide": {"mode": "fixed_step", "fraction": 0.5, "stochastic": True},
        "train": {"steps": length, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        "parallel": {"tensor": tensor, "sequence": tensor > 1},
        "zero": {"stage": stage},
        "evaluation": {"sequences": 1},
        "checkpoint": {"interval": 0, "asynchronous": False},
        "profile": {"steps": profiled, "ranks": list(ranks)},
        **extra,
    }


def rows(table: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["cause"]: row for row in table["rows"]}


def check_table(table: dict[str, Any], steps: list[int]) -> dict[str, dict[str, float]]:
    """The rows sum to the wall time, and every part of the model takes some; returns the rows."""
    assert table["steps"] == steps
    assert table["step_ms"] == pytest.approx(sum(table["steps_ms"]) / len(steps))
    found = rows(table)
    assert sum(row["ms"] for row in found.values()) == pytest.approx(table["step_ms"], rel=1e-9)
    for cause in MODEL_ROWS:
        assert found[cause]["forward_ms"] > 0, cause
        assert found[cause]["backward_ms"] > 0, cause
        assert found[cause]["ms"] == pytest.approx(found[cause]["forward_ms"] + found[cause]["backward_ms"])
    for cause in ("optimizer", "data", "idle", "gradient accumulation"):
        assert found[cause]["ms"] > 0, cause
    return found


def events(trace: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return found


@pytest.fixture(scope="module")
def one(ranks: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    return lambda config, **options: ranks(1).run(CASES, "trained", tree=config, **options)[0]


def test_one_rank(one: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The guide goes in the midst of the profiled steps: a new engine."""
    plain = one(tree(tmp_path / "plain", None))
    found = one(tree(tmp_path / "profiled", "1:3"))
    assert repr(found["losses"]) == repr(plain["losses"])
    assert found["state"] == plain["state"]
    folder = "profile/step_00000001-00000002/rank_00000"
    assert found["files"] == [f"{folder}.json", f"{folder}.trace.json.gz", f"{folder}.txt"]
    assert (plain["files"], plain["told"], found["warnings"]) == ([], [], [])
    table = found["tables"][f"{folder}.json"]
    check_table(table, [1, 2])
    text = (tmp_path / "profiled" / f"{folder}.txt").read_text()
    (told,) = found["told"]
    assert told == f"profile: {tmp_path / 'profiled' / folder.rpartition('/')[0]}\n{text.rstrip()}"
    assert [step for step, marked in found["marks"] if marked] == [1, 2]
    assert not found["left"], "what marked the profiled steps is still there"


def test_two_ranks_of_a_tensor_parallel_group(ranks: Callable[..., Any], tmp_path: Path) -> None:
    def run(name: str, profiled: str | None) -> Any:
        config = tree(tmp_path / name, profiled, ranks=(1, 0), tensor=2, stage=0)
        return ranks(2, 2).run(CASES, "trained", tree=config)

    plain, found = run("plain", None), run("profiled", "2:4")
    for before, after in zip(plain, found, strict=True):
        assert repr(after["losses"]) == repr(before["losses"])
        assert after["state"] == before["state"]
    folder = tmp_path / "profiled" / "profile" / "step_00000002-00000003"
    for rank in range(2):
        table = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        assert table["rank"] == rank
        assert check_table(table, [2, 3])["communication, exposed"]["ms"] > 0
        names = [row["name"] for row in events(folder / f"rank_{rank:05d}.trace.json.gz")]
        assert names.count("wait for a collective") > 20
        # of each step: the end of two micro-steps, and stage 0's norm and clipping
        assert names.count("optimizer") == 2 * 3
        assert sum(name.startswith("gloo:") for name in names) > 20
    assert len(list(folder.iterdir())) == 6
    assert [len(result["told"]) for result in found] == [1, 0]


@pytest.mark.parametrize(
    ("steps", "start", "rank", "untouched", "note"),
    [
        (None, 0, 0, True, None),
        ("1:3", 0, 0, False, "profile: steps 1..2 on rank 0, into "),
        ("1:3", 0, 1, True, "profile: steps 1..2 on rank 0, into "),
        ("1:3", 3, 0, True, "profile: no step (profile.steps = 1:3: this start begins with step 3)"),
        ("3:9", 0, 0, False, "profile: step 3 on rank 0 (profile.steps = 3:9: the run ends after step 3), "),
        ("4:9", 0, 0, True, "profile: no step (profile.steps = 4:9: the run ends after step 3)"),
    ],
)
def test_who_profiles_nothing_takes_its_steps_as_ever(
    ranks: Callable[..., Any],
    tmp_path: Path,
    steps: str | None,
    start: int,
    rank: int,
    untouched: bool,
    note: str | None,
) -> None:
    """The very function, nothing around it; and what is not profiled is said."""
    (found,) = ranks(1).run(CASES, "opened", tree=tree(tmp_path, steps), start=start, rank=rank)
    assert found["untouched"] is untouched
    notes = [] if note is None else [note]
    assert [text[: len(begin)] for text, begin in zip(found["notes"], notes, strict=True)] == notes


def test_the_trace_names_modules(one: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With every layer recomputed in the backward pass, whose ranges stand inside of autograd's nodes."""
    config = tree(tmp_path / "run", "1:2", stage=2, length=2, recompute="full")
    found = one(config)
    assert found["warnings"] == []
    (table,) = found["tables"].values()
    check_table(table, [1])
    (file,) = (tmp_path / "run").glob("profile/*/*.gz")
    trace = events(file)
    drawn = [row["name"] for row in trace if row["ph"] == "X"]
    assert drawn.count("ProfilerStep#1") == 1
    assert not any("linear_fc" in name for name in drawn), "hooks there change how the layer is computed"
    assert drawn.count("decoder.layers.1.mlp") == 4, "two micro-steps, each forward twice"
    assert drawn.count("output_layer") == drawn.count("loss") == 2
    assert any(row["ph"] == "s" and row["name"] == "forward to backward" for row in trace)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("start", "RuntimeError: no permission"),
        ("ranges", "RuntimeError: no permission"),
        ("export", "RuntimeError: no permission"),
        ("disk", "OSError: [Errno 27] File too large"),
    ],
)
def test_what_fails_is_a_warning(
    one: Callable[..., dict[str, Any]], tmp_path: Path, fault: str, reason: str
) -> None:
    found = one(tree(tmp_path / "fails", "0:2", length=3), fault=fault)
    assert found["warnings"] == [f"profile.steps: cannot be recorded, training goes on without: {reason}"]
    assert len(found["losses"]) == 3
    assert (found["files"], found["told"], found["left"]) == ([], [], False)
    # torch's profiler is free for the next one
    again = one(tree(tmp_path / "again", "0:1", length=2))
    assert (len(again["files"]), again["warnings"]) == (3, [])


def test_a_signal_in_a_profiled_step_stops_the_run_as_ever(
    one: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = one(tree(tmp_path, "1:5", length=6), stop_at=2)
    assert found["stop"] == ("SIGTERM", 143, 3)
    assert found["saved"] == [3]
    assert found["files"] == []
    assert found["told"][-1] == "profile: discarded, the run was stopped while it was recorded"
    assert not found["left"]


def test_a_planned_stop_and_skipped_steps_end_a_profile_that_is_written(
    one: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = tree(tmp_path / "stops", "1:5", length=6)
    config["train"]["stop_at_step"] = 3
    assert {path.split("/")[1] for path in one(config)["files"]} == {"step_00000001-00000002"}
    config = tree(tmp_path / "skips", "1:4")
    found = one(config, excluded=(1, 3))
    (table,) = found["tables"].values()
    assert table["steps"] == [2]
