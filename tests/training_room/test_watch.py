"""What is told and how it ends, when ranks fail, go, stop or hang: real processes and a real store, no
model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sffn_dist.health.watchdog import is_consequence

CASES = Path(__file__).with_name("watch_cases.py")
Scenes = Callable[[str], Any]


@pytest.fixture(scope="module")
def scenes(nursery: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Scenes:
    """``scenes(name)``: its outcome. Those of all tests that were chosen are played at the first one's."""
    folder = tmp_path_factory.mktemp("scenes")
    chosen = [item for item in request.session.items if item.path == request.path]
    names = [name for item in chosen for name in getattr(item.obj, "scenes", ())]
    outcomes = nursery(CASES, "play", folder=str(folder), names=names)

    def outcome(name: str) -> Any:
        events = folder / name / "events.jsonl"
        record = folder / name / "end.json"
        return SimpleNamespace(
            **outcomes[name],
            folder=folder / name,
            errors=[
                line for text in outcomes[name]["printed"] for line in text.splitlines() if "error: " in line
            ],
            events=[json.loads(line) for line in events.read_text().splitlines()] if events.exists() else [],
            record=json.loads(record.read_text()) if record.exists() else None,
            stacks={path.name: path.read_text() for path in (folder / name).glob("stacks/*/rank_*.txt")},
        )

    return outcome


def played(*names: str) -> Callable[[Any], Any]:
    """Marks a test with the scenes that it asks for."""

    def mark(function: Any) -> Any:
        function.scenes = names
        return function

    return mark


@played("ends")
def test_an_end(scenes: Scenes) -> None:
    """Nothing is told, and rank 0, which serves the store, waits for who ends seconds later than
    lost_seconds.
    """
    ends = scenes("ends")
    assert ends.codes == [0, 0, 0]
    assert ends.printed == ["", "", ""]
    assert ends.ended[0] >= float((ends.folder / "stopped_2").read_text()) > ends.ended[1] + 3.0
    assert (
        sorted(
            path.name for path in ends.folder.iterdir() if path.is_dir() or path.suffix.startswith(".json")
        )
        == []
    )


@played("one_fails", "alone")
def test_an_exception(scenes: Scenes) -> None:
    """The rank that failed tells it, once; all leave with its code, and what they had printed is not lost."""
    failed = scenes("one_fails")
    assert failed.codes == [1, 1, 1]
    host = failed.record.pop("host")
    assert failed.errors == [f"pretrain.py: error: rank 2 on {host}: ValueError: it is broken"]
    assert failed.printed[:2] == ["rank 0 printed this\n", "rank 1 printed this\n"]
    assert failed.printed[2].startswith("rank 2 printed this\nTraceback (most recent call last):\n")
    assert failed.printed[2].count("Traceback") == 1
    failed.record.pop("time")
    reason = f"rank 2 on {host}: ValueError: it is broken"
    assert failed.record == {"code": 1, "name": "exception", "restart": True, "reason": reason, "rank": 2}
    (event,) = failed.events
    assert (event["event"], event["step"], event["code"], event["message"]) == ("ended", 7, 1, reason)
    assert not failed.stacks
    alone = scenes("alone")
    assert alone.codes == [1]
    assert alone.errors == ["pretrain.py: error: ValueError: it is broken"]


@played("two_fail")
def test_two_fail_and_one_tells(scenes: Scenes) -> None:
    both = scenes("two_fail")
    assert both.codes == [1, 1, 1]
    assert sum(text.count("Traceback") for text in both.printed) == len(both.errors) == len(both.events) == 1


@played("consequence", "no_consequence")
def test_broken_connections_are_told_as_what_broke_them(scenes: Scenes) -> None:
    killed = scenes("consequence")
    assert killed.codes == [6, -9, 6]
    (error,) = killed.errors
    assert error.startswith("pretrain.py: error: rank 1 (pid ")
    assert "exited without an error message" in error
    assert not any("Connection closed" in text for text in killed.printed)
    assert killed.record["code"] == 6
    assert killed.record["restart"]
    alone = scenes("no_consequence")
    assert alone.codes == [1, 1, 1]
    assert len(alone.errors) == 1
    assert "Connection closed by peer" in alone.errors[0]


def test_what_a_broken_connection_looks_like() -> None:
    import torch.distributed as dist

    for text in ("NCCL error in: ...", "[gloo] x", "Connection reset by peer", "ProcessGroup timed out"):
        assert is_consequence(RuntimeError(text))
    assert is_consequence(dist.DistNetworkError("x"))
    assert not is_consequence(RuntimeError("shapes do not match"))
    assert not is_consequence(ValueError("gloo"))


@played("first_killed", "agent_ends", "agent_ends_late")
def test_the_server_of_the_store_is_gone(scenes: Scenes) -> None:
    """Nobody can be asked who speaks, and one does: rank 0 was killed, or torchrun's agent was."""
    killed = scenes("first_killed")
    assert killed.codes == [-9, 6, 6]
    assert len(killed.errors) == len(killed.events) == 1
    assert "rank 0 (pid" in killed.errors[0]
    agent = scenes("agent_ends")
    assert agent.codes == [6, 6, 6]
    assert len(agent.errors) == len(agent.events) == 1
    assert "store" in agent.errors[0]
    late = scenes("agent_ends_late")
    assert late.codes == [6, 0]
    assert late.errors == [
        "pretrain.py: error: the rendezvous store does not answer: its process is gone or cannot be reached"
    ]


@played("stopped")
def test_a_stopped_rank(scenes: Scenes) -> None:
    """It is named as such, and killed: launchers wait for it."""
    stopped = scenes("stopped")
    assert stopped.codes == [6, -9, 6]
    (error,) = stopped.errors
    assert "rank 1 (pid" in error
    assert "no heartbeat for 3 s (guards.lost_seconds = 3); its process is stopped" in error
    assert set(stopped.stacks) == {"rank_00000.txt", "rank_00002.txt"}
    assert stopped.seconds < 15


@played("hangs", "alone_hangs", "no_stacks", "no_folder")
def test_a_hang(scenes: Scenes) -> None:
    """Stacks of all ranks, and who is behind is named first; whatever becomes of the stacks, the reason is
    told.
    """
    hung = scenes("hangs")
    assert hung.codes == [5, 5, 5]
    (error,) = hung.errors
    host = hung.record["host"]
    behind = f"rank 1 on {host} at step 7, training, rank 0 on {host} at step 8, training, rank 2 on"
    assert f"no progress for 2 seconds (guards.hang_seconds = 2): {behind}" in error
    assert sorted(hung.stacks) == [f"rank_0000{rank}.txt" for rank in range(3)]
    assert "never_again" in hung.stacks["rank_00001.txt"]
    assert all("in wait" in hung.stacks[f"rank_0000{rank}.txt"] for rank in (0, 2))
    assert hung.record["restart"]
    assert scenes("alone_hangs").codes == [5]
    assert len(scenes("alone_hangs").errors) == 1
    for name in ("no_stacks", "no_folder"):
        assert scenes(name).codes == [5, 5, 5]
        assert len(scenes(name).errors) == 1, scenes(name).printed
        assert scenes(name).record["code"] == 5
    assert len(scenes("no_stacks").events) == 1
    assert not any("training goes on" in text for text in scenes("no_folder").printed)
    assert "never_again" in scenes("no_folder").printed[1], "where no file can be written, to standard error"


@played("slows_down", "off", "paused")
def test_no_false_alarm(scenes: Scenes) -> None:
    """Slow but not stuck; nothing watched; all stopped for a while and continued."""
    for name in ("slows_down", "off", "paused"):
        quiet = scenes(name)
        assert (quiet.codes, quiet.printed, quiet.events) == ([0, 0, 0], ["", "", ""], []), name


@played("refuses", "diverges", "library_fails")
def test_errors_with_a_code_of_their_own(scenes: Scenes) -> None:
    refused = scenes("refuses")
    assert refused.codes == [2, 2, 2]
    place = f"pretrain.py: error: rank 1 on {refused.record['host']}: "
    assert refused.printed == ["", f"{place}data.path: is not there\n{place}model.width: is odd\n", ""]
    assert not refused.record["restart"]
    diverged = scenes("diverges")
    assert diverged.codes == [3, 3, 3]
    assert "".join(diverged.printed) == "pretrain.py: error: the loss has left\n"
    library = scenes("library_fails")
    assert library.codes == [1]
    assert "Traceback" in library.printed[0], "an attribute of that name in somebody else's exception"


@played("asked")
def test_stacks_on_signal(scenes: Scenes) -> None:
    """While the main thread is in C, before the run handles signals, with over a thousand files open; and
    the run goes on.
    """
    asked = scenes("asked")
    assert asked.codes == [0, 0, 0]
    (path,) = asked.folder.glob("stacks/*/rank_00001.txt")
    assert asked.printed == ["", f"rank 1: stacks written to {path}\n", ""]
    assert "is_asked" in asked.stacks["rank_00001.txt"]
    assert len(asked.stacks) == 1


@played("interpreter_kept")
def test_a_kept_interpreter(scenes: Scenes) -> None:
    """C code that never gives the interpreter back: not even the watch runs, and it ends with a stack."""
    kept = scenes("interpreter_kept")
    assert kept.codes == [1]
    assert "keep_interpreter" in kept.printed[0]
    assert kept.printed[0].startswith("Timeout")


@played("stumbles")
def test_a_watch_that_fails_goes_on(scenes: Scenes) -> None:
    """It says so, once a rank, ends no healthy run and is there when it is needed."""
    stumbled = scenes("stumbles")
    assert stumbled.codes == [6, -9, 6]
    assert len(stumbled.errors) == 1
    assert "rank 1 (pid" in stumbled.errors[0]
    for rank in (0, 2):
        assert stumbled.printed[rank].count("KeyError: 'no such thing'") == 1


@played("full_pipe", "closed_pipe")
def test_pipes_that_nobody_reads(scenes: Scenes) -> None:
    full = scenes("full_pipe")
    assert full.codes == [5, 5, 5]
    assert len(full.errors) == 1
    closed = scenes("closed_pipe")
    assert closed.codes == [1, 1, 1]
    assert "ValueError: told all the same" in closed.errors[0]


@played("remote_hang", "remote_killed")
def test_ranks_on_other_machines(scenes: Scenes) -> None:
    """Who is first to see a hang names the rank that is behind, not one that it has not heard of."""
    hung = scenes("remote_hang")
    assert hung.codes == [5, 5, 5]
    assert (
        "rank 2 on node2 at step 7, training, rank 1 on node1 at step 8, training, rank 0 on node0"
        in hung.errors[0]
    )
    killed = scenes("remote_killed")
    assert killed.codes == [6, 6, -9]
    assert len(killed.errors) == 1
    assert "on node2: no heartbeat for 3 s" in killed.errors[0]


@played("last_fails", "last_killed", "outlives_store")
def test_at_the_end(scenes: Scenes) -> None:
    """Rank 0 is done and waits for the others: one fails, or is killed, or takes longer than rank 0 waits."""
    failed = scenes("last_fails")
    assert failed.codes == [0, 0, 1]
    assert len(failed.errors) == 1
    killed = scenes("last_killed")
    assert killed.codes == [0, 0, -9]
    assert killed.ended[0] < killed.ended[2] + 5.0, "nobody waits for a process that is gone"
    alone = scenes("outlives_store")
    assert alone.codes == [0, 0, 0]
    assert alone.printed == ["", "", ""]


def test_processes_of_other_namespaces_are_not_taken_for_gone(nursery: Any) -> None:
    """Only a process that can be seen from here can be gone from here."""
    own = os.getpid()
    began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    seen = nursery(CASES, "places", own=own)
    assert seen[:5] == [began, "", "", "", ""]
    assert seen[5:8] == ["gone", "gone", None]
    assert seen[8] in ("R", "S")
