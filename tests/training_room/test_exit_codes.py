"""The record of an end: the first one stays, and leaving it never fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from sffn_dist import pretrain
from sffn_dist.launch import exit_codes
from sffn_dist.spec.disk_errors import disk_error


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


def test_a_disk_that_fails_before_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line and exit code 1, at which a job is started again; no traceback."""

    def fail(self: object) -> None:
        raise disk_error("run.dir = x", "x", OSError(errno.ESTALE, "Stale file handle"))

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(exit_codes.VARIABLE, str(tmp_path / "end.json"))
    monkeypatch.setattr(pretrain.cli.run_lock.RunLock, "acquire", fail)
    model = {"layers": 1, "width": 8, "heads": 2, "vocab": 300}
    config = {"model": model, "ffn": {"kind": "dense"}, "train": {"steps": 1}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert (
        pretrain.main(["--config", str(tmp_path / "c.json"), f"run.dir={tmp_path}/run"]) == exit_codes.FAILED
    )
    words = "run.dir = x: x: Stale file handle; the disk or its server failed, start again"
    assert capfd.readouterr().err == f"pretrain.py: error: {words}\n"
    assert json.loads((tmp_path / "end.json").read_text())["code"] == exit_codes.FAILED
