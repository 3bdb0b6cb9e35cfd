"""Which implementation runs: settings, tables, measured crossovers, ranks that agree."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sffn_kernels import choices, dispatch, timing
from sffn_kernels.choices import KernelChoice

X = torch.zeros(3)
WAYS = {"slow": lambda: "slow", "quick": lambda: "quick"}


class Card:
    """Stands in for a tensor on a CUDA device: only its kind and its dtype are asked."""

    device, dtype = torch.device("cuda", 0), torch.float16


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """A CUDA device as dispatch sees one, whose ways take as long as this says."""
    times = {"torch": 2.0, "slow": 3.0, "quick": 1.0}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A Card (80GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    times["measured"] = 0

    class NamedTimes:
        def __init__(self, device: torch.device) -> None:
            assert device == Card.device

        def wait(self) -> None:
            return

        def milliseconds(self, way: Callable[[], str]) -> float:
            times["measured"] += 1
            return times[way()]

    monkeypatch.setattr(dispatch._DispatchState, "clock", NamedTimes)
    monkeypatch.setattr(dispatch._DispatchState, "among_kernels", {})
    choices.device_name.cache_clear()
    monkeypatch.setattr(dispatch._DispatchState, "table", None)
    yield times
    choices.device_name.cache_clear()


def chosen(tokens: int = 100, like: object = Card) -> str:
    return dispatch.run("op", (tokens, 8), like, lambda: "torch", lambda: WAYS)  # type: ignore[arg-type]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"kernels = 'cuda': must be one of auto, torch, triton"):
        dispatch.use("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.using("triton"):
        assert chosen(like=X) == "slow", "the first, where nothing can be measured"
        assert chosen(like=X.double()) == "torch"
        with pytest.raises(RuntimeError, match="bf16"):
            chosen(like=X.bfloat16())
    with dispatch.using("torch"):
        assert chosen(like=X) == "torch"
    assert chosen(like=X) == "torch", "auto on a CPU"


def test_what_is_computed_on_the_host_beside_a_device_is_plain(card: dict[str, float]) -> None:
    with dispatch.using("triton"):
        assert chosen(like=X) == "torch"


def test_a_choice_that_no_longer_fits_falls_back(card: dict[str, float]) -> None:
    class OutOfResourcesError(Exception):
        pass

    def grown() -> str:
        raise OutOfResourcesError

    dispatch._DispatchState.table = {"op float16 128x8": KernelChoice("quick", "quick")}
    assert (
        dispatch.run("op", (100, 8), Card, lambda: "torch", lambda: {"slow": lambda: "slow", "quick": grown})
        == "torch"
    )  # type: ignore[arg-type, type-var]
    assert dispatch._DispatchState.table == {"op float16 128x8": KernelChoice("torch", "torch")}


def test_several_ranks_that_do_not_agree_measure_nothing(
    card: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_alone", lambda: False)
    assert chosen() == "torch"
    assert card["measured"] == 0
    dispatch._DispatchState.table = {"op float16 128x8": KernelChoice("quick", "quick")}
    assert chosen() == "quick", "by a table"


def test_a_table_of_another_triton_is_not_used(card: dict[str, float], tmp_path: Path) -> None:
    assert chosen() == "quick"
    (file,) = (tmp_path / "sffn_dist" / "kernels").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "triton": "3.0"}))
    dispatch._DispatchState.table = None
    card.update(quick=9.0)
    assert chosen() == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_asking_for_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="kernels = 'triton': Triton needs a CUDA device"):
        dispatch.use("triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        dispatch.use("triton")
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert (
        dispatch.unavailable(torch.device("cuda")) == "needs compute capability 8.0, and this device has 7.5"
    )


def test_what_is_fastest_is_kept(card: dict[str, float], tmp_path: Path) -> None:
    assert chosen() == "quick"
    card.update(quick=9.0)
    assert chosen() == "quick", "measured once"
    assert chosen(tokens=128) == "quick", "tokens count by the power of two above them"
    assert chosen(tokens=129) == "torch", "measured anew: plain torch is best now"
    (file,) = (tmp_path / "sffn_dist" / "kernels").iterdir()
    assert file.name == "a_card_80gb.json"
    rows = json.loads(file.read_text())["rows"]
    assert {row: entry["way"] for row, entry in rows.items()} == {
        "op float16 128x8": "quick",
        "op float16 256x8": "torch",
    }
    quick = {"median": 1.0, "least": 1.0, "most": 1.0, "spread": 0.0}
    assert rows["op float16 128x8"]["times"]["quick"] == quick
    dispatch._DispatchState.table = None  # another process
    card.update(quick=9.0, torch=8.0)
    assert chosen() == "quick"


def test_a_table_for_a_device_is_made_anew(card: dict[str, float], tmp_path: Path) -> None:
    assert chosen() == "quick"
    card.update(quick=9.0)
    another = KernelChoice("torch", "slow", {"torch": choices.Times(1.0, 0.9, 1.1, 0.1)})
    choices.write(Card.device, {"another float16 1x8": another}, tmp_path)
    with dispatch.measuring_into(tmp_path):
        assert chosen() == "torch"
    rows = choices.read(tmp_path / "a_card_80gb.json")
    assert {row: choice.way for row, choice in rows.items()} == {
        "another float16 1x8": "torch",
        "op float16 128x8": "torch",
    }
    assert rows["another float16 1x8"] == another
    assert chosen() == "quick", "what runs here is as it was"


def test_triton_alone_is_the_best_of_its_tilings(card: dict[str, float], tmp_path: Path) -> None:
    card.update(torch=0.1)
    with dispatch.using("triton"):
        assert [chosen() for _ in range(3)] == ["quick"] * 3
    assert card["measured"] == 2 * timing.TURNS, "once"
    assert chosen() == "torch", "what was best without torch was not kept as the best"


def test_a_tiling_too_large_for_the_chip_is_never_chosen(card: dict[str, float]) -> None:
    card.update(quick=float("inf"))
    assert chosen() == "torch"
    with dispatch.using("triton"):
        assert chosen(tokens=1000) == "slow"


def test_nothing_is_measured_within_a_graph_capture(
    card: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "torch"
    assert not dispatch._DispatchState.table


DAMAGED = (
    *("", "[]", '{"rows": 3}', '{"rows": {"op float16 128x8": 3}}', "\xff"),
    '{"rows": {"op float16 128x8": {"way": "slow", "fastest": 3, "times": {}}}}',
    '{"rows": {"op float16 128x8": {"way": "slow", "fastest": "slow", "times": {"slow": {"median": 1}}}}}',
)


def test_unmeasured_nothing_is_timed_and_no_kernel_of_a_table_compiled(card: dict[str, float]) -> None:
    dispatch._DispatchState.table = {"op float16 128x8": KernelChoice("quick", "quick")}
    with dispatch.unmeasured():
        assert chosen() == chosen(tokens=7) == "torch"
        with dispatch.using("triton"):
            assert chosen() == "slow", "the first tiling"
    assert card["measured"] == 0
    assert chosen() == "quick", "as before"


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_left_aside(card: dict[str, float], text: str) -> None:
    text = text.replace('{"rows"', json.dumps({"triton": choices.triton_version()})[:-1] + ', "rows"')
    folder = choices.cache_folder()
    folder.mkdir(parents=True)
    (folder / "a_card_80gb.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="not a table of kernels"):
        assert chosen() == "quick"
    assert json.loads((folder / "a_card_80gb.json").read_text())["rows"]


def test_choices_of_an_earlier_version_are_measured_anew_and_said(card: dict[str, float]) -> None:
    """They were a name alone, timed while other ranks' collectives might run."""
    folder = choices.cache_folder()
    folder.mkdir(parents=True)
    earlier = {"triton": choices.triton_version(), "rows": {"op float16 128x8": "slow", "b": "torch"}}
    (folder / "a_card_80gb.json").write_text(json.dumps(earlier))
    with pytest.warns(UserWarning, match=r"2 choices of an earlier version have no spread .* measured anew"):
        assert chosen() == "quick"
    rows = json.loads((folder / "a_card_80gb.json").read_text())["rows"]
    assert [(row, entry["way"]) for row, entry in rows.items()] == [("op float16 128x8", "quick")]


def test_what_is_timed_is_announced_and_its_result_said(
    card: dict[str, float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch._DispatchState, "pace", timing.Pace())
    with caplog.at_level("INFO", logger="sffn_kernels"):
        assert chosen() == "quick"
        chosen()
    before, after = caplog.messages
    assert before == (
        "kernels: op float16 128x8: timing 2 Triton kernels and plain torch, "
        "about 4 s, 2.0 s a kernel assumed"
    )
    assert after == "kernels: op float16 128x8: quick, the fastest (medians in ms: torch 2, slow 3, quick 1)"
    assert "s a kernel as those before" in dispatch._DispatchState.pace.expected(3)


def test_a_table_may_name_what_is_no_more(card: dict[str, float]) -> None:
    dispatch._DispatchState.table = {"op float16 128x8": KernelChoice("gone", "gone")}
    assert chosen() == "quick"


def test_the_cache_may_be_read_only(card: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert chosen() == "quick"


def test_ranks_decide_together(card: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's own times do not decide, those that all made of them do; and all start from one table."""
    agreed = [value for value in (1.0, 5.0, 6.0) for _ in range(timing.TURNS)]  # torch, slow, quick
    try:
        dispatch.agree_by(lambda times: agreed)
        assert chosen() == "torch"
        slow = {"op float16 1024x8": KernelChoice("slow", "slow")}
        dispatch.shared_table(torch.device("cuda"), lambda table: slow)
        assert chosen(tokens=1000) == "slow"
    finally:
        dispatch.agree_by(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_a_run_that_asks_for_triton_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-X",
        "importtime",
        "sffn_dist/pretrain.py",
        "--config",
        "configs/demo.json",
        "kernels=triton",
    ]
    command += ["parallel.tensor=1", f"run.dir={tmp_path}"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "error: kernels = triton: needs a CUDA device for each rank, and this is cpu" in result.stderr
    assert "| torch\n" not in result.stderr
