"""Launches of kernels, and the time that a device is assumed to take for them. Standard library only.

A launch that moves n bytes through the device's memory and computes w FLOPs takes

    max(n / (memory x STREAMING), w / (peak x EFFICIENCY[unit]))

seconds; memory and peak are the data sheet's, bytes/s and FLOP/s. A collective that receives n bytes takes
n / (link x LINK). No tensor stays in the device's caches from one launch to the next, and no two launches run
at the same time. The efficiencies are assumptions: nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["matrix", "triton", "attention", "link"]

# Of the data sheet's memory bandwidth. Vendors' own copy benchmarks reach 85 to 92% of it.
STREAMING = 0.85
# Of the data sheet's FLOP/s, which a device has at its highest clock; large bf16 products draw so much power
# that it lowers that. cuBLAS is reported at 60 to 75% on an H100 SXM, above 80% on an A100.
MATRIX = 0.70
# Products of the Triton kernels: their tiles (128 x 128 x 64) are smaller than cuBLAS' and make no use of
# TMA; kernels like them are reported at 70 to 90% of cuBLAS.
TRITON = 0.55
# Flash attention 2, which torch has, uses no wgmma: with heads of 128 and 1,024 causal tokens it is reported
# at about 200 TFLOP/s on an H100. Too little for an A100, where 40 to 60% of 312 TFLOP/s are reported.
ATTENTION = 0.20
# Of a link's bandwidth in one direction: NCCL's bus bandwidth for messages of some MB.
LINK = 0.80
# Of the host, for each launch: what eager PyTorch takes for an operator with autograd is 5 to 10 us.
LAUNCH_SECONDS = 5e-6

EFFICIENCY: dict[Unit, float] = {"matrix": MATRIX, "triton": TRITON, "attention": ATTENTION}
ELEMENT = 2  # bytes of bf16


@dataclass(frozen=True)
class DeviceRates:
    """What a device does a second by its data sheet: FLOPs in bf16, bytes of its memory, bytes that it
    receives from its tensor-parallel group.
    """

    name: str
    flops: float
    memory: float
    link: float


@dataclass(frozen=True)
class Work:
    """Equal launches of a part of the model: ``bytes`` and ``flops`` of all together.

    ``recomputed`` says how many of the FLOPs compute anew what an earlier launch computed.
    """

    part: str
    launches: int
    bytes: int
    flops: int = 0
    unit: Unit = "matrix"
    recomputed: int = 0

    def seconds(self, device: DeviceRates) -> float:
        """On this device."""
        if self.unit == "link":
            return self.bytes / (device.link * LINK)
        computing = self.flops / (device.flops * EFFICIENCY[self.unit])
        return max(self.bytes / (device.memory * STREAMING), computing)

    def times(self, count: int) -> Work:
        """The same ``count`` times over."""
        return replace(
            self,
            launches=self.launches * count,
            bytes=self.bytes * count,
            flops=self.flops * count,
            recomputed=self.recomputed * count,
        )


def passes(part: str, elements: int, count: int, launches: int = 1, size: int = ELEMENT) -> Work:
    """Elementwise operations and sums: ``count`` reads and writes of so many elements of ``size`` bytes."""
    return Work(part, launches, elements * count * size)


def small(part: str, launches: int) -> Work:
    """Launches over a number a token or less: only the host's time for them counts."""
    return Work(part, launches, 0)


def product(part: str, tokens: int, inputs: int, outputs: int) -> Work:
    """One of the three products of a dense y = W x (y, dL/dx, dL/dW): two of x, W and y are read, the third
    is written.

        bytes = e (T inputs + inputs outputs + T outputs)      FLOPs = 2 T inputs outputs
    """
    weights = inputs * outputs
    moved = tokens * inputs + weights + tokens * outputs
    return Work(part, 1, moved * ELEMENT, 2 * tokens * weights)


def within(direction: str, works: Iterable[Work]) -> Iterator[Work]:
    """The works, their parts named by the direction of the pass."""
    return (replace(work, part=f"{direction} {work.part}") for work in works)


def again(works: Iterable[Work]) -> Iterator[Work]:
    """The works, done once more."""
    return (replace(work, recomputed=work.flops) for work in works)


def total_seconds(works: Iterable[Work], device: DeviceRates) -> float:
    """One after the other."""
    return sum(work.seconds(device) for work in works)
