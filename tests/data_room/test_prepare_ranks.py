"""Ranks of one run prepare a corpus once for each file system, in no collective, without flock."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.data.shards import verify
from sffn_dist.spec.config import Config

CASES = Path(__file__).with_name("prepare_cases.py")


@pytest.fixture
def play(
    fresh_nursery: Callable[..., Any], tmp_path: Path, texts: Path, configure: Callable[..., Config]
) -> Callable[..., list[tuple[int, str]]]:
    """play(data_dirs, ...) -> each rank's exit code, and what it said."""
    (tmp_path / "logs").mkdir()

    def run(data_dirs: list[str], source: Path = texts, **options: Any) -> list[tuple[int, str]]:
        tree = configure(source).model_dump(mode="json")
        tree["run"]["dir"] = str(tmp_path / "run")
        told: list[tuple[int, str]] = fresh_nursery(
            CASES, "play", tree=tree, data_dirs=data_dirs, logs=str(tmp_path / "logs"), **options
        )
        return told

    return run


def test_one_rank_of_each_file_system_prepares_and_is_heard(
    play: Callable[..., list[tuple[int, str]]], tmp_path: Path
) -> None:
    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    ranks = play([shared, own, shared])
    assert [code for code, _ in ranks] == [0, 0, 0], ranks
    assert ["inside" in text for _, text in ranks] == [True, True, False]
    prefix = f"rank 1 on {platform.node()}: "
    assert "\npreparing data.source" in "\n" + ranks[0][1]
    assert f"{prefix}preparing data.source" in ranks[1][1]
    assert f"{prefix}prepared " in ranks[1][1]
    for data_dir in (shared, own):
        (folder,) = Path(data_dir).iterdir()  # and no mark, claim or leftover
        verify(folder)


@pytest.mark.parametrize("preparer", [0, 1])
def test_a_preparer_that_fails_is_everyones_reason(
    play: Callable[..., list[tuple[int, str]]], tmp_path: Path, texts: Path, preparer: int
) -> None:
    own, shared, source = tmp_path / "own", tmp_path / "shared", tmp_path / "empty"
    source.mkdir()
    (source / "a.txt").write_text("")
    if preparer:
        (tmp_path / "file").write_text("")
        own = tmp_path / "file" / "below"  # a folder that this node cannot make
    ranks = play([str(shared), str(own if preparer else shared)], source if not preparer else texts)
    assert [code for code, _ in ranks] == [2, 2], ranks
    said = [text for _, text in ranks if "error:" in text]
    assert len(said) == 1
    assert "Traceback" not in said[0]
    assert ("data.dir = " if preparer else "must hold text") in said[0]


def test_a_preparer_that_is_killed_is_everyones_reason(
    play: Callable[..., list[tuple[int, str]]], tmp_path: Path
) -> None:
    ranks = play([str(tmp_path / "shared")] * 3, dies=True)
    assert ranks[0][0] == -9
    # rank 0 serves the store: each of the others speaks for itself, or hears of it in time
    assert {code for code, _ in ranks[1:]} == {6}, ranks
    assert any("rank 0" in text for _, text in ranks[1:])
