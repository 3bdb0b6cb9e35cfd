"""Times that can be compared: nothing compiled is timed, ways take turns, and noise decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sffn_kernels import choices, timing
from sffn_kernels.choices import choose


class Device:
    """A device whose time goes by as ways run on it, and a note of what happened in which order."""

    def __init__(self) -> None:
        self.now, self.notes = 0.0, list[str]()

    def wait(self) -> None:
        self.notes.append("wait")

    def meet(self) -> None:
        self.notes.append("meet")

    def milliseconds(self, way: Callable[[], Any]) -> float:
        self.notes.append("time")
        before = self.now
        way()
        return self.now - before

    def way(self, name: str, takes: float) -> Callable[[], None]:
        """Compiles at its first call, for 1000 ms."""
        compiled = []

        def run() -> None:
            self.notes.append(name)
            self.now += takes if compiled else 1000.0
            compiled.append(True)

        return run


def test_all_are_compiled_before_ranks_meet_and_then_timed_in_turns() -> None:
    device = Device()
    ways = {"torch": device.way("torch", 2.0), "a": device.way("a", 3.0), "b": device.way("b", 1.0)}
    times = timing.measure(ways, device, device.meet)
    assert times == {"torch": [2.0] * 7, "a": [3.0] * 7, "b": [1.0] * 7}
    meeting = device.notes.index("meet")
    assert device.notes[:meeting] == [*["torch", "a", "b"] * timing.WARMUP, "wait"]
    assert device.notes[meeting + 1] == "wait", "nothing is timed before the device has met the others too"
    assert device.notes[meeting + 2 :] == ["time", "torch", "time", "a", "time", "b"] * timing.TURNS


@pytest.mark.parametrize("fails_at", [1, 5])
def test_what_does_not_run_is_left_out(fails_at: int) -> None:
    """No compiler, say, on one of the ranks: others wait for its times."""
    device, calls = Device(), []

    def fail() -> None:
        calls.append(1)
        if len(calls) >= fails_at:
            raise RuntimeError("Failed to find C compiler")

    ways = {"torch": device.way("torch", 2.0), "x": fail}
    with pytest.warns(UserWarning, match=r"x: does not run here.*C compiler"):
        times = timing.measure(ways, device, device.meet)
    assert times == {"torch": [2.0] * 7, "x": [float("inf")] * 7}
    assert len(calls) == fails_at, "tried no more"
    assert choose(times).way == "torch"
    with pytest.raises(RuntimeError, match="C compiler"):
        timing.measure({"torch": lambda: fail()}, device)


def test_noise_larger_than_the_difference_leaves_the_preferred() -> None:
    noisy = {"torch": [1.0, 1.3, 0.9, 1.2, 1.1, 1.0, 1.2], "a": [1.2, 0.8, 0.9, 1.1, 1.0, 1.2, 0.9]}
    choice = choose(noisy)
    assert (choice.way, choice.fastest) == ("torch", "a")
    assert str(choice).startswith("torch, preferred: a is faster by 0.1 ms, within the spread of 0.25 ms")
    assert choose(dict(reversed(noisy.items()))).way == "a", "the first, whichever it is"
    quiet = {"torch": [1.1, 1.11, 1.1, 1.12, 1.1, 1.1, 1.1], "a": [1.0, 1.0, 1.01, 1.0, 1.0, 1.02, 1.0]}
    assert choose(quiet).way == "a"
    outlier = {**quiet, "a": [9.0, *quiet["a"][1:]]}
    assert choose(outlier).way == "a", "one time that something else disturbed"
    assert choose(outlier).times["a"].most == 9.0
    between = {"torch": [2.0] * 7, "a": [1.0, 1.1] * 3 + [1.0], "b": [1.0] * 7}
    assert choose(between).way == "a", "of kernels alike in time, the first"


def test_where_none_runs_the_first_is_left() -> None:
    assert choose({"a": [float("inf")] * 7, "b": [float("inf")] * 7}).way == "a"


def test_real_work_under_a_real_clock() -> None:
    """Products of 16 and of 768 columns, by what this thread computed: others' work does not count."""

    class Processor:
        def wait(self) -> None:
            return

        def milliseconds(self, way: Callable[[], Any]) -> float:
            before = time.thread_time()
            way()
            return 1e3 * (time.thread_time() - before)

    large, small = torch.ones(768, 768), torch.ones(16, 16)
    ways = {"torch": lambda: large @ large, "a": lambda: small @ small}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        choice = choose(timing.measure(ways, Processor()))
    finally:
        torch.set_num_threads(threads)
    assert choice.way == choice.fastest == "a"
    assert choice.times["a"].least <= choice.times["a"].median <= choice.times["a"].most


def test_a_table_keeps_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A Card (80GB)")
    choices.device_name.cache_clear()
    table = {"op": choose({"torch": [1.0, 1.3, 0.9], "a": [1.2, 0.8, 0.9], "b": [float("inf")] * 3})}
    choices.write(torch.device("cuda"), table, tmp_path)
    assert choices.read(tmp_path / "a_card_80gb.json") == table
    row = json.loads((tmp_path / "a_card_80gb.json").read_text())["rows"]["op"]
    assert row["times"]["torch"] == pytest.approx({"median": 1.0, "least": 0.9, "most": 1.3, "spread": 0.2})
    assert "b" not in row["times"]
    choices.device_name.cache_clear()
