"""Fixtures of all rooms."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # Triton's interpreter must be chosen before anything imports triton, as Megatron does
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
# the package under test is the installed one; the repository root would also offer kernels/ and tests/ as
# packages
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@functools.cache
def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], Any]:
    """``load_module(file)``: a file that no package holds, as a module."""
    return _load


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[tuple[int, int], Any]]:
    """Pools of living ranks, by number and tensor-parallel size."""
    living: dict[tuple[int, int], Any] = {}
    yield living
    stop(living)


def stop(pools: dict[tuple[int, int], Any]) -> None:
    """End all pools; a test that wants one again makes it anew."""
    while pools:
        pools.popitem()[1].stop()


@pytest.fixture(scope="session")
def no_idle_ranks(pools: dict[tuple[int, int], Any]) -> None:
    """For rooms that start no ranks: those that are left over poll, and would slow them down."""
    stop(pools)


@pytest.fixture(scope="session")
def ranks(pools: dict[tuple[int, int], Any]) -> Callable[[int], Any]:
    """``ranks(n, tensor)`` gives n living ranks, for cases of that tensor-parallel size alone; the newest
    four pools live on.

    Megatron does not end the groups of a size when it makes those of another, and each one's gloo threads
    poll: a few hundred of them slow two cores down.
    """
    rank_pool = _load(Path(__file__).parent / "distributed" / "rank_pool.py")

    def get(world: int, tensor: int = 1) -> Any:
        pool = pools.pop((world, tensor), None) or rank_pool.RankPool(world)
        pools[world, tensor] = pool  # the newest last
        while len(pools) > 4:
            pools.pop(next(iter(pools))).stop()
        return pool

    return get


@pytest.fixture(scope="session")
def nursery() -> Iterator[Callable[..., Any]]:
    """``nursery(file, function, ...)`` calls it in a process of its own that joins no group: a child that
    it forks starts at once.
    """
    pool = _load(Path(__file__).parent / "distributed" / "rank_pool.py").RankPool(1, timeout=1750.0)
    yield lambda file, function, **arguments: pool.run(file, function, **arguments)[0]
    pool.stop()


@pytest.fixture(scope="module")
def fresh_nursery() -> Iterator[Callable[..., Any]]:
    """As ``nursery``, but nobody else's: whose children start process groups of their own."""
    pool = _load(Path(__file__).parent / "distributed" / "rank_pool.py").RankPool(1, timeout=1750.0)
    yield lambda file, function, **arguments: pool.run(file, function, **arguments)[0]
    pool.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where a CUDA device is, and say why elsewhere."""
    from sffn_dist.spec import machine

    for item in items:
        if item.get_closest_marker("gpu") and machine.cuda_capability() is None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
