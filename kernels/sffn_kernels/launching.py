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


def capability(device: torch.device) -> int:
    """The major compute capability of a device; for tensors without memory, of the chip that is compiled for;
    0 where the interpreter stands in for one.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    if device.type == "meta":
        from triton.runtime import driver

        return int(driver.active.get_current_target().arch) // 10
    return 0


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
