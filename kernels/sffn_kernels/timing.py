"""The times of several ways to compute the same, taken so that they can be compared.

First all of them run, which compiles them: no time includes a compilation. Then the device and all ranks wait
for each other: a collective that still waits for a rank which compiles would run beside the first way that is
timed. Then they are timed in turns (a, b, c, a, b, c, ...): what slows the device for a while slows all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

WARMUP, TURNS = 2, 7
ASSUMED = 2.0  # seconds to compile a kernel and run it, before one was compiled; not measured on a GPU
_AHEAD = 500_000  # cycles, some 0.3 ms


class Clock(Protocol):
    """What times a device's work."""

    def wait(self) -> None:
        """Until the device has done all it was given."""

    def milliseconds(self, way: Callable[[], Any]) -> float:
        """That the device takes for one call."""


class CudaClock:
    """By events on the current stream of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def milliseconds(self, way: Callable[[], Any]) -> float:
        """Between two events around one call."""
        with torch.cuda.device(self.device):
            # the host gets ahead meanwhile: what it takes to launch is not measured
            torch.cuda._sleep(_AHEAD)
            self._start.record()
            way()
            self._end.record()
            self._end.synchronize()
        return self._start.elapsed_time(self._end)


def measure(
    ways: Mapping[str, Callable[[], Any]], clock: Clock, meet: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """TURNS times of each way in milliseconds; all infinite, with a warning, for a way that does not run.

    ``meet`` returns, or lets the device wait, until all ranks that share the choice have called it.

    Whatever fails fails alike in every process only by luck, so no error is let out but plain torch's: other
    ranks wait for this one's times.
    """
    failed: set[str] = set()

    def tried(name: str, run: Callable[[], float]) -> float:
        try:
            return float("inf") if name in failed else run()
        except Exception as error:
            if name == "torch":
                raise  # nothing would be left
            failed.add(name)
            _report(name, error)
            return float("inf")

    for _ in range(WARMUP):
        for name, way in ways.items():
            tried(name, partial(_once, way))
    clock.wait()
    meet()
    clock.wait()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            times[name].append(tried(name, partial(clock.milliseconds, way)))
    return {name: [float("inf")] * TURNS if name in failed else values for name, values in times.items()}


def _once(way: Callable[[], Any]) -> float:
    way()
    return 0.0


def too_large(error: Exception) -> bool:
    """Triton's OutOfResources, whose place in its package changed between versions."""
    return "OutOfResources" in type(error).__name__


def _report(name: str, error: Exception) -> None:
    if not too_large(error):
        warnings.warn(
            f"{name}: does not run here, and is left out ({type(error).__name__}: {error})", stacklevel=2
        )
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()


class Pace:
    """Seconds that a kernel took to be compiled and timed so far, for saying how long the next ones take."""

    def __init__(self) -> None:
        self.kernels, self.seconds = 0, 0.0

    def expected(self, kernels: int) -> str:
        """As words."""
        each = self.seconds / self.kernels if self.kernels else ASSUMED
        basis = "as those before" if self.kernels else "assumed"
        return f"about {kernels * each:.0f} s, {each:.1f} s a kernel {basis}"

    def timed(self, kernels: int, started: float) -> None:
        """Count kernels that were compiled and timed since ``started`` (time.monotonic)."""
        self.kernels, self.seconds = self.kernels + kernels, self.seconds + time.monotonic() - started
