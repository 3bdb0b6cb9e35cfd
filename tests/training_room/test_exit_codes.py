"""The record of an end: the first one stays, and leaving it never fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sffn_dist import pretrain
from sffn_dist.launch import exit_codes


def test_the_first_record_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "end.json"
    monkeypatch.setenv(exit_codes.VARIABLE, str(path))
    monkeypatch.setenv("RANK", "3")
    exit_codes.record(exit_codes.DIVERGED, "first")
    exit_codes.record(exit_codes.FAILED, "second")
    tree = json.loads(path.read_text())
    assert (tree["code"], tree["name"], tree["restart"], tree["reason"], tree["rank"]) == (
        3,
        "diverged",
        False,
        "first",
        3,
    )


@pytest.mark.parametrize("path", ["", "/dev/full", "/dev/null/none", "/none/end.json", "\0"])
def test_a_record_that_cannot_be_left(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\0" not in path:
        monkeypatch.setenv(exit_codes.VARIABLE, path)
    monkeypatch.setenv("RANK", "no number")
    exit_codes.record(exit_codes.FAILED, "x")


def test_a_rank_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(exit_codes.VARIABLE, str(tmp_path / "end.json"))
    monkeypatch.setenv("RANK", "no number")
    exit_codes.record(exit_codes.REFUSED, "RANK is no number")
    assert json.loads((tmp_path / "end.json").read_text())["code"] == 2


def test_names() -> None:
    assert [exit_codes.name(code) for code in (0, 5, 138, 143, 130, 77)] == [
        "finished",
        "hung",
        "stopped by SIGUSR1",
        "stopped by SIGTERM",
        "stopped by SIGINT",
        "exit code 77",
    ]


def test_srun_variables_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any rank has a number of its own, only the first task speaks; the others leave with the same
    code.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain.cli.time, "sleep", lambda seconds: None)
    for name, value in {"STEP_ID": "0", "STEP_NUM_TASKS": "many", "PROCID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert pretrain.main([]) == exit_codes.REFUSED
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert pretrain.main([]) == exit_codes.REFUSED
    assert "SLURM_STEP_NUM_TASKS = 'many'" in capfd.readouterr().err
