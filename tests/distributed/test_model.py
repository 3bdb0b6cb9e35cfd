"""The model that a config stands for: parameters by the split table, guide at step 0, evaluation, sample,
init_from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = Path(__file__).with_name("model_cases.py")
FFN: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 12},
    "block_dense": {"kind": "block_dense", "rank": 16, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}


def tree(
    kind: str, *, tensor: int = 1, sequence: bool = False, guide: str = "fixed_step", **extra: Any
) -> dict[str, Any]:
    model = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "attention_dim": 16,
        "sequence": 16,
        "vocab": 64,
    }
    return {
        "model": {**model, **extra.pop("model", {})},
        "ffn": {"width": 64, **FFN[kind]},
        "guide": {"mode": guide},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2},
        "parallel": {"tensor": tensor, "sequence": sequence},
        **extra,
    }


@pytest.mark.parametrize("kind", FFN)
def test_parameters_follow_the_split_table(ranks: Callable[..., Any], kind: str) -> None:
    variants = (
        {},
        {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False},
        {"kv_heads": 1},
    )
    for model, (tensor, sequence) in itertools.product(variants, ((1, False), (2, False), (2, True))):
        for problems in ranks(2, tensor).run(
            CASES, "table_mismatches", tree=tree(kind, tensor=tensor, sequence=sequence, model=model)
        ):
            assert problems == []


@pytest.mark.parametrize("kind", ["low_rank", "block_dense", "block_shuffle"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_guided_at_step_0_equals_unguided(ranks: Callable[..., Any], kind: str, activation: str) -> None:
    """W starts as what the factors stand for (the authors' BlockShuffle guide did not)."""
    for layout in ({}, {"tensor": 2, "sequence": True}):
        config = tree(kind, **layout, model={"activation": activation, "init_std": 0.5})
        for difference, spread, drawn in ranks(2, config["parallel"]["tensor"]).run(
            CASES, "guided_difference", tree=config
        ):
            assert drawn == 2
            assert difference < 1e-4 * spread


def test_evaluation_and_sample_do_not_depend_on_the_layout(ranks: Callable[..., Any]) -> None:
    base = {"model": {"init_std": 0.3}}
    want = ranks(1).run(CASES, "direct_loss", tree=tree("block_shuffle", **base), windows=5)[0]
    loss, bits, ids = ranks(1).run(
        CASES, "evaluation_and_sample", tree=tree("block_shuffle", **base), windows=5
    )[0]
    assert loss == pytest.approx(want[0], rel=1e-6)
    assert bits == pytest.approx(want[1], rel=1e-6)
    assert ids[:3] == [3, 1, 4]
    assert len(ids) == 9
    assert max(ids) < 63, "rows that no token uses are never drawn"
    for layout in ({}, {"tensor": 2}, {"tensor": 2, "sequence": True}):
        config = tree("block_shuffle", **layout, **base)
        for other in ranks(2, config["parallel"]["tensor"]).run(
            CASES, "evaluation_and_sample", tree=config, windows=5
        ):
            assert other[0] == pytest.approx(loss, rel=1e-6), layout
            assert other[1] == pytest.approx(bits, rel=1e-6), layout
            assert other[2] == ids, layout


def test_a_sample_compiles_few_kernels_and_says_so_before(ranks: Callable[..., Any]) -> None:
    """Of growing contexts each power of two would have kernels of its own, to be compiled and timed."""
    base = {"model": {"init_std": 0.3, "sequence": 32}}
    pytest.importorskip("triton")
    for setting in ("triton", "auto"):
        (found,) = ranks(1).run(CASES, "sample_by", tree=tree("low_rank", **base), setting=setting, tokens=14)
        assert found["ids"] == found["unpadded"]
        assert set(found["lengths"][:14]) == {16}, "the longest context, for all"
        what = "sample: 14 tokens, each from 16 positions; no kernel is timed for it"
        if setting == "triton":
            assert len(found["launched"]) == 3, found["launched"]
            assert found["logged"] == [f"{what}, at most 4 are compiled, in about 8 s (assumed)"]
        else:
            assert found["launched"] == []
            assert found["logged"] == [f"{what}, or compiled: its structured layers are plain torch"]


def test_contexts_of_a_sample_have_few_lengths() -> None:
    from sffn_dist.inference.generation import length_of

    assert {length_of(own, 50, 1) for own in range(2, 51)} == {50}
    assert {length_of(own, 300, 1) for own in range(2, 301)} == {64, 128, 256, 300}
    assert {length_of(own, 1024, 8) for own in range(900, 1025)} == {1024}
    assert length_of(50, 50, 4) == 52, "equal parts for sequence parallelism"


def test_init_from_another_run(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Weights come from the other run, on another layout; its guide does not: W starts as the loaded
    factors' product.
    """
    source = {**tree("low_rank", tensor=2, guide="off"), "run": {"dir": str(tmp_path / "source")}}
    ranks(2, 2).run(CASES, "save_start", tree=source)
    here = {**tree("low_rank"), "run": {"dir": str(tmp_path / "here")}, "init_from": str(tmp_path / "source")}
    got = ranks(1).run(CASES, "weights", tree=here)[0]
    trained = ranks(1).run(
        CASES, "weights", tree={**tree("low_rank"), "run": source["run"], "guide": {"mode": "off"}}
    )[0]
    assert all(np.array_equal(trained[name], got[name]) for name in trained)
    guides = [name for name in got if name.endswith(".guide")]
    assert len(guides) == 2
    for name in guides:
        prefix = name.removesuffix("guide")
        np.testing.assert_allclose(got[name], got[prefix + "up"] @ got[prefix + "down"], atol=1e-6)
