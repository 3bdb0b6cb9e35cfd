"""The faults' real runs: one config and its prepared data, for all tests here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launches() -> Any:
    """The module of that name beside this file."""
    path = Path(__file__).with_name("launches.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def config(launches: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config's file."""
    return launches.write_config(tmp_path_factory.mktemp("faults"))
