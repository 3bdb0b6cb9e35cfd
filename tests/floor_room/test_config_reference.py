"""docs/configuration.md is what the code says of its keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec import config_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(load_module: Callable[[Path], Any]) -> Any:
    """tools/config_reference.py as a module."""
    return load_module(ROOT / "tools/config_reference.py")


def test_the_page_is_fresh(reference: Any) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == reference.page(), f"write docs/configuration.md anew: {reference.COMMAND}"


def test_every_key_is_described(reference: Any) -> None:
    keys = reference.keys()
    assert set(keys) == set(config_keys.key_fields())
    assert [key for key, field in keys.items() if not field.description] == []


def test_the_page_says_the_rules_of_keys(reference: Any) -> None:
    keys = reference.keys()
    assert "| integer | `8` | must be a positive integer, or auto |" in reference.row(
        "train.micro_batch_size", keys["train.micro_batch_size"]
    ).replace("integer or `auto`", "integer")
    assert "must be 'dense', 'low_rank'" in reference.row("ffn.kind", keys["ffn.kind"])
    assert "&gt; 0, &lt; 1" in reference.row("train.beta1", keys["train.beta1"])
    assert "**must be set**" in reference.row("model.width", keys["model.width"])


def test_every_refusal_of_the_page_is_one(reference: Any) -> None:
    assert len(list(reference._refusals())) == len(reference.REFUSED)
