"""What a device can do at best: for model FLOPs utilisation (MFU), and for a first bound on a run's time."""

from __future__ import annotations

import re
import time

import torch

# Dense bf16 FLOP/s, from the vendors' data sheets, without sparsity.
PEAK_BF16 = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,  # as H100, with slower links
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,  # as A100, with slower links
    "B200": 2250e12,
    "MI300X": 1307e12,
    "MI300A": 981e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
}

# Bytes/s of the device's memory, from the same data sheets; A100s differ by more than their name's first
# part.
PEAK_MEMORY = {
    "GH200": 4.0e12,  # its 96 GB model; that of 144 GB has 4.9e12
    "H200": 4.8e12,
    "H800 PCIe": 2.0e12,
    "H800": 3.35e12,
    "MI300X": 5.3e12,
    "MI300A": 5.3e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 1.555e12,
    "A800": 2.039e12,
    "B200": 8.0e12,
    "L40S": 0.864e12,
    "A40": 0.696e12,
    "RTX 4090": 1.008e12,
}


def _of(device_name: str, table: dict[str, float]) -> float | None:
    return next(
        (peak for name, peak in table.items() if re.search(rf"\b{re.escape(name)}\b", device_name)), None
    )


def peak_memory(device_name: str) -> float | None:
    """Bytes/s between a CUDA device and its memory, by its name; None where the table knows nothing."""
    return _of(device_name, PEAK_MEMORY)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a CUDA device by its name; None where the table knows nothing: another device, or fp32."""
    if precision != "bf16":
        return None
    return _of(device_name, PEAK_BF16)


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
