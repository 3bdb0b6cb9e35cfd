"""Events as a Chrome trace, which Perfetto and chrome://tracing show.

Kineto's own writer holds Python's lock for all of it (a run's heartbeat would stop for seconds), needs the
whole text on disk before it is compressed, and says nothing of a full disk. Standard library only.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sffn_dist.telemetry.time_by_cause import NODE, Event, Kind

_DEVICE_LINE = 1_000_000  # + stream: where the device's lines stand, apart from the host's
_HOUR = 3_600_000_000_000  # ns: ranks that start in the same one have the same zero, so traces can be joined
_LINES = 1000  # written at a time


def write_trace(path: Path, events: Sequence[Event], rank: int) -> None:
    """``path`` ends in .gz. Raises OSError."""
    zero = min((event.start for event in events), default=0) // _HOUR * _HOUR
    head = {"displayTimeUnit": "ms", "baseTimeNanoseconds": zero, "distributedInfo": {"rank": rank}}
    rows = _rows(events, rank, zero)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        file.write(json.dumps({"ph": "M", "name": "process_name", "pid": rank, "args": _name(rank)}))
        while chunk := list(itertools.islice(rows, _LINES)):
            file.write("".join(",\n" + json.dumps(row, separators=(",", ":")) for row in chunk))
        file.write("\n]}\n")


def _name(rank: int) -> dict[str, str]:
    return {"name": f"rank {rank}"}


def _rows(events: Sequence[Event], rank: int, zero: int) -> Iterator[dict[str, Any]]:
    makers = {
        (event.thread, event.sequence): event
        for event in events
        if event.kind is Kind.OPERATOR and event.sequence >= 0 and not event.forward_thread
    }
    launches = {event.number: event for event in events if event.kind is Kind.LAUNCH}
    for line in sorted({_line(event) for event in events}):
        text = f"thread {line}" if line < _DEVICE_LINE else f"stream {line - _DEVICE_LINE}"
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": line, "args": {"name": text}}
    for arrow, event in enumerate(events):
        yield _row(event, rank, zero)
        source = launches.get(event.launch) if event.kind is Kind.KERNEL else None
        if event.name.startswith(NODE):
            source = makers.get((event.forward_thread, event.sequence))
        if source:
            name = "launch" if event.kind is Kind.KERNEL else "forward to backward"
            for phase, end in (("s", source), ("f", event)):
                at = {"ts": (end.start - zero) / 1000, "pid": rank, "tid": _line(end)}
                yield {"ph": phase, "bp": "e", "id": arrow, "name": name, "cat": name, **at}


def _row(event: Event, rank: int, zero: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ph": "X",
        "cat": event.kind.value,
        "name": event.name,
        "pid": rank,
        "tid": _line(event),
        "ts": (event.start - zero) / 1000,
        "dur": (event.end - event.start) / 1000,
    }
    facts = {"sequence": event.sequence} if event.sequence >= 0 else {}
    if event.operator:
        facts["operator"] = event.operator
    elif event.kind is Kind.OPERATOR:
        facts["number"] = event.number
    return {**row, "args": facts} if facts else row


def _line(event: Event) -> int:
    return event.thread + (_DEVICE_LINE if event.kind is Kind.KERNEL else 0)
