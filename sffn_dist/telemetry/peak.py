"""What a device does, measured; what it can do at best stands in spec/device_peaks.py."""

from __future__ import annotations

import time

import torch


def measured_flops(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products on this rank, measured for ``seconds`` after a warm-up."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    rounds, elapsed = 1, 0.0
    (a @ a).sum().item()
    while elapsed < seconds:
        rounds *= 2
        began = time.perf_counter()
        for _ in range(rounds):
            b = a @ a
        b.sum().item()  # waits for the device
        elapsed = time.perf_counter() - began
    return rounds * 2.0 * size**3 / elapsed
