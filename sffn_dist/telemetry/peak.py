"""Peak dense bf16 FLOP/s of devices, for model FLOPs utilisation (MFU). Vendors' data sheets, without sparsity."""

from __future__ import annotations

PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a CUDA device by its name; None if the table does not know it."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
