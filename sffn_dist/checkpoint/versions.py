"""What wrote a checkpoint: versions of the packages, revision of the code. Standard library only."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # megatron-core takes seconds to import, and a conversion has no ranks
    pass


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computed the weights."""
    installed = {"python": sys.version.split()[0]}
    for name in ("sffn_dist", "torch", "megatron-core", "deepspeed", "safetensors"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "unknown"
    return installed


@functools.cache  # of the code that runs, not of what lies there when a later checkpoint is saved
def revision() -> str | None:
    """The git revision of the code, "+" after it if it was changed since."""
    package_dir = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=package_dir, capture_output=True, text=True, timeout=10
        )
        state = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=package_dir,
            capture_output=True,
            text=True,
            timeout=10,
        )
        if head.returncode == 0:
            return head.stdout.strip() + ("+" if state.stdout.strip() else "")
    return None
