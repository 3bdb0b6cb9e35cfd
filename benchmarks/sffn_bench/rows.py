"""One scheme of rows for every benchmark: op, provider, mode, shape, median and 20th and 80th percentile,
device, versions.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sffn_dist.spec import machine


def interleaved(
    cases: dict[str, Callable[[], float]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Times of each case, which returns its own.

    One of every case in turn, so that a busy moment meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            spent = case()
            if repeat >= warmup:
                times[name].append(spent)
    return times


def figures(value: float) -> float:
    """The value to six significant figures: layers take from microseconds to minutes."""
    return float(f"{value:.6g}")


def device() -> str:
    """What the times were taken on: the CUDA device's own name, else what is known of the CPU."""
    ranks = machine.ranks_here()
    return torch.cuda.get_device_name() if machine.cuda_capability(ranks) else machine.device_name(ranks)


def row(
    op: str, provider: str, mode: str, shape: dict[str, Any], seconds: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One benchmark row; times in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "op": op,
        "provider": provider,
        "mode": mode,
        **shape,
        "median_ms": figures(1e3 * statistics.median(seconds)),
        "p20_ms": figures(1e3 * fifths[0]),
        "p80_ms": figures(1e3 * fifths[3]),
        "repeats": len(seconds),
        **more,
        "device": device(),
        "torch": importlib.metadata.version("torch"),
        "megatron_core": importlib.metadata.version("megatron-core"),
    }
