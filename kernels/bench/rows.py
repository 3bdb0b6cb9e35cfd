"""One scheme of rows for every benchmark: op, provider, mode, shape, median and 20th and 80th percentile, device, versions."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sffn_dist import machine


def interleaved(cases: dict[str, Callable[[], float]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Times of each case, which returns its own; one of every case in turn, so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            spent = case()
            if repeat >= warmup:
                times[name].append(spent)
    return times


def row(op: str, provider: str, mode: str, shape: dict[str, Any], seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """One benchmark row; times in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "op": op,
        "provider": provider,
        "mode": mode,
        **shape,
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "p20_ms": round(1e3 * fifths[0], 3),
        "p80_ms": round(1e3 * fifths[3], 3),
        "repeats": len(seconds),
        **more,
        "device": machine.device_name(machine.ranks_here()),
        "torch": importlib.metadata.version("torch"),
        "megatron_core": importlib.metadata.version("megatron-core"),
    }
