"""Parallel truth: p ranks equal one rank, every ZeRO stage equals every other, resumed equals
uninterrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sffn_dist.checkpoint.manifest import Manifest

CASES = Path(__file__).with_name("training_cases.py")
# ZeRO stages and precisions that a run may have: stage 0 in bf16 is refused (spec/validation.check_precision)
ENGINES = [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))]
FFN: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 12},
    "block_dense": {"kind": "block_dense", "rank": 16, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}
STEPS = 14
TOLERANCE = 2e-4


def tree(
    kind: str, *, tensor: int = 1, sequence: bool = False, stage: int = 1, micro: int = 2, **extra: Any
) -> dict[str, Any]:
    model = {
        "layers": 3,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "attention_dim": 16,
        "sequence": 16,
        "vocab": 64,
    }
    base: dict[str, Any] = {
        "model": {**model, **extra.pop("model", {})},
        "ffn": {"width": 64, **FFN[kind]},
        "guide": {"mode": "fixed_step", "fraction": 0.8, "stochastic": True},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-2},
        "parallel": {"tensor": tensor, "sequence": sequence},
        "zero": {"stage": stage},
    }
    return {**base, **extra}


@pytest.fixture(scope="module")
def train(ranks: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``train(world, tree)`` -> the first rank's result; the same case is run once."""
    done: dict[str, dict[str, Any]] = {}

    def run(world: int, config: dict[str, Any], steps: int = STEPS, **options: Any) -> dict[str, Any]:
        key = repr((world, config, steps, options))
        if key not in done:
            results = ranks(world, config["parallel"]["tensor"]).run(
                CASES, "train", tree=config, steps=steps, **options
            )
            for result in results:
                assert repr(result["losses"]) == repr(results[0]["losses"]), "ranks report different losses"
                assert not result["replicas"], f"replicas differ: {result['replicas'][:3]}"
            done[key] = results[0]
        return done[key]

    return run


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert len(a["losses"]) == len(b["losses"]) > 0
    return max(float(np.abs(np.subtract(a[key], b[key])).max()) for key in ("losses", "norms"))


@pytest.mark.parametrize("kind", FFN)
def test_layouts_agree(train: Callable[..., dict[str, Any]], kind: str) -> None:
    """1 rank = TP 2 = TP 2 with SP = DP 2, losses and gradient norms, with the stochastic guide on."""
    one = train(1, tree(kind))
    assert one["losses"][-1] < one["losses"][0] - 0.3, "it learns"
    if kind != "dense":
        assert 0 < sum(one["drawn"]) < int(0.8 * STEPS) * 4, "the coin fell on both sides"
    for layout in (tree(kind, tensor=2), tree(kind, tensor=2, sequence=True), tree(kind, micro=1)):
        assert difference(one, train(2, layout)) < TOLERANCE, layout["parallel"]


@pytest.mark.parametrize("kind", ["dense", "block_shuffle"])
def test_zero_stages_agree(train: Callable[..., dict[str, Any]], kind: str) -> None:
    """ZeRO 0 = 1 = 2 = 3 over two data-parallel ranks; every stage reports a gradient norm."""
    stages = [train(2, tree(kind, stage=stage, micro=1)) for stage in (0, 1, 2, 3)]
    for stage, result in enumerate(stages):
        assert difference(stages[0], result) < TOLERANCE, f"stage {stage}"
    assert len({result["optimizer"] for result in stages}) == 3, "other optimizers did the stages"
    assert difference(stages[0], train(2, tree(kind, stage=3, micro=1), part_all=True)) < TOLERANCE, (
        "stage 3, every tensor parted"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, in place of a device")
@pytest.mark.parametrize(
    ("kind", "recompute", "kernels"),
    [
        ("low_rank", "none", ["_mixed", "_wide"]),
        ("block_dense", "bottleneck", ["_batched", "_mixed", "_through", "_wide"]),
        ("block_shuffle", "bottleneck", ["_batched", "_through", "_wide"]),
    ],
)
def test_kernels_train_as_plain_torch_does(
    ranks: Callable[..., Any], kind: str, recompute: str, kernels: list[str]
) -> None:
    """Guided steps and others through Triton's kernels, against the same through none."""
    config = tree(kind, recompute=recompute, guide={"mode": "fixed_step", "fraction": 0.1})
    plain, ours = (
        ranks(1, 1).run(CASES, "train_by", kernels=way, tree=config, steps=4)[0]
        for way in ("torch", "triton")
    )
    assert plain["launched"] == []
    assert ours["launched"] == kernels
    assert difference(plain, ours) < TOLERANCE


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_an_engine_may_evaluate_before_it_trains(ranks: Callable[..., Any], recompute: str) -> None:
    """Where the guide comes or goes, a new engine may evaluate first: in stage 3 the layer's weights are
    gathered for its backward too.
    """
    results = {}
    for stage in (0, 3):
        config = tree("block_shuffle", stage=stage, micro=1, recompute=recompute)
        results[stage], _ = ranks(2, 1).run(CASES, "evaluated_first", tree=config, steps=3)
        assert results[stage]["direct"] == [True], "no hook makes the layer take the long way"
    np.testing.assert_allclose(results[3]["losses"], results[0]["losses"], atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor": 2, "sequence": True, "stage": 3,
         "model": {"activation": "swiglu", "norm": "rmsnorm", "bias": False}},
        {"tensor": 2, "stage": 3, "recompute": "full", "model": {"tie_embeddings": False}},
        {"tensor": 2, "sequence": True, "stage": 3, "recompute": "bottleneck",
         "model": {"activation": "swiglu"}},
        {"kind": "low_rank", "tensor": 2, "sequence": True, "stage": 2, "recompute": "bottleneck"},
        {"kind": "block_dense", "tensor": 2, "stage": 1, "recompute": "bottleneck"},
    ],
    ids=["swiglu-rmsnorm-nobias-zero3", "recompute-zero3-untied", "bottleneck-zero3",
         "bottleneck-zero2-low_rank", "bottleneck-zero1-block_dense"],
)  # fmt: skip
def test_four_ranks(train: Callable[..., dict[str, Any]], options: dict[str, Any]) -> None:
    """TP 2 x DP 2 under ZeRO 2 and 3, recomputation, the other model options: equal to one plain rank."""
    kind = options.get("kind", "block_shuffle")
    plain = {key: value for key, value in options.items() if key == "model"}
    layout = {key: value for key, value in options.items() if key != "kind"}
    split = train(4, tree(kind, micro=1, **layout), part_all=options["stage"] == 3)
    assert difference(train(1, tree(kind, **plain)), split) < TOLERANCE


def test_recomputation_changes_nothing(train: Callable[..., dict[str, Any]]) -> None:
    assert (
        train(1, tree("block_dense", recompute="full"))["losses"] == train(1, tree("block_dense"))["losses"]
    )


@pytest.mark.parametrize("kind", [kind for kind in FFN if kind != "dense"])
def test_keeping_only_the_bottleneck_changes_nothing(train: Callable[..., dict[str, Any]], kind: str) -> None:
    """Bit for bit, with the guide's coin, on two tensor-parallel ranks that split the tokens too."""
    layout = {"tensor": 2, "sequence": True}
    kept, rebuilt = train(2, tree(kind, **layout)), train(2, tree(kind, recompute="bottleneck", **layout))
    assert sum(rebuilt["drawn"]) > 0, "the guide took part"
    assert rebuilt["losses"] == kept["losses"]
    assert rebuilt["state"] == kept["state"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resume_equals_no_stop(train: Callable[..., dict[str, Any]], tmp_path: Path, stage: int) -> None:
    """Bit for bit on the same layout: losses, weights, moments."""
    base = tree("low_rank", stage=stage, micro=1)
    whole = train(2, {**base, "run": {"dir": str(tmp_path / "whole")}}, steps=8)
    stopped = {**base, "run": {"dir": str(tmp_path / "stopped")}}
    first = train(2, stopped, steps=5)
    second = train(2, stopped, steps=8)
    assert second["start"] == 5
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["state"] == whole["state"]


def test_resume_on_another_layout(
    ranks: Callable[..., Any], train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """TP 2 ZeRO 1 -> TP 1 DP 2 ZeRO 3 -> one rank ZeRO 0: the saved tensors are the same bits, the curve
    goes on.
    """
    run = {"run": {"dir": str(tmp_path)}}
    whole = train(1, tree("block_shuffle", stage=0), steps=12)
    losses = train(2, {**tree("block_shuffle", tensor=2, sequence=True), **run}, steps=4)["losses"]
    manifest = Manifest.read(tmp_path / "checkpoints" / "step_00000004")
    for name, pieces in manifest.pieces.items():
        assert sum(piece.numel for piece in pieces) == math.prod(manifest.shapes[name]), "once, by one rank"
    before = ranks(1).run(CASES, "full_weights", tree={**tree("block_shuffle"), **run}, step=4)[0]
    # loading and saving at once, in another layout, gives the same tensors
    train(2, {**tree("block_shuffle", stage=3, micro=1), **run}, steps=4)
    after = ranks(1).run(CASES, "full_weights", tree={**tree("block_shuffle"), **run}, step=4)[0]
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) and not np.isnan(before[key]).any() for key in before)
    losses += train(2, {**tree("block_shuffle", stage=3, micro=1), **run}, steps=8)["losses"]
    losses += train(1, {**tree("block_shuffle", stage=0), **run}, steps=12)["losses"]
    assert np.abs(np.subtract(losses, whole["losses"])).max() < TOLERANCE


def test_resume_where_block_shuffle_takes_the_other_route(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """TP 4, where the features are exchanged for whole blocks, cuts a factor along another axis than one
    rank or TP 2 does.
    """
    shuffle = {"ffn": {"width": 64, "kind": "block_shuffle", "blocks": 4}, "model": {"kv_heads": 4}}
    run = {"run": {"dir": str(tmp_path)}}
    whole = train(1, tree("block_shuffle", **shuffle), steps=9)
    losses = train(
        4,
        {**tree("block_shuffle", tensor=4, sequence=True, recompute="bottleneck", **shuffle), **run},
        steps=3,
    )["losses"]
    losses += train(2, {**tree("block_shuffle", tensor=2, **shuffle), **run}, steps=6)["losses"]
    losses += train(4, {**tree("block_shuffle", tensor=4, **shuffle), **run}, steps=9)["losses"]
    assert np.abs(np.subtract(losses, whole["losses"])).max() < TOLERANCE


@pytest.mark.parametrize(("kv_heads", "sequence"), [(1, True), (1, False), (2, True)])
def test_fewer_key_value_heads_than_ranks(
    train: Callable[..., dict[str, Any]], tmp_path: Path, kv_heads: int, sequence: bool
) -> None:
    """linear_qkv is cut inside a head and its outputs gathered: TP 4 -> TP 2 -> one rank goes on as one rank
    does, with equal gradient norms.
    """
    model = {"model": {"kv_heads": kv_heads}}
    run = {"run": {"dir": str(tmp_path)}}
    whole = train(1, tree("low_rank", **model), steps=12)
    four = train(4, {**tree("low_rank", tensor=4, sequence=sequence, **model), **run}, steps=6)
    two = train(2, {**tree("low_rank", tensor=2, sequence=sequence, **model), **run}, steps=9)
    one = train(1, {**tree("low_rank", **model), **run}, steps=12)
    for key in ("losses", "norms"):
        joined = four[key] + two[key] + one[key]
        assert np.abs(np.subtract(joined, whole[key])).max() < TOLERANCE, key


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_gradients_reduced_in_pieces_are_the_same(
    train: Callable[..., dict[str, Any]], stage: int, precision: str
) -> None:
    """Models of real sizes are larger than what ZeRO reduces at once; so is the embedding here."""
    layout = tree("low_rank", micro=1, stage=stage)
    whole, pieces = (train(2, layout, steps=5, precision=precision, bucket=size) for size in (10**6, 1500))
    assert pieces["losses"] == whole["losses"]
    assert pieces["norms"] == whole["norms"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_partial_sums_in_pieces_are_the_same(train: Callable[..., dict[str, Any]], stage: int) -> None:
    """Each gradient a bucket by itself."""
    layout = tree("low_rank", tensor=2, sequence=True, stage=stage)
    whole, pieces = (train(2, layout, steps=5, **options) for options in ({}, {"sums": 1}))
    assert pieces["losses"] == whole["losses"]
    assert pieces["norms"] == whole["norms"]
    assert pieces["state"] == whole["state"]


def test_gradient_norm_in_bf16(train: Callable[..., dict[str, Any]]) -> None:
    """Every stage reports, and clips by, the norm over all tensor-parallel ranks."""
    one = train(1, tree("low_rank"), steps=3)
    for stage in (1, 2, 3):
        for layout in (tree("low_rank", tensor=2, stage=stage), tree("low_rank", micro=1, stage=stage)):
            other = train(2, layout, steps=3, precision="bf16")
            np.testing.assert_allclose(
                other["norms"], one["norms"], rtol=0.03, err_msg=f"stage {stage} {layout['parallel']}"
            )
            np.testing.assert_allclose(other["losses"], one["losses"], rtol=0.01)


def test_failed_save_leaves_nothing(
    ranks: Callable[..., Any], train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One rank's disk is full: every rank hears of it, earlier checkpoints stay, nothing half-written
    does.
    """
    config = {**tree("dense", micro=1), "run": {"dir": str(tmp_path)}}
    train(2, config, steps=2)
    for message, left in ranks(2, 1).run(CASES, "failed_save", tree=config, step=3):
        assert "step 3 not written" in message
        assert "No space left" in message
        assert left == ["step_00000002"]


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_step_without_finite_gradients_is_skipped(
    train: Callable[..., dict[str, Any]], stage: int, precision: str
) -> None:
    """Weights and Adam's count stay, the next steps go on."""
    got = train(2, tree("low_rank", stage=stage, micro=1), steps=5, precision=precision, nan_at=2)
    assert not np.isfinite(got["norms"][2])
    assert np.isfinite(got["losses"][3:]).all()
    assert np.isfinite(got["norms"][3:]).all()
    assert got["adam_steps"] == 4
