"""The store as a run drives it: what is saved is what was there, whatever comes after; what is pruned was
not wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.checkpoint import writer

CASES = Path(__file__).with_name("saving_cases.py")
FAULTS = Path(__file__).with_name("fault_cases.py")
Nursery = Callable[..., Any]


@pytest.mark.parametrize("guide", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_saved_is_read_back(
    nursery: Nursery, tmp_path: Path, world: int, asynchronous: bool, guide: bool
) -> None:
    """Bit for bit, tokenizer and hashes too, though the state is another one before the save is over."""
    run = tmp_path / "run"
    for saves, news in nursery(
        CASES, "saved", run_dir=run, steps=[3, 7], world=world, guide=guide, asynchronous=asynchronous
    ):
        assert saves == ["step_00000003", "step_00000007"]
        assert news == []
    found = nursery(CASES, "found", run_dir=run)
    assert (found["step"], found["wrong"], found["warnings"]) == (7, [], [])
    assert found["names"] == ["step_00000003", "step_00000007"]
    assert nursery(CASES, "complete", run_dir=run) == [3, 7]
    files = sorted(path.name for path in (run / "checkpoints" / "step_00000007").iterdir())
    assert files == [
        "manifest.json",
        *(f"rank_{rank:05d}.safetensors" for rank in range(world)),
        "tokenizer.json",
    ]


def test_training_goes_on_while_a_slow_disk_is_written(nursery: Nursery, tmp_path: Path) -> None:
    """``save`` returns before the file is begun, a later one waits for it, and the file has the state of
    its own step.
    """
    events, whole = nursery(FAULTS, "slow_saves", run_dir=tmp_path / "run")
    assert events == ["returned 1", "writing", "written", "returned 2", "writing", "written", "waited"]
    assert whole == [1, 2]


@pytest.mark.parametrize("where", ["staging", "writing"])
def test_one_rank_fails_and_both_hear_of_it(nursery: Nursery, tmp_path: Path, where: str) -> None:
    for saves, news, left in nursery(FAULTS, "one_rank_fails", run_dir=tmp_path / "run", where=where):
        assert saves == ["step_00000001", None, "step_00000002"], "the next try is not hindered"
        assert news == ["checkpoint of step 2 not written: rank 1: RuntimeError: no luck"]
        assert left == ["step_00000001"], "nothing half-written is there once a rank has heard"


STEPS = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (9, 0, STEPS),
        (1, 2, [2, 4, 6]),
        (2, 3, [3, 5, 6]),
        (1, 4, [4, 6]),
        (1, 1, STEPS),
    ],
)
def test_prune_keeps_the_newest_and_the_multiples(
    nursery: Nursery, tmp_path: Path, keep: int, keep_every: int, kept: list[int]
) -> None:
    nursery(CASES, "saved", run_dir=tmp_path / "run", steps=STEPS, keep=keep, keep_every=keep_every)
    assert nursery(CASES, "complete", run_dir=tmp_path / "run") == kept


def test_prune_lets_nothing_good_go_for_what_is_of_no_use(nursery: Nursery, tmp_path: Path) -> None:
    """Of 1 ..

    6, 3 is marked, 4 of another version, 5 torn: keep=3 keeps three good ones, and what may be of use
    elsewhere.
    """
    run = tmp_path / "run"
    folders = [run / "checkpoints" / f"step_{step:08d}" for step in range(8)]
    nursery(CASES, "saved", run_dir=run, steps=STEPS, keep=9)
    (folders[3] / "BROKEN").write_text("a bit flipped\n")
    manifest = folders[4] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    (folders[5] / "rank_00000.safetensors").write_bytes(b"torn")
    nursery(CASES, "saved", run_dir=run, steps=[7], keep=3)
    assert nursery(CASES, "found", run_dir=run)["names"] == [folders[step].name for step in (2, 4, 6, 7)]
    assert nursery(CASES, "complete", run_dir=run) == [2, 6, 7]


def test_prune_keeps_what_cannot_be_read(nursery: Nursery, tmp_path: Path) -> None:
    """A manifest that the disk answers with an error for: a folder in its place, for root too."""
    run = tmp_path / "run"
    nursery(CASES, "saved", run_dir=run, steps=[1, 2])
    manifest = run / "checkpoints" / "step_00000001" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    nursery(CASES, "saved", run_dir=run, steps=[3], keep=1)
    assert nursery(CASES, "found", run_dir=run)["names"] == ["step_00000001", "step_00000003"]


def test_prune_leaves_what_lies_beyond_the_step_that_was_saved(nursery: Nursery, tmp_path: Path) -> None:
    """5 was broken and 6 could not be read for a while, the run went on from 4: its 5 is the newest,
    whatever bore the name; 6 stays.
    """
    run = tmp_path / "run"
    nursery(CASES, "saved", run_dir=run, steps=STEPS, keep=9)
    (run / "checkpoints" / "step_00000005" / "rank_00000.safetensors").write_bytes(b"torn")
    nursery(CASES, "saved", run_dir=run, steps=[5], keep=2)
    assert nursery(CASES, "complete", run_dir=run) == [4, 5, 6]


def test_a_save_keeps_what_another_version_wrote_under_its_name(nursery: Nursery, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nursery(CASES, "saved", run_dir=run, steps=[3], keep=9)
    manifest = run / "checkpoints" / "step_00000003" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    nursery(CASES, "saved", run_dir=run, steps=[3], keep=9)
    assert nursery(CASES, "complete", run_dir=run) == [3]
    kept = run / "checkpoints" / "step_00000003.other"
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        path.name for path in manifest.parent.iterdir()
    )


@pytest.mark.parametrize("how", ["file", "folder"])
def test_nothing_is_published_that_is_not_there(nursery: Nursery, tmp_path: Path, how: str) -> None:
    """What a rank wrote is gone, or its folder is, before the manifest is: a disk that was taken away."""
    told = nursery(CASES, "saved_on_a_disk_that_goes", run_dir=tmp_path / "run", how=how)
    assert told["saved"] is None
    assert "step 1 not written" in told["news"][0]
    assert "rank_00000.safetensors" in told["news"][0]
    assert nursery(CASES, "complete", run_dir=tmp_path / "run") == []


@given(sizes=st.lists(st.integers(0, 40)), most=st.integers(1, 20))
def test_staging_is_packed_in_order_into_blocks(sizes: list[int], most: int) -> None:
    """None is larger than it may be, but for one tensor alone; two neighbours would not have fitted one."""
    blocks = writer.blocks_of(sizes, most)
    assert [size for block in blocks for size in block] == sizes
    assert all(sum(block) <= most or len([size for size in block if size]) == 1 for block in blocks)
    for block, following in itertools.pairwise(blocks):
        assert sum(block) + following[0] > most


def test_staged_copies_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks, kept for the same sizes and made anew for others."""
    monkeypatch.setattr(writer.blocks_of, "__defaults__", (8,))
    staging = writer._Staging()
    for sizes in ((5, 3, 20, 1), (5, 3, 20, 1), (2, 9)):
        views = {str(index): torch.rand(size) for index, size in enumerate(sizes)}
        before = [block.data_ptr() for block in staging._blocks]
        copies = staging.copy(views)
        assert all(torch.equal(copies[key], view) for key, view in views.items())
        assert copies.keys() == views.keys()
        assert ([block.data_ptr() for block in staging._blocks] == before) is (sizes[0] == 5 and bool(before))
    assert [block.numel() for block in staging._blocks] == [2, 9]
