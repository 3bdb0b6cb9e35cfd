"""Every shipped tiling, compiled for chips that need not be here, in bf16 and as it would be for a 2048 or
4096 wide layer: tensor cores are used, shared memory suffices, no register spills.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_cases.py")
# bytes of shared memory that a program may have (CUDA C programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Both chips' compilations, side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        chip: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(chip)],
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(f"cache{chip}"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for chip in SHARED
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("chip", SHARED)
def test_every_tiling(started: dict[int, subprocess.Popen[str]], chip: int) -> None:
    out, errors = started[chip].communicate(timeout=500)
    assert started[chip].returncode == 0, errors
    kernels = [json.loads(line) for line in out.splitlines()]
    assert len(kernels) > 50
    problems = []
    for kernel in kernels:
        if kernel["spilled"] != 0:
            problems.append(f"{kernel['name']}: {kernel['spilled']} bytes of registers spilled")
        if kernel["shared"] > SHARED[chip]:
            problems.append(
                f"{kernel['name']}: {kernel['shared']} bytes of shared memory, a program may have "
                f"{SHARED[chip]}"
            )
        # every tile has at least 64 rows, or 64 of the weights' rows where few tokens are decoded
        if not kernel["wgmma" if chip >= 90 else "mma"]:
            problems.append(f"{kernel['name']}: no tensor-core instruction")
    assert not problems, "\n".join(problems)
