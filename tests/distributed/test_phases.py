"""Where the guide comes or goes: what goes on is the same bits, what goes is gone, and the curve is that
of plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = Path(__file__).with_name("phase_cases.py")
TRAINING = Path(__file__).with_name("training_cases.py")
# each ZeRO stage and precision; stage 0 in bf16 is refused (spec/validation.check_precision)
ENGINES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
FFN: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "rank": 12},
    "block_dense": {"kind": "block_dense", "rank": 16, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}
COINS = [1, 0, 1, 0, 0]


def tree(
    kind: str,
    stage: int,
    *,
    tensor: int = 1,
    micro: int = 2,
    guide: dict[str, Any] | None = None,
    **over: Any,
) -> dict[str, Any]:
    return {
        "model": {
            "layers": 3,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "attention_dim": 16,
            "sequence": 16,
            "vocab": 64,
        },
        "ffn": {"width": 64, **FFN[kind]},
        "guide": guide if guide is not None else window(0, 5),
        # an epsilon well above the noise in gradients that are 0 by symmetry (the key's bias), which Adam
        # would make steps of
        "train": {
            "steps": 20,
            "global_batch_size": 4,
            "micro_batch_size": micro,
            "learning_rate": 3e-3,
            "epsilon": 1e-5,
        },
        "parallel": {"tensor": tensor, "sequence": tensor > 1},
        "zero": {"stage": stage},
        **over,
    }


def window(begin: int, end: int) -> dict[str, Any]:
    return {"mode": "window", "begin": begin, "end": end, "stochastic": True}


# -------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("begin", "kind"), [(0, "low_rank"), (3, "block_shuffle")], ids=["from-0", "from-3"])
def test_every_stage_is_torch_adamw_on_the_same_mathematics(
    ranks: Callable[..., Any], stage: int, begin: int, kind: str
) -> None:
    """Coins 1,0,1,0,0 in five guided steps, then ten without; from step 3 the guide starts as the factors'
    product then.
    """
    config = tree(kind, stage, guide=window(begin, begin + 5))
    for found in ranks(2, 1).run(CASES, "against_reference", tree=config, coins=COINS, steps=begin + 15):
        assert found["drawn"] == [bool(coin) for coin in COINS]
        assert found["losses"]["before"] < 2e-6
        assert found["losses"]["guided"] < 2e-6
        assert found["weights"]["guided"] < 1e-6
        assert found["losses"]["after"] < 1e-5
        assert found["weights"]["end"] < 1e-5


@pytest.mark.parametrize(("kind", "stage"), [("block_dense", 1), ("block_shuffle", 3)])
def test_tensor_parallel_ranks_equal_one(ranks: Callable[..., Any], kind: str, stage: int) -> None:
    """Across both boundaries, with the coin."""
    one, two = (
        ranks(p, p).run(TRAINING, "train", tree=tree(kind, stage, tensor=p, guide=window(2, 7)), steps=9)[0]
        for p in (1, 2)
    )
    assert 0 < sum(two["drawn"]) < 4 * 5, "the coin fell on both sides"
    assert np.abs(np.subtract(one["losses"], two["losses"])).max() < 1e-5


# --------------------------------------------------------------------------------------------------- boundary


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_survivors_go_on_bit_for_bit_and_the_guide_is_gone(
    ranks: Callable[..., Any], stage: int, precision: str
) -> None:
    """Weights, both moments, step count; the old engine, model and guides dead; the boundary within the
    guided phase's memory.
    """
    config = tree("block_dense", stage, micro=1, guide=window(2, 5))
    for found in ranks(2, 1).run(CASES, "boundary", tree=config, at=5, precision=precision):
        survivors = {key: digest for key, digest in found["before"].items() if ".guide/" not in key}
        assert len(survivors) < len(found["before"])
        assert found["after"] == survivors
        assert not found["stale"], "the model computes with the weights that go on"
        assert found["counts"] == ((5, 3), (5, None)), "the guide counts its own steps"
        assert found["alive"] == 0
        assert found["peaks"]["crossing"] < found["peaks"]["before"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_where_guidance_begins_every_guide_is_the_factors_product(
    ranks: Callable[..., Any], stage: int
) -> None:
    """In fp32, from the fp32 weights, over ranks that hold a part of each; moments zero, count 0."""
    for world, tensor, precision in ((2, 1, "fp32"), (2, 2, "fp32"), (2, 1, "bf16")):
        if (stage, precision) not in ENGINES:
            continue
        config = tree("block_shuffle", stage, tensor=tensor, micro=2, guide=window(3, 8))
        for found in ranks(world, tensor).run(CASES, "boundary", tree=config, at=3, precision=precision):
            assert found["before"].items() <= found["after"].items()
            new = {key for key in found["after"] if key not in found["before"]}
            assert new
            assert all(".guide/" in key for key in new)
            assert found["counts"] == ((3, None), (3, 0))
            assert found["guide_error"] == 0.0
            assert found["guide_moments"] == 0.0
            assert not found["stale"]
            assert found["alive"] == 0
            assert found["peaks"]["crossing"] < found["peaks"]["after"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_starts_guided_starts_from_the_fp32_factors(
    ranks: Callable[..., Any], precision: str
) -> None:
    for found in ranks(2, 1).run(
        CASES, "boundary", tree=tree("low_rank", 1, micro=1), at=0, precision=precision
    ):
        assert found["guide_error"] == 0.0
        assert not found["stale"]


def test_guided_to_the_last_step(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """What is saved at the end holds no guide, and is the run's end."""
    short = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1}
    config = tree(
        "low_rank",
        1,
        guide=window(2, 4),
        train=short,
        run={"dir": str(tmp_path)},
        evaluation={"sequences": 2},
    )
    for names, done, same in ranks(2, 1).run(CASES, "finish", tree=config):
        assert names
        assert not any(name.endswith(".guide") for name in names)
        assert done
        assert same


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_afterwards_memory_is_that_of_a_run_without_a_guide(
    ranks: Callable[..., Any], stage: int, precision: str
) -> None:
    """Every tensor's bytes, to the byte: parameters, gradients, optimizer state, DeepSpeed's buffers."""
    guided, never, during = (
        ranks(2, 1).run(
            CASES,
            "persistent_bytes",
            steps=6,
            precision=precision,
            tree=tree("low_rank", stage, micro=1, guide=guide),
        )
        for guide in (window(1, 4), {"mode": "off"}, window(1, 9))
    )
    assert guided == never
    assert min(during) > max(never), "the guide takes memory while it lasts"


# ----------------------------------------------------------------------------------------------------- resume


FLOP = {"mode": "fixed_flop", "stochastic": True, "schedule": "linear"}


def test_stopped_in_every_phase_and_on_other_layouts(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """guided -> plain -> repeat: TP 1 -> 2 -> 1, other stages and data-parallel sizes; the curve is that
    of a run never stopped.
    """
    steps = {
        "steps": 10,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "epsilon": 1e-5,
    }

    def config(stage: int, tensor: int = 1, **over: Any) -> dict[str, Any]:
        return tree("block_dense", stage, tensor=tensor, guide=FLOP, train=steps, **over)

    whole = ranks(1).run(TRAINING, "train", tree=config(0), steps=12)[0]
    assert len(whole["losses"]) == 12
    run, losses = {"run": {"dir": str(tmp_path)}}, []
    # guided are 0..1 (r = 0.24 of 10), plain 2..9, repeat 10..11
    layouts = [
        (1, config(1, **run), 1),
        (2, config(2, 2, **run), 5),
        (2, config(3, **run), 9),
        (1, config(0, **run), 11),
    ]
    for world, one, stop in [*layouts, (2, config(1, 2, **run), 12)]:
        found = ranks(world, one["parallel"]["tensor"]).run(TRAINING, "train", tree=one, steps=stop)[0]
        assert found["start"] == len(losses)
        losses += found["losses"]
    assert np.abs(np.subtract(losses, whole["losses"])).max() < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_stopped_at_every_step_of_a_window_bit_for_bit(
    ranks: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    """At both boundaries, inside and outside of the guided phase."""
    config = tree("low_rank", stage, micro=1, guide=window(2, 4))
    whole = ranks(2, 1).run(
        TRAINING, "train", tree={**config, "run": {"dir": str(tmp_path / "whole")}}, steps=6
    )[0]
    stopped, losses = {**config, "run": {"dir": str(tmp_path / "stopped")}}, []
    for stop in range(1, 7):
        found = ranks(2, 1).run(TRAINING, "train", tree=stopped, steps=stop)[0]
        losses += found["losses"]
    assert losses == whole["losses"]
    assert found["state"] == whole["state"]


def test_the_coin_is_the_same_on_all_ranks_and_when_recomputed(ranks: Callable[..., Any]) -> None:
    config = tree("block_dense", 2, tensor=2, guide=window(1, 12))
    kept = ranks(2, 2).run(TRAINING, "train", tree=config, steps=12)
    rebuilt = ranks(2, 2).run(TRAINING, "train", tree={**config, "recompute": "full"}, steps=12)
    assert kept[0]["drawn"] == kept[1]["drawn"] == rebuilt[0]["drawn"]
    assert 0 < sum(kept[0]["drawn"]) < 4 * 11, "the coin fell on both sides"
    assert kept[0]["losses"] == rebuilt[0]["losses"]
