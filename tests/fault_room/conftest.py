"""The faults' real runs: one config and its prepared data, for all tests here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launches(load_module: Callable[[Path], Any]) -> Any:
    """The module of that name beside this file."""
    return load_module(Path(__file__).with_name("launches.py"))


@pytest.fixture(scope="session")
def config(launches: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config's file."""
    return launches.write_config(tmp_path_factory.mktemp("faults"))
