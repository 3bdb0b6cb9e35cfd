"""What torch's profiler recorded -> events (time_by_cause.py).

Kineto links a kernel to the operator that was open when the host launched it, and by a number of its own to
the call that launched it. gloo records each collective on the thread that does it. Ranges that Kineto draws
on the device's lines are left out: they repeat the host's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sffn_dist.telemetry.time_by_cause import Event, Kind

_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_GLOO = "gloo:"


def read_events(recorded: Iterable[Any], recording: int = 0) -> list[Event]:
    """``recorded``: ``kineto_results.events()`` of a profiler that was stopped.

    ``recording``: the profiler's own number, where events of several go together: each numbers its events
    from 1.
    """
    base = recording << 40
    events: list[Event] = []
    threads: dict[int, int] = {}  # the system's number -> the profiler's
    launches: list[Any] = []
    for item in recorded:
        activity = item.activity_type()
        if activity in _KERNELS:
            events.append(_kernel(item, base))
        elif activity in _LAUNCHES:
            launches.append(item)
        elif activity in ("cpu_op", "user_annotation"):
            if not item.is_async():
                threads[item.device_resource_id()] = item.start_thread_id()
                events.append(_host(item, Kind.OPERATOR if activity == "cpu_op" else Kind.RANGE, base))
            elif item.name().startswith(_GLOO):
                events.append(_host(item, Kind.COLLECTIVE, base))
    for item in launches:
        if item.device_resource_id() in threads:
            thread = threads[item.device_resource_id()]
            start, number = item.start_ns(), base + item.correlation_id()
            events.append(
                Event(item.name(), Kind.LAUNCH, start, start + item.duration_ns(), thread, number=number)
            )
    return events


def _kernel(item: Any, base: int) -> Event:
    start = item.start_ns()
    return Event(
        item.name(),
        Kind.KERNEL,
        start,
        start + item.duration_ns(),
        item.device_resource_id(),
        operator=base + item.linked_correlation_id() if item.linked_correlation_id() else 0,
        launch=base + item.correlation_id(),
    )


def _host(item: Any, kind: Kind, base: int) -> Event:
    start = item.start_ns()
    return Event(
        item.name(),
        kind,
        start,
        start + item.duration_ns(),
        item.start_thread_id(),
        number=base + item.correlation_id(),
        sequence=item.sequence_nr(),
        forward_thread=item.fwd_thread_id(),
    )
