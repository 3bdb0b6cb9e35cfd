"""What follows the end of a job's ranks: back into the queue or not, and until when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.checkpoint import manifest, run_folder
from sffn_dist.cluster import __main__ as questions
from sffn_dist.cluster import requeue
from sffn_dist.launch import exit_codes

NEW = ["step_00000010"]


def record(code: int) -> dict[str, Any]:
    return {"code": code, "restart": code in exit_codes.RESTARTABLE, "reason": "the reason"}


@pytest.mark.parametrize(
    ("code", "asked", "cause", "again"),
    [
        (0, "", None, False),
        (0, "USR1", None, False),  # it came with the last step
        (138, "USR1", 138, True),
        (1, "USR1", None, True),  # torchrun's own code, or the ranks had not begun
        (138, "", 138, True),  # the warning reached the ranks alone: scancel --signal=USR1
        (143, "TERM", 143, False),
        (137, "TERM", None, False),
        (143, "", 143, False),  # somebody signalled the ranks
        (143, "PREEMPTED", 143, True),
        (1, "", 1, True),
        (1, "", None, True),  # a rank was killed
        (137, "", None, True),
        (5, "", 5, True),
        (6, "", 6, True),
        *((code, asked, code, False) for code in (2, 3, 4) for asked in ("", "USR1", "PREEMPTED")),
        (2, "", None, False),  # refused before a record could be made
        (1, "", 2, False),  # torchrun hides the code
    ],
)
def test_which_ends_start_again(code: int, asked: str, cause: int | None, again: bool) -> None:
    verdict = requeue.decide(code, asked, record(cause) if cause is not None else None, NEW)
    assert verdict.go_on == again, verdict.sentence
    if cause in (1, 2, 3, 4, 5, 6) and not asked:
        assert "the reason" in verdict.sentence
        assert exit_codes.name(cause) in verdict.sentence


def test_given_up_after_three_starts_without_a_new_checkpoint() -> None:
    for asked in ("", "USR1", "PREEMPTED"):  # a limit too short to reach a step is no better than a crash
        assert requeue.decide(1, asked, record(1), ["", ""]).go_on
        assert not requeue.decide(1, asked, record(1), ["", "", ""]).go_on
        assert requeue.decide(1, asked, record(1), ["", "", "a", "a"]).go_on
        assert requeue.decide(1, asked, record(1), ["a", "a", "b"]).go_on
        told = requeue.decide(1, asked, record(1), ["a", "b", "b", "b"])
        assert not told.go_on
        assert "given up: 3 starts in a row brought no new checkpoint" in told.sentence


def complete(run: Path, step: int) -> None:
    folder = run_folder.folder_of(run, step)
    folder.mkdir(parents=True)
    (folder / manifest.NAME).write_text("{}")


def test_starts_are_counted_in_the_jobs_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, history, told = tmp_path / "run", tmp_path / "starts.jsonl", tmp_path / "end.json"

    def ended(code: int = 1) -> int:
        words = [
            "ended",
            "--code",
            str(code),
            "--asked",
            "",
            "--record",
            told,
            "--history",
            history,
            "--run-dir",
            run,
        ]
        return questions.main([str(word) for word in words])

    assert [ended(), ended()] == [questions.GO_ON] * 2
    complete(run, 5)
    run_folder.folder_of(run, 9).mkdir()  # torn: no manifest
    assert [ended(), ended(), ended()] == [questions.GO_ON, questions.GO_ON, questions.LEAVE]
    assert "given up" in capsys.readouterr().out
    complete(run, 10)
    assert ended() == questions.GO_ON
    told.write_text(json.dumps(record(exit_codes.DIVERGED)))
    assert ended(3) == questions.LEAVE
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["newest"] for line in lines] == ["", "", *["step_00000005"] * 3, *["step_00000010"] * 2]
    assert [line["start"] for line in lines] == list(range(7))
    history.write_text("torn\n" + history.read_text())
    told.write_text("{")
    assert ended(0) == questions.LEAVE


def test_the_record_is_what_a_rank_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "end.json"
    monkeypatch.setenv(exit_codes.VARIABLE, str(path))
    exit_codes.record(exit_codes.HUNG, "rank 3 hung")
    assert requeue.read_record(path) == {"code": exit_codes.HUNG, "restart": True, "reason": "rank 3 hung"}
    assert requeue.read_record(tmp_path / "none") is None
    assert (exit_codes.for_signal(10), exit_codes.for_signal(15)) == (requeue.WARNING, requeue.CANCELLED)
