"""Waits that DeepSpeed asks the host for are made by the device's streams."""

from __future__ import annotations

from typing import Any

from sffn_dist.training.device_order import DeviceOrder


class Stream:
    """Notes for whom it waits."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        raise AssertionError("the host waits")


class Accelerator:
    """As DeepSpeed's."""

    def __init__(self) -> None:
        self.computing, self.Stream = Stream(), Stream

    def current_stream(self, device_index: int | None = None) -> Stream:
        return self.computing

    def synchronize(self, device_index: int | None = None) -> None:
        raise AssertionError("the host waits")

    def resolves_data_dependency(self) -> bool:
        return False


def test_the_computing_stream_waits_for_all_reductions() -> None:
    accelerator = Accelerator()
    order = DeviceOrder(accelerator)
    streams = [order.Stream(), order.Stream()]
    order.synchronize()
    assert set(accelerator.computing.waited) == set(streams)


def test_the_computing_stream_waits_for_the_stream_that_is_named() -> None:
    accelerator = Accelerator()
    order = DeviceOrder(accelerator)
    first, _ = order.Stream(), order.Stream()
    first.synchronize()
    assert accelerator.computing.waited == [first]


def test_streams_of_engines_that_are_gone_are_not_waited_for() -> None:
    accelerator = Accelerator()
    order = DeviceOrder(accelerator)
    order.Stream()
    order.synchronize()
    assert accelerator.computing.waited == []


def test_all_else_is_the_accelerators_own() -> None:
    order = DeviceOrder(Accelerator())
    assert order.resolves_data_dependency() is False
