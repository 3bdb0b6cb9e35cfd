"""Signals are noted, the first one stays, and handlers are put back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sffn_dist.training.signals import ASKING, STOPPING, Signals


@pytest.fixture
def signals() -> Iterator[Signals]:
    made = Signals()
    yield made
    made.release()


@pytest.mark.parametrize("first", STOPPING)
def test_the_first_stays(signals: Signals, first: signal.Signals) -> None:
    signals.catch()
    assert signals.received is None
    os.kill(os.getpid(), first)
    for number in STOPPING:
        os.kill(os.getpid(), number)
    assert signals.received is first
    assert not signals.report_wanted


def test_a_report_is_no_stop(signals: Signals) -> None:
    signals.catch()
    os.kill(os.getpid(), ASKING)
    assert signals.report_wanted
    assert signals.received is None


def test_handlers_are_put_back(signals: Signals) -> None:
    before = [signal.getsignal(number) for number in (*STOPPING, ASKING)]
    signals.catch()
    assert all(signal.getsignal(number) == signals._note for number in (*STOPPING, ASKING))
    signals.release()
    signals.release()
    assert [signal.getsignal(number) for number in (*STOPPING, ASKING)] == before


def test_other_threads_handle_nothing(signals: Signals) -> None:
    thread = threading.Thread(target=signals.catch)
    thread.start()
    thread.join()
    assert not signals._before
