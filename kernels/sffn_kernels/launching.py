"""How a Triton kernel is started: tilings, and compiling without a device.

Imported only where Triton kernels are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with how many warps: m x n outputs, k of the summed features at a
    time.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton:{self.m}x{self.n}x{self.k}w{self.warps}s{self.stages}"


class _LaunchState:
    compiled: list[Any] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``; within :func:`compiling` only compiled, as it would be for these
    very arguments.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _LaunchState.compiled is not None:
        _LaunchState.compiled.append(kernel.warmup(*args, grid=grid, **constants, **options))
    elif all(grid):
        with torch.cuda.device_of(args[0]):  # the first argument is a tensor; nothing on the host
            kernel[grid](*args, **constants, **options)


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Collects the compiled kernels of what would be launched within.

    Its tensors may be on the meta device.
    """
    found: list[Any] = []
    _LaunchState.compiled = found
    try:
        yield found
    finally:
        _LaunchState.compiled = None
