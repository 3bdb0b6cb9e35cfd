"""Starts ``compile_cases.py`` for several chips side by side, and says what is wrong with its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_cases.py")
# bytes of shared memory that a program may have (CUDA C programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns, on compute capability 10.0
TENSOR_CORES = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma"}}
# The first: half as many outputs at a time spill none, but make the wide features twice as often. The second:
# what spills none here spills by the other Triton; the other tilings of the operation do not.
SPILLED = {
    (90, "3.9.0", "through, block_shuffle swiglu triton:64x16x512w8s2"): 32,
    (80, "3.7.1", "decode_bottleneck_gelu 64 tokens triton:32x64x64w4s3"): 112,
}
Processes = dict[int, "subprocess.Popen[str]"]


@contextmanager
def started(cache: Path, *arguments: str, first_on_path: Path | None = None) -> Iterator[Processes]:
    """A process for each chip; ``first_on_path``: a folder with another Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if first_on_path is not None:
        environment["PYTHONPATH"] = str(first_on_path)
    processes = {
        chip: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(chip), *arguments],
            env={**environment, "TRITON_CACHE_DIR": str(cache / str(chip))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for chip in SHARED
    }
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def problems(processes: Processes, chip: int, least: int, version: str | None = None) -> list[str]:
    """Of a chip's kernels, which must be at least so many, compiled by this version of Triton."""
    out, errors = processes[chip].communicate(timeout=500)
    assert processes[chip].returncode == 0, errors
    compiler, *kernels = [json.loads(line) for line in out.splitlines()]
    assert version in (None, compiler["triton"])
    assert len(kernels) >= least
    found = []
    for kernel in kernels:
        if kernel["spilled"] != SPILLED.get((chip, compiler["triton"], kernel["name"]), 0):
            found.append(f"{kernel['name']}: {kernel['spilled']} bytes of registers spilled")
        if kernel["shared"] > SHARED[chip]:
            found.append(
                f"{kernel['name']}: {kernel['shared']} bytes of shared memory, a program may have "
                f"{SHARED[chip]}"
            )
        if kernel["tensor_memory"] > TENSOR_MEMORY:
            found.append(f"{kernel['name']}: {kernel['tensor_memory']} columns of tensor memory")
        # every tile has at least 64 rows, or 64 of the weights' rows where few tokens are decoded
        if not TENSOR_CORES[chip] & set(kernel["tensor_cores"]):
            found.append(f"{kernel['name']}: no tensor-core instruction of sm_{chip}")
    return found
