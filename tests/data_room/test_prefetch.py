"""Batches read ahead are those of the step that takes them, whatever was expected."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sffn_dist.data.prefetch import Prefetch


def reader(value: int, threads: list[str]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        threads.append(threading.current_thread().name)
        return np.full((2, 3), value)

    return read


def test_what_was_read_ahead_is_taken() -> None:
    threads: list[str] = []
    prefetch = Prefetch(torch.device("cpu"))
    prefetch.start(5, reader(5, threads))
    assert prefetch.take(5, reader(-1, threads)).tolist() == [[5] * 3] * 2
    assert threads == ["prefetch"]


def test_another_step_than_expected_is_read_when_it_is_taken() -> None:
    threads: list[str] = []
    prefetch = Prefetch(torch.device("cpu"))
    prefetch.start(5, reader(5, []))
    assert prefetch.take(3, reader(3, threads)).tolist() == [[3] * 3] * 2
    assert threads == [threading.current_thread().name]
    # and what was read for another one is forgotten
    assert prefetch.take(5, reader(7, threads)).tolist() == [[7] * 3] * 2


def test_nothing_waits_before_it_is_taken() -> None:
    go = threading.Event()
    prefetch = Prefetch(torch.device("cpu"))

    def read() -> np.ndarray:
        assert go.wait(60.0)
        return np.zeros(1)

    prefetch.start(0, read)
    go.set()
    assert prefetch.take(0, read).tolist() == [0.0]


def test_an_error_of_the_thread_is_raised_where_the_batch_is_taken() -> None:
    def read() -> np.ndarray:
        raise OSError(5, "Input/output error")

    prefetch = Prefetch(torch.device("cpu"))
    prefetch.start(0, read)
    with pytest.raises(OSError, match="Input/output error"):
        prefetch.take(0, read)
