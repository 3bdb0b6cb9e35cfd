"""Replicas of the weights that differ by a bit are found, and named, in every ZeRO stage and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.health.replica_check import LANES, PIECE, checksum, describe

CASES = Path(__file__).with_name("replicas_cases.py")
# each ZeRO stage and precision; stage 0 in bf16 is refused (spec/validation.check_precision)
ENGINES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
UNCUT, CUT = "decoder.layers.1.mlp.linear_fc1.down", "decoder.layers.1.mlp.linear_fc1.guide"
NORM = "decoder.layers.1.pre_mlp_layernorm.weight"


def tree(tensor: int, stage: int) -> dict[str, Any]:
    return {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "sequence": 16, "vocab": 63 * tensor},
        "ffn": {"kind": "low_rank", "rank": 11, "width": 64},
        "guide": {"mode": "fixed_step", "fraction": 0.5},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2},
        "parallel": {"tensor": tensor, "sequence": tensor > 1},
        "zero": {"stage": stage},
    }


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_flipped_bit_is_found_and_named(ranks: Callable[..., Any], stage: int, precision: str) -> None:
    """TP 2 x DP 2 (ranks 0, 1 and 2, 3 tensor parallel), a guide beside the factors; rank 3 is wrong."""
    kind = "part" if stage == 3 else "weight"
    at = [(UNCUT, kind, [3]), (CUT, kind, [3]), (CUT, kind, [1, 3]), (UNCUT, "fp32", [3])]
    results = ranks(4, 2).run(
        CASES, "flips", tree=tree(2, stage), precision=precision, steps=2, at=at, part_all=stage == 3
    )
    for result in results:
        assert result == results[0], "every rank is told the same"
        assert result["before"] is None
        assert result["nan"] is None, "equal bits are equal"
    uncut, cut, allowed, master = results[0]["flipped"]
    message, parameters, odd = uncut
    assert parameters == [UNCUT]
    assert odd == ([2, 3] if stage == 3 else [3]), (
        "under ZeRO 3 only its tensor-parallel neighbour has the same part"
    )
    assert "tensor-parallel group of ranks 2, 3, between " in message
    assert ("data-parallel group of ranks 1, 3" in message) == (stage < 3)
    assert allowed is None, "what is cut may differ over the tensor-parallel group"
    if stage == 3:
        assert cut is None, "nobody else has it"
    else:
        assert cut[1:] == ([CUT], [1, 3])
        assert "tensor-parallel" not in cut[0]
    assert master is not None
    assert master[1] == [UNCUT]
    assert 3 in master[2]


def test_the_odd_one_of_four(ranks: Callable[..., Any]) -> None:
    """By majority, after the guide has gone; parameters that ZeRO 3 keeps whole are compared over the
    data-parallel group.
    """
    for stage in (1, 3):
        at = [(NORM, "weight", [2]), (NORM, "weight", [0, 1])]
        result = ranks(4, 1).run(CASES, "flips", tree=tree(1, stage), precision="fp32", steps=2, at=at)[0]
        assert result["before"] is None
        (message, parameters, odd), (_, _, halves) = result["flipped"]
        assert (parameters, odd) == ([NORM], [2])
        assert "data-parallel group of ranks 0, 1, 2, 3, odd: " in message
        assert message.endswith("(rank 2)")
        assert halves == [0, 1, 2, 3], "two against two"


@given(
    st.integers(1, 3 * LANES * 4),
    st.integers(0, 7),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
def test_checksums_are_of_the_bits(numel: int, shift: int, dtype: torch.dtype, data: Any) -> None:
    """The same at every place in memory, NaNs too; another one for any flipped bit and for exchanged
    neighbours.
    """
    width = torch.int16 if dtype == torch.bfloat16 else torch.int32
    tensor = torch.randn(numel).to(dtype)
    tensor[data.draw(st.integers(0, numel - 1))] = float("nan")
    moved = torch.zeros(shift + numel, dtype=dtype)[shift:]
    moved.copy_(tensor)
    assert int(checksum(moved)) == int(checksum(tensor))
    i, bit = data.draw(st.integers(0, numel - 1)), data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    tensor.view(width)[i] ^= 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
    assert int(checksum(tensor)) != int(checksum(moved))
    if (
        numel > 1
        and not torch.equal(moved.view(width)[0], moved.view(width)[-1])
        and (numel * tensor.element_size()) % 8
    ):
        ends = moved.clone()
        ends[0], ends[-1] = moved[-1], moved[0]
        assert int(checksum(ends)) != int(checksum(moved))


def test_a_long_tensor_that_is_not_aligned() -> None:
    """Copied piece by piece, it has the checksum that it has in one."""
    tensor = torch.arange(2 * PIECE * 2 + 777, dtype=torch.float32)
    moved = torch.cat([torch.zeros(1), tensor])[1:]
    assert moved.storage_offset() == 1
    assert int(checksum(moved)) == int(checksum(tensor))


def test_many_differing_parameters_are_counted() -> None:
    """A whole rank that is off is one sentence, not one for each parameter."""
    names = [f"layer.{i}" for i in range(50)]
    found = [
        {"data": ((0, 1, 2), dict.fromkeys(names, rank == 1)), "tensor": ((rank,), {})} for rank in range(3)
    ]
    error = describe(["a", "b", "c"], [60] * 3, found)
    wanted = (
        "50 of 60 tensors over the data-parallel group of ranks 0, 1, 2, odd: b (rank 1): "
        "layer.0, layer.1, layer.2 and 47 more"
    )
    assert str(error) == f"replicas of the weights differ: {wanted}; so it is b (rank 1)"
    assert error.ranks == (1,)
    assert len(error.parameters) == 50
