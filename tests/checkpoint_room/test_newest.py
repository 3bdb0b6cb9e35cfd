"""The newest complete checkpoint of a run, and the one that a setting names."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sffn_dist.checkpoint.manifest import NAME, File, Manifest
from sffn_dist.checkpoint.run_folder import checkpoints, find_checkpoint, folder_of, latest_checkpoint
from sffn_dist.spec.config import ConfigError


def write(folder: Path, step: int = 0) -> Path:
    """A complete checkpoint of two files and no tensors."""
    folder.mkdir(parents=True)
    files = {}
    for name, size in {"rank_00000.safetensors": 10, "rank_00001.safetensors": 4}.items():
        (folder / name).write_bytes(b"x" * size)
        files[name] = File(size, hashlib.sha256(b"x" * size).hexdigest())
    Manifest(folder, step, step, None, "abc", 2, ("weight",), {}, {}, {}, files).write()
    return folder


def run_with(run: Path, *steps: int) -> Path:
    for step in steps:
        write(folder_of(run, step), step=step)
    return run


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / NAME).unlink(),
    "torn manifest": lambda folder: (folder / NAME).write_text((folder / NAME).read_text()[:50]),
    "lost file": lambda folder: (folder / "rank_00001.safetensors").unlink(),
    "torn file": lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"x"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_skips_a_broken_checkpoint_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_with(tmp_path, 60, 120, 180)
    DAMAGES[damage](folder_of(run, 180))
    with caplog.at_level(logging.WARNING, logger="sffn_dist"):
        found = latest_checkpoint(run)
    assert found is not None
    assert found.step == 120
    assert "step_00000180" in caplog.text
    DAMAGES[damage](folder_of(run, 120))
    DAMAGES[damage](folder_of(run, 60))
    with pytest.raises(ConfigError) as caught:
        latest_checkpoint(run)  # None would start the run anew, over what is left of it
    assert len(caught.value.problems) == 3
    assert all(text.startswith(f"run.dir = {str(run)!r}: ") for text in caught.value.problems)


def test_newest_is_by_number_and_looks_at_finished_folders_only(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    run = run_with(tmp_path, 9, 80, 100)
    for name in ("step_00000500.partial", ".step_00000600", "step_", "step_x", "backup"):
        write(run / "checkpoints" / name)
    assert [path.name for path in checkpoints(run)] == ["step_00000009", "step_00000080", "step_00000100"]
    found = latest_checkpoint(run)
    assert found is not None
    assert found.folder == folder_of(run, 100)


def test_find_takes_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    run = run_with(tmp_path, 60, 120)
    assert find_checkpoint("init_from", str(run)).step == 120
    assert find_checkpoint("init_from", str(folder_of(run, 60))).step == 60


@pytest.mark.parametrize("what", ["missing", "file", "empty", "broken checkpoint", "broken run"])
def test_find_names_the_key_and_the_path(tmp_path: Path, what: str) -> None:
    run = run_with(tmp_path / "run", 60)
    (run / "checkpoints" / "step_00000060" / "rank_00000.safetensors").unlink()
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    path = {"broken checkpoint": folder_of(run, 60), "broken run": run}.get(what, tmp_path / what)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("init_from", str(path))
    problem, *_ = caught.value.problems
    assert problem.startswith(f"init_from = {str(path)!r}: ")
    assert ("no such folder" in problem) == (what in ("missing", "file"))
    assert ("complete" in problem) == (what in ("empty", "broken checkpoint", "broken run"))
