"""Structured linears dropped into models that megatron-core builds: training, checkpoints on other layouts, experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = Path(__file__).with_name("drop_in_cases.py")
STRUCTURES: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "rank": 8},
    "block_dense": {"kind": "block_dense", "rank": 12, "blocks": 2},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}
by_kind = pytest.mark.parametrize("kind", STRUCTURES)


@by_kind
def test_stock_model_trains_as_on_one_rank(ranks: Callable[..., Any], kind: str) -> None:
    """Equal second and third losses say that the gradients were right, also those that the ranks had in part."""
    one = ranks(1, 1).run(CASES, "losses", tensor=1, structure=STRUCTURES[kind], steps=3)[0]
    assert all(math.isfinite(loss) for loss in one)
    assert one[2] < one[1] < one[0]
    for split in ranks(2, 2).run(CASES, "losses", tensor=2, structure=STRUCTURES[kind], steps=3):
        assert split == pytest.approx(one, rel=1e-5)


@by_kind
@pytest.mark.parametrize("gated", [False, True])
def test_checkpoints_load_on_other_tensor_parallel_sizes(
    ranks: Callable[..., Any], kind: str, gated: bool, tmp_path: Path
) -> None:
    """Both as megatron-core stacks the layers by default and with a key for each."""
    structure = {**STRUCTURES[kind], "guide": True}
    for metadata in ({}, {"non_homogeneous_layers": True}) if gated else ({},):
        folder = tmp_path / f"saved_{len(metadata)}"
        folder.mkdir()
        arguments = {"structure": structure, "gated": gated, "folder": str(folder), **metadata}
        ranks(2, 2).run(CASES, "save", tensor=2, **arguments)
        for tensor in (1, 4):
            for wrong in ranks(tensor, tensor).run(CASES, "wrong_after_load", tensor=tensor, **arguments):
                assert wrong == []
