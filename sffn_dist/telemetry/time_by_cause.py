"""Where a step's time goes, from the events of a profiler: a pure function of them.

What runs is the device: on CUDA its kernels, on a CPU the operators of the thread that takes the steps. Each
nanosecond of a step is charged to one cause:

    compute runs                      the part of the model whose operator it is, forward or backward; the
                                      optimizer; the accumulation of gradients
    only communication runs           communication, exposed: on CUDA NCCL's kernels while no other kernel
                                      runs, on a CPU the thread waits for a collective
    nothing runs, a batch is awaited  data
    nothing runs                      idle: the host between two operators or kernels

Communication that runs beside compute costs no time; it is told apart, as hidden.

An operator belongs to the innermost range (a module's forward) that it runs in. One of the backward pass
belongs to what made its autograd node: the forward operator of the same thread and sequence number; a node
without one (of the second that an operator made) to the nearest one before. A kernel belongs to the operator
that launched it. Standard library only.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sffn_dist.telemetry.intervals import difference, intersection, overlap, union

STEP = "ProfilerStep#"  # + number: the range of a step
WAITING = "wait for a collective"  # the range in which the host waits
NODE = "autograd::engine::evaluate_function"  # the operator around a node of the backward pass
COLLECTIVES = ("c10d::", "_c10d_functional::")


class Kind(enum.Enum):
    """What an event is."""

    RANGE = "range"  # named by us or a library
    OPERATOR = "operator"
    LAUNCH = "launch"  # of a kernel, by the host
    COLLECTIVE = "collective"  # on a thread of the communication library
    KERNEL = "kernel"  # or copy, on the device


class Cause(enum.Enum):
    """What time is spent on, in the order of the table."""

    STRUCTURED_FFN = "structured FFN"
    DENSE_FFN = "dense FFN"
    ATTENTION = "attention"
    OUTPUT_LAYER = "output layer"
    LOSS = "loss"
    REST = "embedding, norms, rest"
    GRADIENTS = "gradient accumulation"
    OPTIMIZER = "optimizer"
    EXPOSED = "communication, exposed"
    DATA = "data"
    IDLE = "idle"


PARTS_OF_MODEL = frozenset(list(Cause)[:6])


@dataclass(frozen=True, slots=True)
class Event:
    """One event; times in ns."""

    name: str
    kind: Kind
    start: int
    end: int
    thread: int  # of the host, by the profiler's count; of a kernel: its stream
    number: int = 0  # an operator's own, a launch's own
    operator: int = 0  # a kernel's: number of the operator that launched it, 0: unknown
    launch: int = 0  # a kernel's: number of its launch
    sequence: int = -1  # of the autograd node that an operator makes or runs
    forward_thread: int = 0  # that made the node which an operator runs


class Share(NamedTuple):
    """What time is charged to; ``backward`` only tells parts of the model apart."""

    cause: Cause
    backward: bool = False


@dataclass(frozen=True)
class TimeByCause:
    """Sums over ``steps``; ns."""

    steps: tuple[int, ...]
    step_times: tuple[int, ...]
    shares: Mapping[Share, int]  # their sum is that of step_times
    hidden: int


class _OpenEvent(NamedTuple):
    """A host event that is open, with what the events around it make of it."""

    end: int
    share: Share
    runs: bool  # an operator is open, not only ranges
    in_backward: bool


_BOTTOM = _OpenEvent(2**63, Share(Cause.REST), runs=False, in_backward=False)


@dataclass
class _Host:
    """The host's events, and what its operators belong to."""

    events: Mapping[int, Sequence[Event]]  # by thread, each by start, the outer ones first
    regions: Mapping[str, Cause]
    _made: dict[int, tuple[list[int], list[Cause]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for thread, events in self.events.items():
            made: dict[int, Cause] = {}
            for event, frame in self._frames(events):
                if event.kind is Kind.OPERATOR and event.sequence >= 0 and not frame.in_backward:
                    made[event.sequence] = frame.share.cause  # the last one of a number makes the node
            numbers = sorted(made)
            self._made[thread] = numbers, [made[number] for number in numbers]

    def numbered(self) -> tuple[dict[int, Share], dict[int, Share]]:
        """What operators and launches belong to, by their numbers."""
        operators: dict[int, Share] = {}
        launches: dict[int, Share] = {}
        for events in self.events.values():
            for event, frame in self._frames(events):
                if not event.number:
                    continue
                if event.kind is Kind.OPERATOR:
                    operators[event.number] = frame.share
                elif event.kind is Kind.LAUNCH:
                    launches[event.number] = frame.share
        return operators, launches

    def timeline(self, thread: int) -> Iterator[tuple[int, int, Share]]:
        """The thread's time, from its first event to its last, by the innermost event."""
        stack = [_BOTTOM]
        now = 0

        def until(time: int) -> Iterator[tuple[int, int, Share]]:
            nonlocal now
            while stack[-1].end <= time:
                top = stack.pop()
                if top.end > now:
                    yield now, top.end, _spent(top)
                    now = top.end
            if time > now:
                yield now, time, _spent(stack[-1])
                now = time

        for event in self.events.get(thread, ()):
            yield from until(event.start)
            stack.append(self._frame(event, stack[-1]))
        yield from until(max((frame.end for frame in stack[1:]), default=now))

    def _frames(self, events: Sequence[Event]) -> Iterator[tuple[Event, _OpenEvent]]:
        stack = [_BOTTOM]
        for event in events:
            while stack[-1].end <= event.start and len(stack) > 1:
                stack.pop()
            stack.append(self._frame(event, stack[-1]))
            yield event, stack[-1]

    def _frame(self, event: Event, outer: _OpenEvent) -> _OpenEvent:
        end = min(event.end, outer.end)
        cause, in_backward, runs = outer.share.cause, outer.in_backward, outer.runs
        if event.kind is Kind.RANGE:
            cause = Cause.EXPOSED if event.name == WAITING else self.regions.get(event.name, cause)
        elif event.kind is Kind.OPERATOR:
            runs = True
            if event.name.startswith(NODE):
                in_backward = True
                cause = Cause.GRADIENTS if "AccumulateGrad" in event.name else self._maker(event)
            elif event.name.startswith(COLLECTIVES):
                cause = Cause.EXPOSED
        return _OpenEvent(end, Share(cause, in_backward and cause in PARTS_OF_MODEL), runs, in_backward)

    def _maker(self, node: Event) -> Cause:
        numbers, causes = self._made.get(node.forward_thread, ([], []))
        index = bisect_right(numbers, node.sequence) - 1
        return causes[index] if index >= 0 else Cause.REST


def _spent(frame: _OpenEvent) -> Share:
    """What the host's time in this event is charged to."""
    if frame.runs or frame.share.cause in (Cause.EXPOSED, Cause.DATA):
        return frame.share
    return Share(Cause.IDLE)


def attribute(events: Iterable[Event], regions: Mapping[str, Cause]) -> TimeByCause:
    """Charge the time of all steps (ranges named STEP + number) to causes.

    ``regions``: names of ranges -> what runs inside. Kernels, where there are any, are what runs; else the
    operators of the steps' thread. ValueError without a step.
    """
    threads: dict[int, list[Event]] = defaultdict(list)
    kernels, collectives = [], []
    for event in events:
        if event.kind is Kind.KERNEL:
            kernels.append(event)
        elif event.kind is Kind.COLLECTIVE:
            collectives.append(event)
        else:
            threads[event.thread].append(event)
    for own in threads.values():
        own.sort(key=lambda event: (event.start, -event.end))
    steps = sorted(
        (event for own in threads.values() for event in own if event.name.startswith(STEP)),
        key=lambda event: event.start,
    )
    if not steps:
        raise ValueError(f"there is no range {STEP}N among the events")
    host = _Host(threads, regions)
    charged = list(host.timeline(steps[0].thread))
    busy = [(event.start, event.end) for event in collectives]
    if kernels:
        charged, busy = _device_timeline(kernels, host, charged)
    windows = [(step.start, step.end) for step in steps]
    shares: dict[Share, int] = defaultdict(int)
    for start, end, share in charged:
        if time := overlap([(start, end)], windows):
            shares[share] += time
    lengths = tuple(end - start for start, end in windows)
    shares[Share(Cause.IDLE)] += sum(lengths) - sum(shares.values())  # before and after all that runs
    exposed = [(start, end) for start, end, share in charged if share.cause is Cause.EXPOSED]
    inside = intersection(union(busy), windows)
    return TimeByCause(
        tuple(int(step.name.removeprefix(STEP)) for step in steps),
        lengths,
        {share: time for share, time in shares.items() if time},
        sum(end - start for start, end in inside) - overlap(inside, union(exposed)),
    )


def _device_timeline(
    kernels: Sequence[Event], host: _Host, on_host: Sequence[tuple[int, int, Share]]
) -> tuple[list[tuple[int, int, Share]], list[tuple[int, int]]]:
    """The device's time, and when it communicates. Of kernels that run together the newest is charged."""
    operators, launches = host.numbered()
    compute: list[tuple[int, int, Share]] = []
    communication: list[tuple[int, int]] = []
    for kernel in kernels:
        share = operators.get(kernel.operator) or launches.get(kernel.launch) or Share(Cause.REST)
        if kernel.name.startswith("nccl") or share.cause is Cause.EXPOSED:
            communication.append((kernel.start, kernel.end))
        else:
            compute.append((kernel.start, kernel.end, share))
    charged = list(_newest(compute))
    computing = union([(start, end) for start, end, _ in charged])
    exposed = difference(union(communication), computing)
    running = union([*computing, *exposed])
    waited = union([(start, end) for start, end, share in on_host if share.cause is Cause.DATA])
    charged += [(start, end, Share(Cause.EXPOSED)) for start, end in exposed]
    charged += [(start, end, Share(Cause.DATA)) for start, end in difference(waited, running)]
    return charged, communication


def _newest(spans: Sequence[tuple[int, int, Share]]) -> Iterator[tuple[int, int, Share]]:
    """Spans that do not overlap: where several do, the one that began last."""
    open_spans: list[tuple[int, int, Share]] = []  # by start
    now = 0

    def until(time: int) -> Iterator[tuple[int, int, Share]]:
        nonlocal now
        while open_spans and now < time:
            end = min(open_spans[-1][1], time)
            if end > now:
                yield now, end, open_spans[-1][2]
                now = end
            if open_spans[-1][1] <= now:
                open_spans.pop()

    for span in sorted(spans, key=lambda span: span[0]):
        yield from until(span[0])
        now = max(now, span[0])
        open_spans.append(span)
    yield from until(max((end for _, end, _ in open_spans), default=now))
