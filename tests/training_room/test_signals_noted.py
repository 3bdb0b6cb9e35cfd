"""Signals are noted, the first one stays, and handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sffn_dist.launch.signals import REPORT_SIGNAL, STOP_SIGNALS, SignalHandler, StopRequested
from sffn_dist.training.hooks.save_report import slow_save_warning


@pytest.fixture
def signals() -> Iterator[SignalHandler]:
    made = SignalHandler()
    yield made
    made.release()


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_the_first_stays(signals: SignalHandler, first: signal.Signals) -> None:
    signals.catch()
    signals.defer(25.0)
    assert signals.received is None
    os.kill(os.getpid(), first)
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert signals.received is first
    assert not signals.report_wanted


@pytest.mark.parametrize(
    ("seconds", "stop_seconds", "warns"),
    [(0.0, 1.0, False), (22.0, 25.0, False), (24.0, 25.0, True), (31.0, 25.0, True)],
)
def test_a_save_too_slow_for_a_stop_is_told(seconds: float, stop_seconds: float, warns: bool) -> None:
    warning = slow_save_warning(seconds, stop_seconds)
    assert (warning is not None) is warns
    if warning:
        assert f"took {seconds:.1f} s" in warning
        assert "guards.stop_seconds = 25" in warning


def test_before_training_the_first_one_interrupts(signals: SignalHandler) -> None:
    """Once: a second Ctrl-C must not interrupt the clean-up."""
    signals.catch()
    with pytest.raises(StopRequested, match="stopped by SIGINT before the first step") as stopped:
        signal.raise_signal(signal.SIGINT)
    assert stopped.value.exit_code == 130
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)


REFUSED_RANK = """
import os, signal, sys, threading
from sffn_dist.launch import cli
from sffn_dist.spec.config import ConfigError

def pretrain(*parts):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    raise ConfigError(["model.width = 3: is refused"])

sys.exit(cli.main(["--config", "configs/demo.json", "run.dir=" + sys.argv[1]], pretrain))
"""


def test_a_rank_that_waits_to_end_is_not_interrupted(tmp_path: Path) -> None:
    """The launcher ends all ranks once rank 0 has refused: no traceback, and the code of the refusal."""
    place = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_RANK, str(tmp_path / "run")],
        env=os.environ | place,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "limited"), [("SIGTERM", True), ("SIGINT", True), ("SIGUSR1", False)])
def test_who_asks_twice_kills(signals: SignalHandler, number: str, limited: bool) -> None:
    """Launchers do, after 30 seconds; Slurm's warning has a lead of its own."""
    signals.catch()
    signals.defer(25.0)
    os.kill(os.getpid(), signal.Signals[number])
    assert (signals.deadline < time.monotonic() + 25.0) is limited
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.deadline <= time.monotonic() + 25.0


def test_a_report_is_no_stop(signals: SignalHandler) -> None:
    signals.catch()
    os.kill(os.getpid(), REPORT_SIGNAL)
    assert signals.report_wanted
    assert signals.received is None


def test_handlers_are_put_back(signals: SignalHandler) -> None:
    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, REPORT_SIGNAL)]
    signals.catch()
    assert all(signal.getsignal(number) == signals._handle for number in (*STOP_SIGNALS, REPORT_SIGNAL))
    signals.release()
    signals.release()
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, REPORT_SIGNAL)] == before


def test_other_threads_handle_nothing(signals: SignalHandler) -> None:
    thread = threading.Thread(target=signals.catch)
    thread.start()
    thread.join()
    assert not signals._before
