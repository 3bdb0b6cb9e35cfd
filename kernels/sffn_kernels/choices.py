"""Which way of an operation was chosen from the times of all, and the files that keep it, one a device.

A file has a row for each operation, dtype and sizes: the way chosen, and of each way the median, the least
and the most of its times, and their spread. The spread is the interquartile range: between the quarter of the
times that are shortest and the quarter that are longest.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Times:
    """Of one way, in milliseconds."""

    median: float
    least: float
    most: float
    spread: float


@dataclass(frozen=True)
class KernelChoice:
    """A row: the way chosen, the fastest one, and the times of each that ran."""

    way: str
    fastest: str
    times: dict[str, Times] = field(default_factory=dict)

    def __str__(self) -> str:
        """For a log: what was chosen, why, and all medians."""
        medians = ", ".join(f"{name} {times.median:.4g}" for name, times in self.times.items())
        reason = "the fastest" if self.way == self.fastest else self._noise()
        return f"{self.way}, {reason} (medians in ms: {medians or 'none ran'})"

    def _noise(self) -> str:
        own, best = self.times[self.way], self.times[self.fastest]
        return (
            f"preferred: {self.fastest} is faster by {own.median - best.median:.3g} ms, within the spread of "
            f"{max(own.spread, best.spread):.3g} ms"
        )


def choose(measured: Mapping[str, Sequence[float]]) -> KernelChoice:
    """The first way that is no slower than the fastest by more than the spread of their times.

    ``measured``: the times of each way, in order of preference; infinite where it did not run.

    The fastest is the one of the smallest median. Of two ways that differ by less than the larger of their
    spreads, the times do not say which is faster; the order of preference decides, not chance.
    """
    times = {
        name: _summary(values) for name, values in measured.items() if all(math.isfinite(v) for v in values)
    }
    if not times:
        return KernelChoice(next(iter(measured)), next(iter(measured)))
    fastest = min(times, key=lambda name: times[name].median)  # the first of equals
    best = times[fastest]
    way = next(
        name
        for name, own in times.items()
        if name == fastest or own.median - best.median <= max(own.spread, best.spread)
    )
    return KernelChoice(way, fastest, times)


def _summary(values: Sequence[float]) -> Times:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median, min(values), max(values), upper - lower)


# ------------------------------------------------------------------------------------------------------ files


@cache
def device_name(device: torch.device) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


def cache_folder() -> Path:
    """Where what was measured on this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sffn_dist" / "kernels"


def triton_version() -> str | None:
    """Of the package that is installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def read(path: Path, triton: str | None = None) -> dict[str, KernelChoice]:
    """Row -> choice; none if the file was measured with another ``triton``.

    With a warning: a file that is no such table counts as empty; rows of earlier versions, which are a name
    without times, are left out.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"]
        if not isinstance(rows, dict):
            raise ValueError("rows: must be choices by names")
        if triton is not None and content.get("triton") != triton:
            return {}
        kept = {row: entry for row, entry in rows.items() if not isinstance(entry, str)}
        found = {row: _choice(entry) for row, entry in kept.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        # stacklevel 1: who reads and who writes a file are warned of it once
        warnings.warn(f"{path}: not a table of kernels, left aside ({error})", stacklevel=1)
        return {}
    if len(kept) < len(rows):
        warnings.warn(
            f"{path}: {len(rows) - len(kept)} choices of an earlier version have no spread of their times, "
            f"and are measured anew",
            stacklevel=1,
        )
    return found


def _choice(entry: Any) -> KernelChoice:
    times = {str(name): Times(**numbers) for name, numbers in entry["times"].items()}
    for numbers in times.values():
        if not all(isinstance(value, int | float) for value in asdict(numbers).values()):
            raise ValueError("times: must be numbers")
    names = entry["way"], entry["fastest"]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("way, fastest: must be names")
    return KernelChoice(*names, times)


def known(device: torch.device) -> dict[str, KernelChoice]:
    """What the package ships for a device, and over it what this machine's cache has."""
    file = f"{device_name(device)}.json" if device.type == "cuda" else "none.json"
    return {**read(TABLES / file), **read(cache_folder() / file, triton_version())}


def write(device: torch.device, table: dict[str, KernelChoice], folder: Path | None = None) -> None:
    """Replace the device's file in ``folder`` (None: the cache) in one step, its other rows kept.

    Where it cannot be written, the next process measures anew.
    """
    folder = folder or cache_folder()
    path = folder / f"{device_name(device)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = {**read(path, triton_version()), **table}
        content = {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton_version(),
            "rows": {row: asdict(choice) for row, choice in sorted(rows.items())},
        }
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
        Path(file.name).replace(path)
    except OSError:
        return
