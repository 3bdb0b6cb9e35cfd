"""What this machine is: accelerators and bf16 units, asked without importing torch. Standard library only."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Literal

# Compute capability from which CUDA devices have bf16 units (Ampere).
_BF16_CAPABILITY = (8, 0)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@cache
def cuda() -> tuple[int, int, int] | None:
    """(visible devices, compute capability of the first: major, minor) by the driver, None without CUDA or
    with a CPU build of torch.
    """
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return None
        driver = ctypes.CDLL("libcuda.so.1")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, 0):
        return None
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, 0)
    return count.value, major.value, minor.value


def is_rocm() -> bool:
    """Whether torch was built for AMD devices, which it shows under the name of CUDA."""
    try:
        return "+rocm" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def device_memory(ranks: int | None = None) -> int | None:
    """Bytes of this rank's CUDA device in all, by the driver; None if the ranks run on the CPU."""
    if cuda_capability(ranks) is None:
        return None
    return _total_memory(int(os.environ.get("LOCAL_RANK", "0")))


@cache
def _total_memory(local_rank: int) -> int | None:
    found = cuda()
    if found is None:
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    device, size = ctypes.c_int(), ctypes.c_size_t()
    if driver.cuDeviceGet(ctypes.byref(device), local_rank % found[0]):
        return None
    if driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
        return None
    return size.value


def ranks_here(otherwise: int = 1) -> int:
    """Ranks that the launcher started on this node; ``otherwise`` without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or otherwise)


def devices_suffice(devices: int, ranks: int) -> bool:
    """True if every one of a node's ranks has a CUDA device: its own among them, or the one that Slurm shows
    to each task.

    Ranks that would share devices run on the CPU, and the plan says so: the demo's two ranks run anywhere.
    """
    return devices >= ranks or (devices == 1 and "SLURM_LOCALID" in os.environ)


def cuda_capability(ranks: int | None = None) -> tuple[int, int] | None:
    """Compute capability of the devices that this node's ranks run on, None if they run on the CPU."""
    cuda_info = cuda()
    return cuda_info[1:] if cuda_info and devices_suffice(cuda_info[0], ranks or ranks_here()) else None


@cache
def cpu_has_bf16() -> bool:
    """True if the processor multiplies bf16 matrices by itself; without, bf16 is 10-50x slower than fp32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    wanted = {"bf16", "svebf16"} if platform.machine() == "aarch64" else {"avx512_bf16", "amx_bf16"}
    return not words.isdisjoint(wanted)


def precision(setting: Literal["auto", "bf16", "fp32"], ranks: int | None = None) -> Literal["bf16", "fp32"]:
    """What "auto" means here: bf16 on CUDA devices and CPUs with bf16 units, else fp32."""
    if setting != "auto":
        return setting
    capability = cuda_capability(ranks)
    able = capability >= _BF16_CAPABILITY if capability else cpu_has_bf16()
    return "bf16" if able else "fp32"


def triton_unavailable(ranks: int | None = None) -> str | None:
    """Why this node's ranks cannot run Triton's kernels; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    capability = cuda_capability(ranks)
    if capability is None:
        return f"needs a CUDA device for each rank, and this is {device_name(ranks)}"
    if capability < _BF16_CAPABILITY:
        return "needs compute capability {}.{}, and this device has {}.{}".format(
            *_BF16_CAPABILITY, *capability
        )
    return None


def device_name(ranks: int | None = None) -> str:
    """What this node's ranks run on, for the plan."""
    cuda_info, capability = cuda(), cuda_capability(ranks)
    if capability:
        return f"cuda, compute capability {capability[0]}.{capability[1]}"
    cpu = f"cpu, {cores()} cores{', bf16 units' if cpu_has_bf16() else ''}"
    if not cuda_info:
        return cpu
    devices = f"only {cuda_info[0]} CUDA device{'s' * (cuda_info[0] > 1)}"
    return f"{cpu}: {devices} for {ranks or ranks_here()} ranks; running on CPU"


def cores() -> int:
    """Cores this process may use."""
    return len(core_set())


def core_set() -> frozenset[int]:
    """Which cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_shares(places: Sequence[tuple[str, frozenset[int]]]) -> list[int]:
    """Of ranks at (host, the cores that each may use): how many cores each has for itself, 1 at least.

    A core is shared by the ranks that may use it: all of a node's, or, where Slurm bound each task to its
    own cores, one.
    """
    users = Counter((host, core) for host, held in places for core in held)
    return [max(1, int(sum(Fraction(1, users[host, core]) for core in held))) for host, held in places]


def compute_capability() -> tuple[int, int] | None:
    """Of this node's first NVIDIA device, by NVML, which does not start CUDA; None where it cannot be had."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlInit_v2():
        return None
    failed = nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) or (
        nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    )
    nvml.nvmlShutdown()
    return None if failed else (major.value, minor.value)
