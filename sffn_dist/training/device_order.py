"""Waits between streams of a CUDA device that the device keeps by itself, where DeepSpeed lets the host wait.

ZeRO 2 and 3 reduce gradients on a stream of their own. Before the gradients are used, and before memory that
the reduction reads is given back, DeepSpeed waits on the host until the device has done all its work: nothing
is launched meanwhile, and the device runs dry once a micro-step and once a bucket. What is used next is used
by the stream that computes, and memory that is given back is written next by that stream, so it is enough
that this stream waits for the reduction's.
"""

from __future__ import annotations

import weakref
from typing import Any


class DeviceOrder:
    """DeepSpeed's accelerator with other waits; all else is the accelerator's own."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def Stream(self, *arguments: Any, **options: Any) -> Any:  # noqa: N802  (the accelerator's name)
        """A stream that the host does not wait for: to synchronize with it makes the current stream wait."""
        accelerator = self._accelerator

        class OrderedStream(accelerator.Stream):  # type: ignore[misc,name-defined]
            def synchronize(self) -> None:
                accelerator.current_stream().wait_stream(self)

        stream = OrderedStream(*arguments, **options)
        self._streams.add(stream)
        return stream

    def synchronize(self, device_index: int | None = None) -> None:
        """The current stream waits for every stream made here."""
        for stream in self._streams:
            self._accelerator.current_stream(device_index).wait_stream(stream)
