"""What devices can do at best by the vendors' data sheets: for model FLOPs utilisation (MFU), and for bounds
on times. Standard library only.

A device is looked up by the name that its driver has for it, or by a part of that: "NVIDIA H100 80GB HBM3"
and "h100" are found under "H100". The first entry that fits counts, so longer names stand first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Dense bf16 FLOP/s, without sparsity.
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

# Bytes/s of the device's memory; A100s differ by more than their name's first part.
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

# Bytes/s that a device receives from the others of its node, one direction: NVLink or Infinity Fabric, PCIe
# x16 (generation 5: 64e9, 4: 32e9) where it has none or only bridges of pairs.
PEAK_LINK = {
    "GH200": 450e9,
    "H200": 450e9,
    "H100 PCIe": 64e9,
    "H100 NVL": 64e9,
    "H100": 450e9,
    "H800 PCIe": 64e9,
    "H800": 200e9,
    "A100 80GB PCIe": 32e9,
    "A100-PCIE": 32e9,
    "A100": 300e9,
    "A800": 200e9,
    "B200": 900e9,
    "MI300X": 448e9,
    "MI300A": 384e9,
    "L40S": 32e9,
    "A40": 32e9,
    "RTX 4090": 32e9,
}


def _of(device_name: str, table: Mapping[str, float]) -> float | None:
    found = (
        peak
        for name, peak in table.items()
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)
    )
    return next(found, None)


def peak_memory(device_name: str) -> float | None:
    """Bytes/s between a CUDA device and its memory, by its name; None where the table knows nothing."""
    return _of(device_name, PEAK_MEMORY)


def peak_link(device_name: str) -> float | None:
    """Bytes/s that a device receives from others of its node, by its name; None where the table knows
    nothing.
    """
    return _of(device_name, PEAK_LINK)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a CUDA device by its name; None where the table knows nothing: another device, or fp32."""
    if precision != "bf16":
        return None
    return _of(device_name, PEAK_BF16)
