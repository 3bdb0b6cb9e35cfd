"""Which rank is the slow one, and what is it that the others wait for? Reported on demand, for all ranks,
while the run goes on.

Each rank notes of its last steps (seconds)

    data     waiting for its batches
    compute  from the step's start to the end of its last forward pass, without that waiting: its own work,
             before the last exchange of gradients makes all ranks equally late
    wait     in the agreement with the others at the step's end
    step     all of it

which costs some calls of a clock; :func:`report` gathers the medians when a report is requested. What levels
``compute`` too: tensor-parallel ranks exchange activations in every layer, so a group is as slow as its
slowest rank; so is everybody under ZeRO 3, which gathers weights in the forward pass, and under ZeRO 2 with
several micro-steps, whose gradients are exchanged in each. There the rate of matrix products, measured then
and there, tells the ranks apart.

On CUDA the host runs ahead of the device, and ``compute`` means something only in steps that were
synchronised (``StepTimers.precise``): one of these is enough, and the others are left out of that column.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sffn_dist.parallel.object_collectives import all_gather_object
from sffn_dist.parallel.topology import Topology
from sffn_dist.telemetry.events import EventLog
from sffn_dist.telemetry.peak import measured_flops

WINDOW = 64  # steps
REQUEST = "report"  # a file of this name in run_dir requests a report
LOG = "ranks.jsonl"
# of a straggler: robust standard deviations, x median seconds; x median rate
DEVIATIONS, COMPUTE, PRODUCTS = 3.0, 1.15, 0.85
ROBUST = 1.4826  # x the median absolute deviation is the standard deviation, of a normal distribution
MEASURED_SECONDS = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """The report of one rank; seconds are medians of its last steps, None where nothing was noted."""

    rank: int
    host: str
    device: str
    data: float | None
    compute: float | None
    wait: float | None
    step: float | None
    # of the rank's share of a step's tokens, those of a tensor-parallel group shared out
    tokens_per_s: float | None
    peak_bytes: int  # of the device's memory; on CPU, resident
    flops: float  # FLOP/s of matrix products, now


class StepTimers:
    """A rank's last steps.

    In each step: begin, data while a batch is waited for, forwarded after each forward pass, waiting, end.

    ``precise``: set before a step's begin, it waits for the device at every mark of that step; on CPU every
    step is precise.
    """

    def __init__(self, device: torch.device, window: int = WINDOW):
        self.precise = False
        self._cuda = device.type == "cuda"
        self._device = device
        self._data, self._wait, self._step = (deque[float](maxlen=window) for _ in range(3))
        self._compute = deque[float](
            maxlen=1 if self._cuda else window
        )  # precise steps are rare: the one before may be hours old
        self._began = self._forwarded = self._in_data = self._in_wait = 0.0
        self._data_before = 0.0  # of _in_data, what came before the end of the last forward pass

    def begin(self) -> None:
        """A step starts; one that was begun and not ended is forgotten."""
        self._began = self._forwarded = self._now()
        self._in_data = self._in_wait = self._data_before = 0.0

    def data(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that each is waited for is noted."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._in_data += time.perf_counter() - began
            yield batch

    @property
    def data_wait(self) -> float:
        """Seconds of the newest step that its batches were waited for."""
        return self._in_data

    def forwarded(self) -> None:
        """A forward pass has ended; the step's last one counts."""
        self._forwarded, self._data_before = self._now(), self._in_data

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for others."""
        began = self._now()
        yield
        self._in_wait += self._now() - began

    def end(self) -> None:
        """The step is over, and counts."""
        self._step.append(self._now() - self._began)
        self._data.append(self._in_data)
        self._wait.append(self._in_wait)
        if self.precise or not self._cuda:
            self._compute.append(max(0.0, self._forwarded - self._began - self._data_before))

    def medians(self) -> dict[str, float | None]:
        """Seconds of data, compute, wait and step."""
        durations = {"data": self._data, "compute": self._compute, "wait": self._wait, "step": self._step}
        return {name: statistics.median(values) if values else None for name, values in durations.items()}

    def _now(self) -> float:
        if self._cuda and self.precise:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


# ----------------------------------------------------------------------------------------------------- report


def report(timers: StepTimers, topology: Topology, tokens_per_step: int, precision: str) -> list[Row]:
    """One row a rank, the same list on all, which all call between two steps.

    Takes some 0.3 s, for the matrix products.
    """
    device = topology.device
    medians = timers.medians()
    step = medians["step"]
    own_row = Row(
        rank=topology.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        tokens_per_s=tokens_per_step / topology.world_size / step if step else None,
        peak_bytes=peak_bytes(device),
        flops=max(
            measured_flops(device, precision, MEASURED_SECONDS) for _ in range(3)
        ),  # a moment's neighbour is no straggler
        **medians,
    )
    return all_gather_object(own_row)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of its CUDA device as torch counts it, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def stragglers(rows: Sequence[Row]) -> dict[int, str]:
    """Slow ranks -> why: ``compute`` above median + 3 x 1.4826 MAD and above 1.15 x median, or matrix
    products below 0.85 x median.

    MAD is the median distance from the median. The rate's median is the upper one of an even number: of two
    ranks, the faster's.
    """
    reasons: dict[int, list[str]] = {}
    compute_times = [(row.rank, row.compute) for row in rows if row.compute is not None]
    if compute_times:
        usual = statistics.median(seconds for _, seconds in compute_times)
        spread = ROBUST * statistics.median(abs(seconds - usual) for _, seconds in compute_times)
        for rank, seconds in compute_times:
            if seconds > usual + DEVIATIONS * spread and seconds > COMPUTE * usual:
                reasons.setdefault(rank, []).append(
                    f"computes for {seconds:.3g} s a step, the median is {usual:.3g} s"
                )
    rate = statistics.median_high(row.flops for row in rows) if rows else 0.0
    for row in rows:
        if row.flops < PRODUCTS * rate:
            text = f"multiplies matrices at {row.flops / 1e12:.3g} TFLOP/s, the median is {rate / 1e12:.3g}"
            reasons.setdefault(row.rank, []).append(text)
    return {rank: " and ".join(reasons[rank]) for rank in sorted(reasons)}


def render(rows: Sequence[Row]) -> str:
    """The table, and a line for each straggler."""
    host = max([4, *(len(row.host) for row in rows)])
    device = max([6, *(len(row.device) for row in rows)])
    head = f"{'rank':>5}  {'host':<{host}}  {'device':<{device}}"
    lines = [
        head
        + "".join(
            f"{name:>10}"
            for name in ("data s", "compute s", "wait s", "step s", "tokens/s", "peak GB", "TFLOP/s")
        )
    ]
    for row in rows:
        cells = [_cell(value) for value in (row.data, row.compute, row.wait, row.step, row.tokens_per_s)]
        cells += [_cell(row.peak_bytes / 1e9), _cell(row.flops / 1e12)]
        lines.append(
            f"{row.rank:>5}  {row.host:<{host}}  {row.device:<{device}}"
            + "".join(f"{cell:>10}" for cell in cells)
        )
    hosts = {row.rank: row.host for row in rows}
    lines += [
        f"straggler: rank {rank} on {hosts[rank]} {reason}" for rank, reason in stragglers(rows).items()
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write(run_dir: Path, step: int, rows: Sequence[Row]) -> None:
    """Append the report to run_dir/ranks.jsonl as one line; a disk that cannot be written is a warning.

    Rank 0 calls it.
    """
    late = {str(rank): reason for rank, reason in stragglers(rows).items()}
    EventLog(run_dir / LOG).write("report", step, ranks=[asdict(row) for row in rows], stragglers=late)


def requested(run_dir: Path) -> bool:
    """Whether there is the file run_dir/report; it is removed.

    Rank 0 looks, every 2 s at most: on a network disk it takes 1 ms.
    """
    try:
        (run_dir / REQUEST).unlink()
    except OSError:
        return False
    return True
