"""The plan's memory of a micro-batch against the peak of live bytes of the real model: within 5% in every
recompute mode, with tensor and sequence parallelism, guided and plain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec.activations import moments
from sffn_dist.spec.loading import load
from sffn_dist.spec.memory import memory_per_rank

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).with_name("live_bytes.py")
LAYOUTS = {
    "one rank": [],
    "tensor 2": ["parallel.tensor=2"],
    "tensor 2, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
}
# few layers and a small vocabulary: the fullest moment is a layer's, not only the loss
THREE = ["model.layers=3", "model.vocab=2048", "train.micro_batch_size=4"]
KINDS = ("low_rank", "block_dense", "block_shuffle")
LLAMA = ["model.activation=swiglu", "model.norm=rmsnorm", "model.bias=false", "model.tie_embeddings=false"]

Case = tuple[str, list[str], str, bool]


def cases() -> dict[str, Case]:
    """Every recompute mode x layout x guide, each with one of the structures; and what else is a case of its
    own.
    """
    modes = itertools.product(("none", "bottleneck", "full"), LAYOUTS, (False, True))
    found: dict[str, Case] = {}
    for i, (recompute, layout, guide) in enumerate(modes):
        kind = KINDS[(i + i // 3) % 3]
        overrides = [*THREE, *LAYOUTS[layout], f"recompute={recompute}"]
        name = f"{kind}, {recompute}, {layout}{', guided' if guide else ''}"
        found[name] = (f"paper/m_{kind}_32.json", overrides, "bf16", guide)
    split, xl = LAYOUTS["tensor 2, sequence"], "paper/xl_low_rank_32.json"
    return found | {
        "xl": (xl, [], "bf16", False),
        "xl, full": (xl, ["model.layers=6", "recompute=full"], "bf16", False),
        "wide, tensor 2, sequence": ("wide_blockdiag.json", ["model.layers=6", *split], "bf16", True),
        "dense": ("paper/m_dense.json", THREE, "bf16", False),
        "dense, full": ("paper/m_dense.json", [*THREE, *split, "recompute=full"], "bf16", False),
        "gated dense": ("paper/m_dense.json", [*THREE, *LLAMA], "bf16", False),
        "gated": ("paper/m_low_rank_32.json", [*THREE, *LLAMA, *split], "bf16", False),
        "gated, guided": ("paper/m_block_dense_32.json", [*THREE, "model.activation=swiglu"], "bf16", True),
        "fewer key/value heads than ranks": (
            "paper/m_block_dense_32.json",
            [*THREE, *LAYOUTS["tensor 2"], "model.kv_heads=1"],
            "bf16",
            False,
        ),
        "one key/value head": (
            "paper/m_low_rank_32.json",
            [*THREE, "model.kv_heads=1", "recompute=bottleneck", "ffn.dense_layers=[]"],
            "bf16",
            False,
        ),
        "fp32, padded": ("paper/m_low_rank_32.json", [*THREE, "model.vocab_unpadded=2000"], "fp32", False),
        "one sequence": (
            "paper/m_low_rank_32.json",
            ["model.layers=2", "train.micro_batch_size=1"],
            "fp32",
            False,
        ),
    }


@pytest.fixture(scope="module")
def error(fresh_nursery: Callable[..., Any]) -> Callable[..., float]:
    """``error(path, overrides, precision, guide, cuda)``: what the plan is off by, relative to the count."""

    def compare(path: str, overrides: list[str], precision: str, guide: bool, cuda: bool = False) -> float:
        file = str(ROOT / "configs" / path)
        counted = fresh_nursery(
            TOOL, "measure", path=file, overrides=overrides, precision=precision, guide=guide, cuda=cuda
        )
        config = load(file, overrides)
        planned = memory_per_rank(config, precision, 1, guide=guide)
        assert planned["weights"] == pytest.approx(counted["weights"], rel=1e-5)
        # of the same dtype, before they join their sums
        assert counted["gradients"] == pytest.approx(counted["weights"], rel=1e-5)
        by_moment = moments(config, precision, guide=guide, cuda=cuda)
        assert cuda or planned["activations"] == max(by_moment.values())
        return max(by_moment.values()) / counted["activations"] - 1

    return compare


@pytest.mark.parametrize("case", cases().values(), ids=cases().keys())
def test_the_plan_is_within_5_percent_of_what_is_live(case: Case, error: Callable[..., float]) -> None:
    assert abs(error(*case)) < 0.05


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_of_cudas_operators_too(layout: list[str], error: Callable[..., float]) -> None:
    """Norms in one pass, and in bf16 grouped key/value heads that are not repeated: a device needs less."""
    overrides = [*THREE, *LLAMA, *layout, "model.kv_heads=4"]
    assert abs(error("paper/m_low_rank_32.json", overrides, "bf16", False, True)) < 0.05
    config = load(ROOT / "configs/paper/m_low_rank_32.json", overrides)
    on = [memory_per_rank(config, "bf16", 1, guide=False, device=device) for device in (False, True)]
    assert on[1]["activations"] < on[0]["activations"]


SWEEP = [
    (f"paper/{size}_{kind}_32.json", [*model, *layout, f"recompute={recompute}"], precision, guide)
    for size, kind, model, layout, recompute, precision, guide in itertools.product(
        ("m", "xl"),
        KINDS,
        (["model.layers=4"], [*THREE, *LLAMA], [*THREE, "model.kv_heads=1"], [*THREE, "model.bias=false"]),
        LAYOUTS.values(),
        ("none", "bottleneck", "full"),
        ("bf16", "fp32"),
        (False, True),
    )
]


@pytest.mark.sweeps
@pytest.mark.parametrize("case", SWEEP, ids=lambda case: " ".join([case[0], *case[1], *map(str, case[2:])]))
def test_over_many_configs(case: Case, error: Callable[..., float]) -> None:
    assert abs(error(*case)) < 0.05
