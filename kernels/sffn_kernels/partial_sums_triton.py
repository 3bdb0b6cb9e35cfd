"""A sum cut among programs: each writes an fp32 partial sum into a scratch and counts itself in.

The last one adds them up.

The partial sums are always added in the same order: the result does not depend on which program was last. No
program waits for another, so they need not run at the same time.

The last program also sets its counter back to zero: a launch finds the zeros that the one before it left, and
CUDA graphs can be replayed without a memset (:func:`counters` says on which assumption).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 1 << 14
HELD = 2048  # partial sums that are in a program's registers at a time
_HELD: Any = tl.constexpr(HELD)


@triton.jit
def last_of(counter, count):
    """True in that of count programs that comes last; what the others wrote before is then visible to it."""
    tl.debug_barrier()  # one thread counts: not before all threads have written
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of(source, count, stride, e, valid, SPAN: tl.constexpr):
    """Elements e of source + i*stride summed over i < count, in an order that is always the same."""
    which = tl.arange(0, _HELD // SPAN)
    total = tl.zeros((SPAN,), tl.float32)
    for start in range(0, count, _HELD // SPAN):
        i = (start + which)[:, None]
        at = source + (i * stride + e[None, :])
        # .cg: other multiprocessors wrote this, and the L1 cache is not kept up to date
        total += tl.sum(
            tl.load(at, mask=(i < count) & valid[None, :], other=0.0, cache_modifier=".cg"), axis=0
        )
    return total


@cache
def cores(device: torch.device) -> int:
    """Multiprocessors of a device; those of an H100 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Counters that are zero for the next launch on the current stream, and that this launch must leave zero.

    They are one buffer for all launches on a stream: these come one after the other. A CUDA graph captured on
    a stream that has a buffer (because it was warmed up there) uses it, so it must not run at the same time
    as others captured there, or as launches there; captured on any other stream, it has a buffer and a memset
    for each launch.
    """
    on_cuda = device.type == "cuda"
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
    if key in _zeros and count <= COUNTERS:
        return _zeros[key]
    fresh = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=device)
    if count <= COUNTERS and not (on_cuda and torch.cuda.is_current_stream_capturing()):
        _zeros[key] = fresh
    return fresh


def shares(steps: int, wanted: int) -> tuple[int, int]:
    """Steps of a program, and programs: about as many as wanted, one at least, none without a step."""
    each = triton.cdiv(steps, max(1, min(steps, wanted)))
    return each, triton.cdiv(steps, each)


def span(elements: int) -> int:
    """Elements that :func:`sum_of` should add up at a time: the fewer, the more partial sums of each."""
    return min(512, triton.next_power_of_2(elements))
