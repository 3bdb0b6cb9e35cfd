"""Killed anywhere, out of disk at any moment: a start finds the last checkpoint that was reported, whole,
and nothing half-written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("fault_cases.py")
DISKS = Path(__file__).with_name("disk_cases.py")
Nursery = Callable[..., Any]


def check_killed(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["step"] is None:
            assert (row["reported"], row["swept"]) == (0, []), row
            continue
        assert row["step"] in (row["reported"], row["reported"] + 1), row
        assert row["step"] >= row["before"], row
        assert (row["wrong"], row["warnings"]) == ([], []), row
        assert all(line.isdecimal() for line in row["said"]), row
        # hidden names go; of the others one more than are kept may be there, or be half gone, where pruning
        # was cut short
        assert row["swept"] == [name for name in row["left"] if not name.startswith(".")], row
        assert len(row["swept"]) <= 3, row


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random(nursery: Nursery, tmp_path: Path, world: int) -> None:
    options = {"kills": 5, "seed": 11 + world, "world": world, "width": 128, "longest": 0.25}
    rows = nursery(CASES, "killed_at_random", run_dir=tmp_path / "run", **options)
    check_killed(rows)
    assert rows[-1]["step"] >= sum(row["waited"] for row in rows) > 0, "it went on"


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_many_times(nursery: Nursery, tmp_path: Path, world: int) -> None:
    """A state of 30 MB on one rank or two."""
    options = {"kills": 30, "seed": 5 + world, "world": world, "width": 512, "longest": 1.0}
    rows = nursery(CASES, "killed_at_random", run_dir=tmp_path / "run", **options)
    check_killed(rows)
    assert sum(any(name.startswith(".") for name in row["left"]) for row in rows) > 5, "saves were cut short"
    assert rows[-1]["step"] >= sum(row["waited"] for row in rows) > 10


def test_killed_at_every_call(nursery: Nursery, tmp_path: Path) -> None:
    """Before each call by which a save changes the disk: one child for each, over a broken checkpoint of
    the same step, with pruning.
    """
    rows = nursery(CASES, "every_call", folder=tmp_path, fault="kill")
    calls = [row["call"].split(" ", 1)[1] for row in rows]
    published = calls.index("rename .step_00000003.partial")
    assert calls[published - 1] == "rename step_00000003", "both renames are among them"
    assert "unlink manifest.json" in calls[published:], "and pruning"
    for index, row in enumerate(rows):
        assert row["step"] == (2 if index <= published else 3), row
        assert (row["result"], row["wrong"], row["refused"]) == (None, [], []), row
        assert "step_00000002" in row["names"] or row["step"] == 3, row
        assert not [name for name in row["swept"] if name.startswith(".")], row
        assert row["later"] == [[f"step_{row['step'] + 1:08d}"], []], row
        assert row["then"] == row["step"] + 1, row


def test_every_call_may_fail(nursery: Nursery, tmp_path: Path) -> None:
    """Each call once: the save is there or every trace of it gone; what was there before stays; the next
    one succeeds.
    """
    rows = nursery(CASES, "every_call", folder=tmp_path, fault="error")
    assert any(row["result"][0] is None for row in rows)
    for row in rows:
        saved, news, left, whole, again, later = row["result"]
        if saved:
            assert (news, whole) == ([], [3]), row
        else:
            assert len(news) == 1, row
            assert news[0].startswith("checkpoint of step 3 not written: rank 0: OSError"), row
            assert whole[:2] == [1, 2], row
            assert [name for name in left if not name.endswith(".older.partial")] == [
                f"step_{step:08d}" for step in (1, 2, 3)
            ], row
        assert (again, later) == ("step_00000003", []), row


def test_a_name_taken_and_not_given_is_its_own_again(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery(CASES, "stolen_name", run_dir=tmp_path / "run") == ["step_00000002", "step_00000003"]


def obstructed(
    nursery: Nursery, *, folder: Path, kind: str, world: int, size: str | None, **options: Any
) -> list[Any]:
    ranks = nursery(DISKS, "obstructed_ranks", folder=folder, kind=kind, world=world, size=size, **options)
    if isinstance(ranks, str):
        pytest.skip(ranks)
    assert isinstance(ranks, list)
    for rank in ranks:
        assert rank["saves"] == ["step_00000001", None, "step_00000002"]
        assert (rank["left"], rank["whole"]) == (["step_00000001"], [1]), (
            "the older one is whole, nothing half-written is left"
        )
        assert (rank["later"], rank["then"]) == ([], [1, 2])
        assert rank["news"] == ranks[0]["news"], "every rank hears of it"
    assert len(ranks[0]["news"]) == 1
    return ranks


SAYS = {
    "full": "GB free on the disk of ",
    "vanishing": "No space left on device",
    "read-only": "rank 0: OSError: [Errno 30] Read-only file system: ",
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", SAYS)
def test_a_disk_that_takes_no_more(
    nursery: Nursery, tmp_path: Path, kind: str, world: int, asynchronous: bool
) -> None:
    """A real one of 8 MB: full before the save is begun, full while it is written, read-only."""
    ranks = obstructed(nursery, folder=tmp_path, kind=kind, world=world, size="8m", asynchronous=asynchronous)
    assert ranks[0]["news"][0].startswith("checkpoint of step 2 not written: rank")
    assert SAYS[kind] in ranks[0]["news"][0]


@pytest.mark.parametrize("world", [1, 2])
def test_a_limit_on_the_last_ranks_files(nursery: Nursery, tmp_path: Path, world: int) -> None:
    """Where no disk of one's own is to be had: the system refuses the file's second half."""
    ranks = obstructed(nursery, folder=tmp_path, kind="limit", world=world, size=None)
    assert ranks[0]["news"] == [
        f"checkpoint of step 2 not written: rank {world - 1}: OSError: [Errno 27] File too large"
    ]


def test_a_damaged_checkpoint_that_cannot_be_marked(nursery: Nursery, tmp_path: Path) -> None:
    """It is skipped all the same, once."""
    found = nursery(DISKS, "damaged_on_a_read_only_disk", folder=tmp_path)
    if isinstance(found, str):
        pytest.skip(found)
    assert (found["step"], found["wrong"]) == (1, [])
    assert ["sha256" in warning for warning in found["warnings"]] == [True, False]
    assert "cannot be marked as broken: [Errno 30] Read-only file system" in found["warnings"][1]


@pytest.mark.faults
def test_a_disk_that_fills_at_random_moments(nursery: Nursery, tmp_path: Path) -> None:
    """40 saves, another process fills the disk at some moment of each and frees it after."""
    rows = nursery(DISKS, "filled_at_random", folder=tmp_path, times=40, seed=2)
    if isinstance(rows, str):
        pytest.skip(rows)
    for row in rows:
        assert set(row["left"]) == {f"step_{step:08d}" for step in row["after"]}, "whole or not there"
        assert row["after"] == ([*row["before"], row["step"]][-2:] if row["saved"] else row["before"]), row
        assert bool(row["news"]) != row["saved"], row
    assert 5 < sum(row["saved"] for row in rows) < 38, "some were caught"
    assert sum("No space left" in news for row in rows for news in row["news"]) > 0, "one in the middle"
