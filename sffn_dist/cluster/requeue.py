"""What follows when the ranks of a job have ended: done, back into the queue, or given up.

Standard library only.

The ranks' own record (sffn_dist/launch/exit_codes.py) states why the run ended and whether another start may
help; no record means that a rank was killed or a node died. Whatever the reason, starts that bring no new
checkpoint are counted, and after STARTS in a row it is given up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.checkpoint import manifest, run_folder
from sffn_dist.launch import exit_codes

STARTS = 3  # in a row without a new checkpoint
NEVER = (exit_codes.REFUSED, exit_codes.DIVERGED, exit_codes.REPLICAS_DIFFER)  # would end the same way again
WARNING, CANCELLED = 138, 143  # exit codes of ranks that saved at SIGUSR1, SIGTERM


@dataclass(frozen=True)
class RequeueDecision:
    """Whether the run shall be started again, and a sentence for the job's log."""

    go_on: bool
    sentence: str


def decide(code: int, asked: str, record: dict[str, Any] | None, newest: Sequence[str]) -> RequeueDecision:
    """What follows.

    ``code``: exit code of the launcher. ``asked``: the signal that the batch script was given (USR1, TERM),
    PREEMPTED, or nothing. ``record``: what the ranks left. ``newest``: the newest checkpoint's name after
    each start of this job, this one's last.
    """
    cause = int(record["code"]) if record else code
    # where no rank spoke, the code is of whichever was ended last
    why = (
        f"({exit_codes.name(cause)}): {record['reason']}"
        if record
        else f"with exit code {code}, and no rank said why"
    )
    at = f"newest checkpoint: {newest[-1] or 'none'}"
    if code == 0:
        return RequeueDecision(False, "finished")
    if cause in NEVER:
        return RequeueDecision(False, f"ended {why}; another start would end the same way")
    if asked == "TERM":
        return RequeueDecision(
            False,
            f"ended by Slurm; {at}; unless Slurm starts it again (a preemption, a lost node), submit "
            f"it to continue",
        )
    warned = asked in ("USR1", "PREEMPTED") or cause == WARNING
    if not warned and record and not record["restart"]:
        return RequeueDecision(False, f"ended {why}; {at}; submit it again to continue")
    end = "stopped before its end" if warned else f"ended {why}"
    if len(newest) >= STARTS and len(set(newest[-STARTS:])) == 1:
        return RequeueDecision(
            False, f"{end}; given up: {STARTS} starts in a row brought no new checkpoint, {at}"
        )
    return RequeueDecision(True, f"{end}; {at}; it goes on from there")


def record_end(code: int, asked: str, record: Path, history: Path, run_dir: Path) -> RequeueDecision:
    """:func:`decide` on the files of a job; adds a line about this start to ``history``."""
    end_record, newest = read_record(record), newest_checkpoint(run_dir)
    before = _newest_before(history)
    verdict = decide(code, asked, end_record, [*before, newest])
    line = {
        "start": len(before),
        "time": time.time(),
        "code": code,
        "asked": asked,
        "newest": newest,
        "end": verdict.sentence,
    }
    with suppress(OSError), history.open("a", encoding="utf-8") as file:
        file.write(strict_json.dumps(line) + "\n")
    return verdict


def read_record(path: Path) -> dict[str, Any] | None:
    """The ranks' record; None if there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {"code": int(tree["code"]), "restart": bool(tree["restart"]), "reason": str(tree["reason"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_checkpoint(run_dir: Path) -> str:
    """Name of the newest complete checkpoint, nothing where there is none; content is not read."""
    try:
        folders = run_folder.checkpoints(run_dir)
    except OSError:
        return ""
    return next((folder.name for folder in reversed(folders) if (folder / manifest.NAME).is_file()), "")


def _newest_before(history: Path) -> list[str]:
    names = []
    try:
        lines = history.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            names.append(str(json.loads(line)["newest"]))
    return names
