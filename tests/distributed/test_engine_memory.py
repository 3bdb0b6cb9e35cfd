"""What an engine holds between two steps is what the plan counts (spec/memory.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec import loading
from sffn_dist.spec.counts import reduce_bucket
from sffn_dist.spec.memory import memory_per_rank

CASES = Path(__file__).with_name("phase_cases.py")
# kept between steps beside weights and optimizer: stage 1 sums bf16 gradients into buffers that stay; stage 3
# does so in both precisions, and keeps its bucket, which is as large as this small model
GRADIENTS = {(1, "bf16"), (3, "fp32"), (3, "bf16")}


@pytest.mark.parametrize(
    ("stage", "precision", "reduce_dtype"),
    [
        *((stage, "fp32", "fp32") for stage in range(4)),
        *((stage, "bf16", dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    ],
)
def test_an_engine_holds_what_the_plan_counts(
    ranks: Callable[..., Any], stage: int, precision: str, reduce_dtype: str
) -> None:
    tree = {
        "model": {"layers": 2, "width": 256, "heads": 4, "sequence": 32, "vocab": 4096},
        "ffn": {"kind": "low_rank", "rank": 64},
        "train": {"steps": 2, "micro_batch_size": 1, "global_batch_size": 4},
        "zero": {"stage": stage, "reduce_dtype": reduce_dtype},
        "guide": {"mode": "off"},
    }
    held = max(ranks(2, 1).run(CASES, "persistent_bytes", steps=2, precision=precision, tree=tree))
    config = loading.from_tree(tree)
    planned = memory_per_rank(config, precision, 2, guide=False)
    kept = planned["weights"] + planned["optimizer"]
    if (stage, precision) in GRADIENTS:
        kept += planned["gradients"]
    if stage == 3:
        bytes_reduced = 2 if (precision, reduce_dtype) == ("bf16", "bf16") else 4
        kept += bytes_reduced * reduce_bucket(config, guide=False)
    assert held == pytest.approx(kept, rel=0.01)
