"""Fixtures of all rooms."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# the package under test is the installed one; the repository root would also offer kernels/ and tests/ as packages
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Any]]:
    """``ranks(n)`` gives a pool of n living ranks, shared by the session."""
    rank_pool = _load(Path(__file__).parent / "distributed" / "rank_pool.py")
    pools: dict[int, Any] = {}

    def get(world: int) -> Any:
        if world not in pools:
            pools[world] = rank_pool.RankPool(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def root() -> Path:
    return ROOT
