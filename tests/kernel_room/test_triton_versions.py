"""The kernels under both versions of Triton that environments come to: `make test-versions`.

PyPI's torch 2.13 brings 3.7.1; beside torch's CPU build, which brings none, pip installs 3.9.0. The one that
is not installed lies in a folder of its own below build/, put there by pip --target, and is put before the
environment's packages in processes of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT, ROOM = Path(__file__).parents[2], Path(__file__).parent
FOLDER = Path(os.environ.get("VERSIONS_FOLDER", ROOT / "build" / "versions"))
VERSIONS = ("3.7.1", "3.9.0")
IN_THE_INTERPRETER = [
    str(ROOM / f"test_{name}.py") for name in ("block_diagonal_triton", "bottleneck", "decode", "mix")
]

pytestmark = pytest.mark.versions


def folder_of(version: str) -> Path | None:
    """Where this Triton lies, installed at its first use; None for the environment's own."""
    if importlib.metadata.version("triton") == version:
        return None
    target = FOLDER / f"triton-{version}"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        partial = target.with_name(f".{target.name}")
        subprocess.run([*command, "--target", str(partial), f"triton=={version}"], check=True)
        partial.rename(target)
    return target


def _compiling() -> Any:
    spec = importlib.util.spec_from_file_location("compiling", ROOM / "compiling.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tiling_compiles(version: str, tmp_path: Path) -> None:
    compiling = _compiling()
    with compiling.started(tmp_path, first_on_path=folder_of(version)) as processes:
        problems = {
            chip: compiling.problems(processes, chip, least=50, version=version) for chip in compiling.SHARED
        }
    assert not any(problems.values()), problems


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_in_the_interpreter(version: str) -> None:
    folder = folder_of(version)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    name = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(name, capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == version
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *IN_THE_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=540)
    print(f"triton {version}: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
