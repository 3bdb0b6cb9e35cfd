"""The pre-flight finds the odd rank: another config or revision, a folder that is not shared, wrong
values, slow devices and links.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.health import collective_check, consistency, preflight
from sffn_dist.launch.ports import free_port

CASES = Path(__file__).with_name("preflight_cases.py")
TREE: dict[str, Any] = {
    "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 300},
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1},
}

# ------------------------------------------------------------------------------------------------------ alike


def test_ranks_that_agree(ranks: Callable[..., Any]) -> None:
    assert ranks(4, 2).run(CASES, "agreed", tree=TREE, odd={}) == [["n0", "n0", "n1", "n1"]] * 4


def test_another_config_is_refused_by_its_keys(ranks: Callable[..., Any]) -> None:
    """On every rank: the dotted key, both values, the hosts that hold them."""
    other = {"overrides": {"train": {**TREE["train"], "learning_rate": 1e-3}}}
    problems = ranks(4, 2).run(CASES, "agreed", tree=TREE, odd={3: other})
    expected = (
        "ranks disagree: config: train.learning_rate = 0.0006 on n0, n1 (ranks 0-2); "
        "0.001 on n1 (rank 3), the odd one"
    )
    assert problems == [[expected]] * 4


def test_another_revision_is_refused_and_another_device_is_not(ranks: Callable[..., Any]) -> None:
    odd = {1: {"facts": {"code": "abc", "device": "Z1"}}}
    for (problem,) in ranks(2, 1).run(CASES, "agreed", tree=TREE, odd=odd):
        assert "ranks disagree: code = " in problem
        assert re.search(r'"abc, git \w+\+?" on n0 \(rank 1\)', problem)
        assert "the odd one" not in problem, "of two nobody knows which"
    for *_, warning in ranks(2, 1).run(CASES, "agreed", tree=TREE, odd={1: {"facts": {"device": "Z1"}}}):
        assert warning.startswith("devices differ")
        assert '"Z1" on n0 (rank 1)' in warning


def test_ranks_of_a_node_that_share_a_device_are_refused(ranks: Callable[..., Any]) -> None:
    """The same device on two nodes is two: hosts n0, n0, n1, n1."""

    def problems(*uuids: str) -> Any:
        cores = json.dumps(list(range(16)))
        odd = {
            rank: {"facts": {consistency.UUID: uuid, consistency.CORES: cores}}
            for rank, uuid in enumerate(uuids)
        }
        return ranks(4, 2).run(CASES, "agreed", tree=TREE, odd=odd)

    assert problems("a", "b", "a", "b") == [["n0", "n0", "n1", "n1"]] * 4
    for (problem,) in problems("a", "b", "c", "c"):
        assert problem.startswith("n1 (ranks 2-3) have one CUDA device, c: each rank needs its own")


def test_few_cores_beside_a_device_are_told(ranks: Callable[..., Any]) -> None:
    def warnings(*cores: list[int]) -> Any:
        odd = {
            rank: {"facts": {consistency.UUID: str(rank), consistency.CORES: json.dumps(held)}}
            for rank, held in enumerate(cores)
        }
        return [found[4:] for found in ranks(4, 2).run(CASES, "agreed", tree=TREE, odd=odd)]

    eight, shared = [list(range(8)), list(range(8, 16))], list(range(8))
    assert warnings(*eight, *eight) == [[]] * 4
    for (warning,) in warnings(*eight, shared[:6], shared[:6]):  # on n1 two ranks share six cores
        assert warning.startswith("cores of a rank: n1 (ranks 2-3): as few as 3; below 4 ")


def test_every_group_has_the_run_s_time_limit(ranks: Callable[..., Any]) -> None:
    for hang_seconds, minutes in ((600.0, 30), (5000.0, 167)):
        tree = {**TREE, "guards": {"hang_seconds": hang_seconds}, "parallel": {"tensor": 2}}
        assert ranks(2, 2).run(CASES, "group_limits", tree=tree) == [{60.0 * minutes}] * 2


def test_an_unshared_folder_is_refused(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Whichever side does not see the other's files; nothing is left behind."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    for (problem,) in ranks(2, 1).run(CASES, "folder", folders=[str(shared), str(own)], hosts=["n0", "n1"]):
        assert problem.startswith(f"run.dir = {str(shared)!r}: ")
        assert "a file of n0 is not seen on n1 (rank 1)" in problem
    missing = str(tmp_path / "none")
    for (problem,) in ranks(2, 1).run(CASES, "folder", folders=[missing, missing], hosts=["n0", "n1"]):
        assert "cannot be written: No such file" in problem
    seen = ranks(2, 1).run(CASES, "folder", folders=[str(shared)] * 2, hosts=["n0", "n1"], late=0.3)
    assert seen == [["rank 0 sees it"], ["rank 1 sees it"]]
    assert [*shared.iterdir(), *own.iterdir()] == []
    for (problem,) in ranks(2, 1).run(
        CASES, "folder", folders=[str(shared)] * 2, hosts=["n0", "n1"], upper=str(own)
    ):
        assert problem.endswith("what n1 (rank 1) writes there is not seen on n0")


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_differences_name_every_rank_once(values: list[str]) -> None:
    hosts = [f"n{rank // 2}" for rank in range(len(values))]
    found = consistency.differences([{"key": value, "same": 1} for value in values], hosts)
    if len(set(values)) == 1:
        assert found == {}
        return
    assert list(found) == ["key"]
    parts = found["key"].split("; ")
    for part in parts:
        value = part[1]
        assert (
            consistency.name_ranks([rank for rank, held in enumerate(values) if held == value], hosts) in part
        )
    counts = sorted((values.count(value) for value in set(values)), reverse=True)
    assert len(parts) == len(counts)
    assert found["key"].count("the odd one") == (len(parts) - 1 if counts[0] > counts[1] else 0)


def test_many_ranks_are_told_briefly() -> None:
    hosts = [f"n{rank // 8}" for rank in range(800)]
    assert consistency.name_ranks(range(800), hosts) == "n0, n1, n2, n3 and 96 more (ranks 0-799)"
    assert consistency.name_ranks([1, 3, 4, 5], hosts) == "n0 (ranks 1, 3-5)"


# --------------------------------------------------------------------------------------------------- measures


def test_the_whole_of_it(ranks: Callable[..., Any], tmp_path: Path) -> None:
    results = ranks(2, 1).run(CASES, "flight", tree={**TREE, "run": {"dir": str(tmp_path)}})
    print(results[0])
    for result in results:
        assert result["left"] == []
        assert "8 collectives right" in result["text"]
        assert result["agree"] + result["measure"] < 8.0, (
            "about 1 s of a machine of 2 cores that does nothing else"
        )


def test_every_collective_on_every_group(ranks: Callable[..., Any]) -> None:
    """World, tensor- and data-parallel groups of four ranks; a clock and a device that are off are named,
    others are not.
    """
    result = ranks(4, 2).run(
        CASES, "measured", tensor=2, hosts=["n0", "n0", "n1", "n1"], clock_off={2: 60.0, 3: 60.0}, slow=3
    )[0]
    row = result["row"]
    tried = [(trial["collective"], trial["group"]) for trial in row["collectives"]]
    assert tried == [(kind, "world") for kind in collective_check.KINDS] + [
        (kind, group) for group in ("tensor", "data") for kind in collective_check.INNER
    ]
    assert all(trial["bus_gb_per_s"] > 0 for trial in row["collectives"])
    for offset, error, wanted in zip(
        row["clock_seconds"], result["errors"], [0.0, 0.0, 60.0, 60.0], strict=True
    ):
        assert abs(offset - wanted) <= error + 1e-6
        assert error < 2.0
    clock, slow = row["warnings"]
    assert clock.startswith("the clock of n1 is 60.")
    assert "ahead of that of n0" in clock
    assert slow.startswith("slow: n1 (rank 3) multiplies matrices at 0.001 TFLOP/s, 0.50 x the median")
    assert result["text"].count("\nwarning: ") == 2


@pytest.mark.parametrize("kind", collective_check.KINDS)
def test_one_wrong_bit_is_refused(ranks: Callable[..., Any], kind: str) -> None:
    """On every rank, with the collective and the rank that has it."""
    for result in ranks(2, 1).run(CASES, "measured", tensor=1, hosts=["n0", "n1"], slow=9, corrupt=kind):
        assert (
            result["refused"][0]
            == f"pre-flight: {kind} over the world group gives wrong values on n1 (rank 1)"
        )


def test_the_flag(root: Path, tmp_path: Path) -> None:
    """pretrain.py --preflight on two ranks: 2 where their configs differ, told by rank 0; 0 and a table
    where they agree.
    """
    (tmp_path / "tiny.json").write_text(json.dumps(TREE), encoding="utf-8")

    def start(*rates: float) -> list[tuple[int, str, str]]:
        port = free_port()
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        shared |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
        command = [
            sys.executable,
            str(root / "sffn_dist/pretrain.py"),
            "--config",
            str(tmp_path / "tiny.json"),
            "--preflight",
        ]
        started = [
            subprocess.Popen(
                [*command, f"run.dir={tmp_path / 'run'}", f"train.learning_rate={rate}"],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, rate in enumerate(rates)
        ]
        pages = [process.communicate(timeout=200) for process in started]
        return [(process.returncode, *page) for process, page in zip(started, pages, strict=True)]

    (code, _, error), (other, _, _) = start(1e-3, 2e-3)
    assert (code, other) == (2, 2), error
    assert "error: ranks disagree: config: train.learning_rate = 0.001 on " in error
    (code, page, error), (other, quiet, _) = start(1e-3, 1e-3)
    assert (code, other) == (0, 0), error
    assert "8 collectives right" in page
    assert "all-to-all" in page
    assert quiet == "", "rank 0 speaks"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"], "nothing is left"


@given(st.lists(st.floats(1e6, 1e15), min_size=1, max_size=40), st.floats(0.1, 1.0))
def test_slow_ranks(rates: list[float], below: float) -> None:
    found = preflight.slow(rates, below)
    assert len(found) <= len(rates) / 2, "at least half are as fast as the median"
    assert all(rates[rank] < max(rates) for rank in found)
    assert preflight.slow([rate * 2 for rate in rates], below) == found, "it is a matter of proportion"


@given(st.integers(3, 12), st.data())
def test_a_node_with_two_slow_links_is_named(nodes: int, data: Any) -> None:
    """A slow node has two slow links, its neighbours one each; inside nodes links are a hundred times as
    fast.
    """
    size, bad = data.draw(st.integers(1, 4)), data.draw(st.integers(0, nodes - 1))
    hosts = [f"n{node}" for node in range(nodes) for _ in range(size)]
    rates = [100.0] * len(hosts)
    for node in range(nodes):
        rates[node * size] = data.draw(st.floats(0.8, 1.2))
    assert collective_check.slow_links(rates, hosts) == []
    for node in (bad, (bad + 1) % nodes):
        rates[node * size] = 0.1
    ((named, best, others),) = collective_check.slow_links(rates, hosts)
    assert [hosts[rank] for rank in named] == [f"n{bad}"] * size
    assert best == 0.1
    assert math.isclose(others, 1.0, abs_tol=0.6)


def test_one_slow_link_is_nobody_s_fault() -> None:
    assert collective_check.slow_links([1.0, 0.1, 1.0, 1.0], ["a", "b", "c", "d"]) == []
    assert collective_check.slow_links([0.1, 1.0], ["a", "b"]) == []
    assert collective_check.slow_links([1.0, 0.1, 0.1, 1.0], ["a"] * 4) == [([1], 0.1, 1.0)], (
        "ranks of one node stand for themselves"
    )
