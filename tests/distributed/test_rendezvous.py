"""Ranks find each other, or it is told which of them are missing, what cannot be reached, whose port it
is.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.parallel import rendezvous
from sffn_dist.spec.config import ConfigError

CASES = Path(__file__).with_name("rendezvous_cases.py")
Nursery = Callable[..., Any]


def test_two_ranks_meet(nursery: Nursery) -> None:
    assert nursery(CASES, "meet", world=2) == ["0 at start None and 1 at start None"] * 2


def test_missing_ranks_are_named(nursery: Nursery) -> None:
    """By rank 0, with the hosts that are there; the others, which wait a little longer, say that it has
    gone.
    """
    first, second = nursery(CASES, "meet", world=4, absent=(1, 3), patience=0.5)
    assert first == f"rank 1, 3 of 4 did not come in 0.5 seconds; there are 2, on {platform.node()}"
    assert "rank 0 went before all ranks were there" in second


def test_rank_0_goes_while_others_wait(nursery: Nursery, tmp_path: Path) -> None:
    assert "rank 0 went before all ranks were there" in nursery(CASES, "go_early", folder=str(tmp_path))[1]


def test_a_master_that_cannot_be_reached(nursery: Nursery) -> None:
    told = nursery(CASES, "reach_nobody")
    assert told.startswith("MASTER_ADDR = 127.0.0.1, MASTER_PORT = ")
    assert f"{platform.node()} cannot reach it in 1 seconds" in told
    assert "Traceback" not in told


def test_an_agents_store_holds_no_words_from_the_start_before(nursery: Nursery) -> None:
    """torchrun --max-restarts: its store outlives the ranks, with their verdict in it."""
    found = nursery(CASES, "meet_again", starts=2)
    assert found == [[f"0 at start {start} and 1 at start {start}"] * 2 for start in range(2)]


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=f"MASTER_PORT = .* is in use on {platform.node()}"):
            rendezvous.connect(0, 2, 5.0)


@pytest.mark.parametrize("port", ["", "x", "-1", "0", "65536", "29500 "])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=r"MASTER_PORT = '.*': must be a port number"):
        rendezvous.connect(0, 2)
    assert rendezvous.connect(0, 1) is not None, "one rank needs none"
