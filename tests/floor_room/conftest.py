"""Config files for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(tree or text, name) -> path of a config file."""

    def to_file(tree: Any, name: str = "a.json") -> Path:
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        return path

    return to_file


@pytest.fixture(scope="session", autouse=True)
def alone(no_idle_ranks: None) -> None:
    """No test of this room, nor of those that follow it, starts ranks of a pool."""
