"""Compiles every shipped tiling for a chip that is not here, as a script: a JSON line for each kernel, of
what was read from it.

    python compile_cases.py 90 [rest]

``rest``: those that are left out else: decoding kernels for fewer tokens than the most, and what differs
from another structure's or activation's in little.

The kernels are launched as ever, within ``launching.compiling()`` and on tensors without memory, under a
driver that only names the chip.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from typing import Any

import torch
import triton
from sffn_kernels import launching
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MODULES = ("block_diagonal_triton", "bottleneck_compiled", "mix_triton", "decode_triton")
REST = re.compile(r"decode_(\w+ (1|16) tokens|bottleneck_gelu_erf)|\w+, block_dense")


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


def read(kernel: Any, said: str) -> dict[str, Any]:
    """Shared memory in bytes, columns of tensor memory, registers, bytes spilled, and which tensor-core
    instructions there are; ``said`` by the assembler, with the options that Triton itself gives it.
    """
    ptx = kernel.asm["ptx"]
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0),
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(map(int, spilled)) if spilled else None,
        "tensor_cores": [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx],
    }


def main() -> None:
    """All kernels but the rest, or the rest."""
    driver.set_active(NamedChip(int(sys.argv[1])))
    knobs.nvidia.dump_ptxas_log = True
    rest = sys.argv[2:] == ["rest"]
    print(json.dumps({"triton": triton.__version__}), flush=True)
    for module in MODULES:
        for name, thunk in importlib.import_module(f"sffn_kernels.{module}").shipped():
            if bool(REST.match(name)) != rest:
                continue
            with launching.compiling() as kernels, contextlib.redirect_stdout(io.StringIO()) as said:
                thunk()
            (kernel,) = kernels
            print(json.dumps({"name": name, **read(kernel, said.getvalue())}), flush=True)


if __name__ == "__main__":
    main()
