"""A small text folder and the config that reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec.config import Config
from sffn_dist.spec.loading import from_tree


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """60 small documents of text with multi-byte characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(60):
        line = f"document {index}: naïve café, 東京 and 🙂; the quick brown fox {index * index}\n"
        (folder / f"{index:02d}.txt").write_text(line * (5 + index % 7), encoding="utf-8")
    return folder


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """configure(source, vocab=300, sequence=16, **data settings) -> Config with data.dir below tmp_path."""

    def make(source: object, vocab: int = 300, sequence: int = 16, **data: Any) -> Config:
        return from_tree(
            {
                "model": {"layers": 1, "width": 8, "heads": 2, "vocab": vocab, "sequence": sequence},
                "train": {"steps": 1},
                "data": {"dir": str(tmp_path / "prepared"), "source": str(source), **data},
            }
        )

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
