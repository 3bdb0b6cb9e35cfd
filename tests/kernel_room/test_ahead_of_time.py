"""Every shipped tiling, compiled for chips that need not be here, in bf16 and as it would be for a 2048 or
4096 wide layer: tensor cores are used, shared memory suffices, no register spills.

Decoding kernels are compiled for 64 tokens; for fewer, and BlockDense's, in `make test-sweeps`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def _compiling() -> Any:
    path = Path(__file__).with_name("compiling.py")
    spec = importlib.util.spec_from_file_location("compiling", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiling = _compiling()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All chips' compilations, side by side."""
    with compiling.started(tmp_path_factory.mktemp("cache")) as processes:
        yield processes


@pytest.mark.parametrize("chip", compiling.SHARED)
def test_every_tiling(started: Any, chip: int) -> None:
    problems = compiling.problems(started, chip, least=50)
    assert not problems, "\n".join(problems)


@pytest.mark.sweeps
def test_the_rest(tmp_path: Path) -> None:
    with compiling.started(tmp_path, "rest") as processes:
        problems = {chip: compiling.problems(processes, chip, least=30) for chip in compiling.SHARED}
    assert not any(problems.values()), problems
