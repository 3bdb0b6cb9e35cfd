"""Compiles every shipped tiling for a chip that is not here, as a script: a JSON line for each kernel, of
what was read from it.

    python compile_cases.py 90 [module ...]

The kernels are launched as ever, within ``launching.compiling()`` and on tensors without memory, under a
driver that only names the chip.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
from sffn_kernels import launching
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MODULES = ("block_diagonal_triton", "bottleneck_compiled", "mix_triton", "decode_triton")


class NamedChip:
    """What Triton asks a driver when it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def assembler(capability: int) -> str:
    """The ptxas that Triton itself takes for the chip."""
    from triton.backends.nvidia import compiler

    found: Any = compiler.get_ptxas(capability)
    return str(found.path if hasattr(found, "path") else found[0])


def read(kernel: Any, capability: int) -> dict[str, Any]:
    """Shared memory in bytes, registers, bytes spilled, and which tensor-core instructions there are."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        chip = f"sm_{capability}{'a' * (capability >= 90)}"
        command = [assembler(capability), "-v", "--gpu-name", chip, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "shared": kernel.metadata.shared,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(map(int, spilled)) if spilled else None,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
    }


def main() -> None:
    """All kernels of the modules named, or of all."""
    capability = int(sys.argv[1])
    driver.set_active(NamedChip(capability))
    for module in sys.argv[2:] or MODULES:
        for name, thunk in importlib.import_module(f"sffn_kernels.{module}").shipped():
            with launching.compiling() as kernels:
                thunk()
            for kernel in kernels:
                print(json.dumps({"name": name, **read(kernel, capability)}), flush=True)


if __name__ == "__main__":
    main()
