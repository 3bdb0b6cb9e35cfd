"""Structured linears dropped into models that megatron-core builds: training, checkpoints on other
layouts, experts.
"""

from __future__ import annotations

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
    """Equal second and third losses say that the gradients were right, also those that the ranks had in
    part.
    """
    one = ranks(1, 1).run(CASES, "losses", tensor=1, structure=STRUCTURES[kind], steps=3)[0]
    assert all(math.isfinite(loss) for loss in one)
    assert one[2] < one[1] < one[0]
    for sequence, recompute in ((True, "none"), (True, "bottleneck"), (False, "none")):
        structure = {**STRUCTURES[kind], "recompute": recompute}
        for split in ranks(2, 2).run(
            CASES, "losses", tensor=2, structure=structure, steps=3, sequence=sequence
        ):
            assert split == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_weights_that_megatron_gathers_during_forward_are_waited_for(
    ranks: Callable[..., Any], recompute: str
) -> None:
    structure = {**STRUCTURES["low_rank"], "recompute": recompute}
    there, coming = (
        ranks(2, 1).run(CASES, "loss_of_gathered_weights", structure=structure, overlap=overlap)
        for overlap in (False, True)
    )
    assert there == coming
    assert there[0] == there[1]


@pytest.mark.parametrize("kind", [*STRUCTURES, "turned"])
@pytest.mark.parametrize("gated", [False, True])
def test_checkpoints_load_on_other_tensor_parallel_sizes(
    ranks: Callable[..., Any], kind: str, gated: bool, tmp_path: Path
) -> None:
    """Both as megatron-core stacks the layers by default and with a key for each; "turned": TP 4 cuts a
    factor along another axis.
    """
    structure = {**STRUCTURES.get(kind, {"kind": "block_shuffle", "blocks": 4}), "guide": True}
    for metadata in ({}, {"non_homogeneous_layers": True}) if gated else ({},):
        folder = tmp_path / f"saved_{len(metadata)}"
        folder.mkdir()
        arguments = {"structure": structure, "gated": gated, "folder": str(folder), **metadata}
        ranks(2, 2).run(CASES, "save", tensor=2, **arguments)
        for tensor in (1, 4):
            for wrong in ranks(tensor, tensor).run(CASES, "wrong_after_load", tensor=tensor, **arguments):
                assert wrong == []


@by_kind
def test_first_weights_are_one_matrix_whatever_the_ranks_random_states(
    ranks: Callable[..., Any], kind: str
) -> None:
    structure = {**STRUCTURES[kind], "guide": True}
    first, second = ranks(2, 2).run(CASES, "first_weights", tensor=2, structure=structure, seed=5)
    other = ranks(2, 2).run(CASES, "first_weights", tensor=2, structure=structure, seed=6)[0]
    wider = ranks(2, 2).run(CASES, "first_weights", tensor=2, structure=structure, seed=5, std=0.4)[0]
    replicated = {name for name, (_, whole) in first.items() if whole}
    assert len(replicated) == 2 * 2 + 2, "a factor of each linear and the second one's bias, in two layers"
    for name, (weights, whole) in first.items():
        if name.endswith("bias"):
            assert not weights.any()
            continue
        assert weights.std() > 0.005
        assert np.array_equal(weights, second[name][0]) == whole, name
        assert not np.array_equal(weights, other[name][0]), name
        assert (
            not np.array_equal(weights, first[name.replace("layers.0", "layers.1")][0]) or "layers.1" in name
        ), name
    if kind == "low_rank":  # block factors are orthonormal
        name = "decoder.layers.0.mlp.linear_fc1.down"
        assert wider[name][0] == pytest.approx(first[name][0] * math.sqrt(2), rel=1e-4)


@by_kind
@pytest.mark.parametrize("layout", ["experts", "tensor"])
@pytest.mark.parametrize("gated", [False, True])
def test_mixture_of_experts_as_on_one_rank(
    ranks: Callable[..., Any], kind: str, layout: str, gated: bool
) -> None:
    """Experts spread over two ranks, or each split over two: outputs, and gradients of x and of all
    experts.
    """
    # megatron-core knows no bias in experts that are split
    arguments = {"structure": STRUCTURES[kind], "gated": gated, "bias": layout == "experts", "ranks": 2}
    one = ranks(1, 1).run(CASES, "mixture", layout="one", **arguments)[0]
    split = ranks(2, 2 if layout == "tensor" else 1).run(CASES, "mixture", layout=layout, **arguments)
    for name in ("y", "x"):
        np.testing.assert_allclose(
            np.concatenate([part[name] for part in split]), one[name], rtol=1e-9, atol=1e-11, err_msg=name
        )
    assert len(one["gradients"]) == (12 if arguments["bias"] else 8)
    for key, (want, _) in one["gradients"].items():
        held = [part["gradients"][key] for part in split if key in part["gradients"]]
        if held[0][1] or len(held) == 1:  # complete on every rank that has it
            for got, _ in held:
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=key)
        else:
            np.testing.assert_allclose(sum(got for got, _ in held), want, rtol=1e-9, atol=1e-11, err_msg=key)


@by_kind
@pytest.mark.parametrize("layout", ["experts", "tensor"])
def test_checkpoints_of_experts_load_on_one_rank(
    ranks: Callable[..., Any], kind: str, layout: str, tmp_path: Path
) -> None:
    """megatron-core's own MLP holds the experts: it must not cut a gated pair's bias by itself."""
    arguments = {
        "structure": STRUCTURES[kind],
        "bias": layout == "experts",
        "ranks": 2,
        "folder": str(tmp_path),
    }
    ranks(2, 2 if layout == "tensor" else 1).run(CASES, "save_mixture", layout=layout, **arguments)
    assert ranks(1, 1).run(CASES, "wrong_in_mixture", layout="one", **arguments) == [[]]


# ------------------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "dense"}, "kind = 'dense'"),
        ({"kind": "low_rank"}, "rank: missing"),
        ({"kind": "low_rank", "rank": 8, "blocks": 2}, "blocks = 2"),
        ({"kind": "block_shuffle", "blocks": 2, "rank": 8}, "rank = 8"),
        ({"kind": "block_shuffle", "blocks": 0}, "blocks = 0"),
        ({"kind": "block_dense", "rank": 9, "blocks": 2}, "must divide rank = 9"),
        ({"kind": "low_rank", "rank": 8, "base": "experts"}, "MoELayer"),
    ],
)
def test_spec_refuses_what_makes_no_structured_layer(
    ranks: Callable[..., Any], arguments: dict[str, Any], words: str
) -> None:
    assert words in ranks(1, 1).run(CASES, "refusal", **arguments)[0]


def test_spec_leaves_its_base_alone(ranks: Callable[..., Any]) -> None:
    ranks(1, 1).run(CASES, "check_base_is_kept")


def test_linears_refuse_sizes_that_do_not_fit(ranks: Callable[..., Any]) -> None:
    for structure, words in (
        ({"kind": "block_shuffle", "blocks": 5}, "blocks = 5"),
        ({"kind": "low_rank", "rank": 25}, "rank = 25"),
    ):
        with pytest.raises(AssertionError, match=f"ValueError: {words}: must"):
            ranks(1, 1).run(CASES, "first_weights", tensor=1, structure=structure, seed=0)


def test_linears_refuse_ranks_that_do_not_fit(ranks: Callable[..., Any]) -> None:
    """f is 48: 16 divides it, 36 does not."""
    ranks(2, 2).run(
        CASES, "first_weights", tensor=2, structure={"kind": "block_shuffle", "blocks": 4}, seed=0
    )
    with pytest.raises(
        AssertionError, match="ValueError: blocks = 6: its square must divide output size = 48"
    ):
        ranks(2, 2).run(
            CASES, "first_weights", tensor=2, structure={"kind": "block_shuffle", "blocks": 6}, seed=0
        )
