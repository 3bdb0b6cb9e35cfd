"""What a disk did to a checkpoint after it was saved is found before anything of it is used, by all ranks
alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = Path(__file__).with_name("saving_cases.py")
FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "tokenizer.json", "manifest.json")
Find = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def whole(nursery: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("whole") / "run"
    nursery(CASES, "saved", run_dir=run, steps=[1, 2, 3], world=2, keep=9)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def find(nursery: Callable[..., Any]) -> Find:
    """``find(run, world=2)``: what a start of that many ranks finds; they agree."""

    def on(run: Path, world: int = 1) -> dict[str, Any]:
        ranks = nursery(CASES, "found_by_ranks", run_dir=run, world=world)
        for found in ranks:
            assert {**found, "warnings": None} == {**ranks[0], "warnings": None}
            assert found["wrong"] == []
        return dict(ranks[0])

    return on


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def flip(path: Path, place: int, bit: int = 0) -> None:
    """One bit of a file, ``place`` counted from its end if negative."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "flipped at its beginning": lambda path: flip(path, 3),
    "flipped at its end": lambda path: flip(path, -1),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_it_is_skipped_and_named_and_the_one_before_is_used(
    find: Find, run: Path, name: str, damage: str
) -> None:
    DAMAGES[damage](folder(run, 3) / name)
    for world in (1, 2):  # the second start meets the mark that the first one left
        found = find(run, world)
        assert found["step"] == 2
        assert len(found["warnings"]) == 1
        assert str(folder(run, 3)) in found["warnings"][0]
        assert name in found["warnings"][0] or name == "manifest.json"
    content = name != "manifest.json" and ("flipped" in damage or "zeros" in damage)
    assert (folder(run, 3) / "BROKEN").exists() == content, "what costs nothing to see again is not marked"
    assert find(run)["names"] == [folder(run, step).name for step in (1, 2, 3)], (
        "nothing is deleted by a start"
    )


def test_the_mark_says_what_was_found_and_can_be_taken_away(find: Find, run: Path) -> None:
    shard = folder(run, 3) / "rank_00001.safetensors"
    flip(shard, 4000)
    first = find(run, 2)
    assert "rank_00001.safetensors: sha256" in first["warnings"][0]
    mark = folder(run, 3) / "BROKEN"
    assert mark.read_text(encoding="utf-8").strip() in first["warnings"][0]
    assert "marked as broken" in find(run)["warnings"][0]
    flip(shard, 4000)
    assert find(run)["step"] == 2, "the mark stands"
    mark.unlink()
    assert (find(run, 2)["step"], find(run)["warnings"]) == (3, [])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES[:3]), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(
    find: Find, run: Path, data: st.DataObject, name: str, bit: int
) -> None:
    path = folder(run, 3) / name
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    flip(path, place, bit)
    try:
        found = find(run)
        assert (found["step"], len(found["warnings"])) == (2, 1)
        assert name in found["warnings"][0]
    finally:
        flip(path, place, bit)
        (folder(run, 3) / "BROKEN").unlink()
    assert find(run)["step"] == 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_manifest_is_found(find: Find, run: Path, data: st.DataObject, bit: int) -> None:
    path = folder(run, 3) / "manifest.json"
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    same = path.read_bytes()[place : place + 1] in b"eE" and bit == 5  # 1e-05 is 1E-05
    flip(path, place, bit)
    try:
        found = find(run)
        assert found["step"] == 2 or same
        assert found["step"] == 3 or str(folder(run, 3)) in found["warnings"][0]
    finally:
        flip(path, place, bit)


@pytest.mark.parametrize("world", [1, 2])
def test_each_skipped_one_is_named_once(find: Find, run: Path, world: int) -> None:
    """3 is damaged in its content, 2 in its size: 1 is used."""
    flip(folder(run, 3) / "tokenizer.json", 5)
    (folder(run, 2) / "rank_00000.safetensors").write_bytes(b"torn")
    found = find(run, world)
    assert found["step"] == 1
    assert ["step_00000003" in warning for warning in found["warnings"]] == [True, False]
    assert ["step_00000002" in warning for warning in found["warnings"]] == [False, True]


@pytest.mark.parametrize("world", [1, 2])
def test_where_all_are_broken_the_start_is_refused(find: Find, run: Path, world: int) -> None:
    """Nothing is deleted, and the second refusal says the same."""
    (folder(run, 1) / "rank_00001.safetensors").unlink()
    flip(folder(run, 2) / "rank_00000.safetensors", -9)
    flip(folder(run, 3) / "rank_00001.safetensors", -9)
    before = {path for path in run.rglob("*") if path.name != "BROKEN"}
    for reasons in (
        ["see above", "see above", "No such file"],
        ["marked as broken", "marked as broken", "No such file"],
    ):
        found = find(run, world)
        assert found["step"] is None
        assert len(found["refused"]) == 3
        for problem, step, reason in zip(found["refused"], (3, 2, 1), reasons, strict=True):
            assert folder(run, step).name in problem
            assert reason in problem
        assert {path for path in run.rglob("*") if path.name != "BROKEN"} == before


def test_checkpoints_that_cannot_be_listed_are_not_none(find: Find, tmp_path: Path) -> None:
    """Starting anew would overwrite them."""
    assert find(tmp_path)["step"] is None
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    (problem,) = find(tmp_path)["refused"]
    assert "checkpoints cannot be listed" in problem


def test_what_only_cannot_be_read_is_not_marked(nursery: Callable[..., Any], run: Path) -> None:
    """It may be whole: the next start tries it again."""
    first, second = nursery(CASES, "found_while_unreadable", run_dir=run, name="rank_00000.safetensors")
    assert (first["step"], second["step"]) == (2, 3)
    assert "cannot be read: [Errno 5]" in first["warnings"][0]
    assert not (folder(run, 3) / "BROKEN").exists()
