"""The split table: parts tile the tensor, one layout serves all factors, sizes that do not fit are
refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sffn_dist.parallel.split import shard, unshard
from sffn_dist.spec.config import FFNKind
from sffn_dist.spec.split_table import linear_tensors
from sffn_dist.spec.traffic import TrafficGroup, structured_linear, total
from sffn_dist.structured.cut import Cut, Role, TensorSpec
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Size, Structure

KINDS: tuple[FFNKind, ...] = ("dense", "low_rank", "block_shuffle", "block_dense")


@dataclass(frozen=True)
class Pair:
    """Two linears h -> f -> h of one structure."""

    structure: Structure
    h: int
    f: int
    gated: bool

    def specs(self, role: Role) -> dict[str, TensorSpec]:
        outputs = (2 * self.f if self.gated else self.f) if role == "column" else self.h
        inputs = self.h if role == "column" else self.f
        return linear_tensors(self.structure, role, inputs, outputs, gated=self.gated, bias=True, guide=True)

    def fits(self, p: int) -> bool:
        """Whether p ranks can share f: blocks are dealt first, then what is inside a block (the rule,
        written again).
        """
        kind, blocks = self.structure.kind, self.structure.blocks or 1
        left = p // math.gcd(p, blocks)
        if kind == "block_shuffle":
            if self.f % blocks**2:
                return p == 1
            return (self.f // blocks**2) % (left // math.gcd(left, blocks)) == 0
        return (self.f // blocks) % left == 0

    def outputs_of(self, p: int, rank: int) -> Tensor:
        """Output features of the first linear that this rank holds, in order."""
        bias = self.specs("column")["bias"]
        return shard(torch.arange(bias.numel), bias, p, rank)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    kind = draw(st.sampled_from(KINDS))
    blocks = draw(st.integers(1, 6)) if kind.startswith("block") else None
    step = blocks or 1
    rank = step * draw(st.integers(1, 3)) if kind in ("low_rank", "block_dense") else None
    inside = step if kind == "block_shuffle" and draw(st.booleans()) else 1
    f = step * inside * draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    h = step * draw(st.integers(1, 5))
    return Pair(build_structure(kind, rank, blocks), h, f, draw(st.booleans()))


RANKS = st.integers(1, 12)


@settings(max_examples=300, deadline=None)
@given(pairs(), RANKS, st.sampled_from(["column", "row"]))
def test_parts_tile_every_tensor_once_and_come_together_again(pair: Pair, p: int, role: Role) -> None:
    assume(pair.fits(p))
    for name, spec in pair.specs(role).items():
        full = torch.arange(spec.numel).reshape(spec.shape)
        parts = [shard(full, spec, p, rank) for rank in range(p)]
        for part in parts:
            assert tuple(part.shape) == spec.local_shape(p), name
            assert part.is_contiguous()
        assert torch.equal(unshard(parts, spec), full), name
        if spec.cut is None:
            assert all(torch.equal(part, full) for part in parts), f"{name} is replicated"
        else:
            held = torch.cat([part.reshape(-1) for part in parts])
            assert torch.equal(held.sort().values, full.reshape(-1)), f"{name}: every element once"
            assert spec.numel == p * math.prod(spec.local_shape(p))
        dim = spec.partition_dim(p)
        assert (
            dim == -1
            if spec.cut is None or not spec.cut.axes
            else p == 1 or spec.local_shape(p)[dim] < spec.shape[dim]
        )


@settings(max_examples=200, deadline=None)
@given(pairs(), RANKS, st.sampled_from(["column", "row"]))
def test_ranks_that_do_not_fit_are_refused(pair: Pair, p: int, role: Role) -> None:
    """By the rule that the config and the linears state, and by the cuts themselves."""
    assert bool(list(pair.structure.tensor_parallel_problems(Size("f", pair.f), Size("p", p)))) == (
        not pair.fits(p)
    )
    for name, spec in pair.specs(role).items():
        if spec.cut is None or pair.fits(p):
            spec.local_shape(p)
            continue
        for call in (
            lambda spec=spec: spec.local_shape(p),
            lambda spec=spec: shard(torch.zeros(spec.shape), spec, p, 0),
        ):
            with pytest.raises(ValueError, match=f"{p} tensor-parallel ranks do not divide"):
                call()
        assert name != "bias" or role == "column"


@settings(max_examples=200, deadline=None)
@given(pairs(), RANKS)
def test_first_linear_writes_the_layout_that_the_second_reads(pair: Pair, p: int) -> None:
    assume(pair.fits(p))
    column, row, f = pair.specs("column"), pair.specs("row"), pair.f
    wide = column["weight" if pair.structure.kind == "dense" else "guide"]
    narrow = row["weight" if pair.structure.kind == "dense" else "guide"]
    gates = 2 if pair.gated else 1
    for rank in range(p):
        written = pair.outputs_of(p, rank)
        rows = shard(torch.arange(wide.numel).reshape(wide.shape), wide, p, rank)[:, 0] // wide.shape[1]
        assert torch.equal(rows, written), "the guide's rows are the bias's"
        read = shard(torch.arange(narrow.numel).reshape(narrow.shape), narrow, p, rank)[0]
        for gate, part in enumerate(written.chunk(gates)):
            assert torch.equal(part - gate * f, read), (
                "each half of a gated pair holds the features the second linear reads"
            )


@settings(max_examples=200, deadline=None)
@given(pairs(), RANKS)
@example(Pair(build_structure("block_shuffle", blocks=4), 8, 16, False), 4)  # turned
@example(Pair(build_structure("block_shuffle", blocks=4), 4, 32, True), 4)  # not worth it
def test_factors_hold_the_features_of_the_layout_in_order(pair: Pair, p: int) -> None:
    """Label every entry of a wide factor with the inner feature it makes or reads, cut the labels, compare
    with the layout.
    """
    assume(pair.fits(p))
    kind, blocks, f = pair.structure.kind, pair.structure.blocks or 1, pair.f
    outputs = 2 * f if pair.gated else f
    name_out, name_in = {
        "dense": ("weight", "weight"),
        "low_rank": ("up", "down"),
        "block_dense": ("up", "block_in"),
        "block_shuffle": ("block_out", "block_in"),
    }[kind]
    made, read = pair.specs("column")[name_out], pair.specs("row")[name_in]
    if kind == "block_shuffle":  # row s of block l makes feature s*B + l
        labels_out = (torch.arange(outputs // blocks)[None, :] * blocks + torch.arange(blocks)[:, None])[
            ..., None
        ]
    else:
        labels_out = torch.arange(outputs)[:, None]
    labels_in = torch.arange(f).reshape(blocks, 1, f // blocks)  # input i of block k reads feature k*f/B + i
    labels_in = labels_in if kind.startswith("block") else labels_in.reshape(1, f)
    for rank in range(p):
        part = shard(labels_out.expand(made.shape).contiguous(), made, p, rank)[..., 0]
        in_order = (
            part.t().reshape(-1) if kind == "block_shuffle" else part
        )  # as shuffled_block_diagonal lays them out
        assert torch.equal(in_order, pair.outputs_of(p, rank))
        taken = shard(labels_in.expand(read.shape).contiguous(), read, p, rank)
        expected = pair.outputs_of(p, rank)[: f // p]
        if kind == "block_shuffle" and p > f / min(pair.h, f) + 1 and blocks % p == 0:
            expected = torch.arange(f).chunk(p)[
                rank
            ]  # features are exchanged for whole blocks before they are read
        assert torch.equal(taken[:, 0].reshape(-1) if taken.dim() == 3 else taken[0], expected)


@settings(max_examples=200, deadline=None)
@given(pairs(), RANKS)
def test_ranks_share_the_groups_of_blocks_evenly(pair: Pair, p: int) -> None:
    assume(pair.fits(p))
    for spec in (*pair.specs("column").values(), *pair.specs("row").values()):
        groups = spec.block_groups(p)
        assert len(groups) == p
        assert {groups.count(group) for group in range(max(groups) + 1)} == {p // (max(groups) + 1)}
        if len(spec.shape) < 3 or spec.cut is None:
            assert max(groups) == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 12), st.integers(1, 16))
def test_block_shuffle_takes_the_cheaper_of_its_two_routes(
    blocks: int, width: int, inner: int, p: int
) -> None:
    """What its second linear receives in forward, as it is cut and as it would be the other way."""
    h, f, group = blocks * width, blocks * blocks * inner, TrafficGroup(p, p, sequence=True)
    structure = build_structure("block_shuffle", blocks=blocks)
    assume(Pair(structure, h, f, False).fits(p))
    specs = linear_tensors(structure, "row", f, h)
    cut = specs["block_in"].cut
    assert cut is not None

    def received(many_from: int) -> Fraction:
        other = {**specs, "block_in": TensorSpec(specs["block_in"].shape, replace(cut, many_from=many_from))}
        return total(structured_linear(group, structure, "row", f, h, other), "forward")

    assert received(cut.many_from) == min(received(0), received(p + 1))


@pytest.mark.parametrize(
    ("p", "features"),
    [
        (2, [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]),  # a block each
        (
            4,
            [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]],
        ),  # then half a block's input blocks
        (8, [[0, 2], [4, 6], [8, 10], [12, 14], [1, 3], [5, 7], [9, 11], [13, 15]]),
    ],
)
def test_block_shuffle_golden(p: int, features: list[list[int]]) -> None:
    pair = Pair(build_structure("block_shuffle", blocks=2), 4, 16, gated=False)
    assert [pair.outputs_of(p, rank).tolist() for rank in range(p)] == features
    gated = Pair(pair.structure, 4, 16, gated=True)
    assert [gated.outputs_of(p, rank).tolist() for rank in range(p)] == [
        part + [i + 16 for i in part] for part in features
    ]


def test_every_first_linear_cuts_whole_gate_pairs() -> None:
    pair = Pair(build_structure("low_rank", rank=2), 4, 6, gated=True)
    assert [pair.outputs_of(3, rank).tolist() for rank in range(3)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]


def test_what_is_replicated_and_what_is_cut() -> None:
    def cut(kind: FFNKind, role: Role) -> set[str]:
        specs = Pair(build_structure(kind, 4, 2), 8, 16, gated=False).specs(role)
        return {name for name, spec in specs.items() if spec.cut is not None}

    assert [cut("dense", role) for role in ("column", "row")] == [{"weight", "bias"}, {"weight"}]
    assert [cut("low_rank", role) for role in ("column", "row")] == [
        {"up", "guide", "bias"},
        {"down", "guide"},
    ]
    assert [cut("block_dense", role) for role in ("column", "row")] == [
        {"up", "guide", "bias"},
        {"block_in", "guide"},
    ]
    assert [cut("block_shuffle", role) for role in ("column", "row")] == [
        {"block_out", "guide", "bias"},
        {"block_in", "guide"},
    ]


def test_a_dense_linear_has_no_guide_and_factors_come_in_order_of_use() -> None:
    assert list(linear_tensors(build_structure("dense"), "row", 4, 2, guide=True)) == ["weight"]
    specs = Pair(build_structure("block_dense", 4, 2), 8, 16, gated=True).specs("column")
    assert {name: spec.shape for name, spec in specs.items()} == {
        "block_in": (2, 2, 4),
        "up": (32, 4),
        "guide": (32, 8),
        "bias": (32,),
    }
    assert list(specs) == ["block_in", "up", "guide", "bias"]


def test_shard_refuses_another_shape_and_starts_another_rank() -> None:
    spec = TensorSpec((4, 2), Cut((4, 2), (0,)))
    with pytest.raises(ValueError, match="split table says"):
        shard(torch.zeros(2, 4), spec, 2, 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            shard(torch.zeros(4, 2), spec, 2, rank)


def test_block_shuffle_that_cannot_be_cut_is_whole_on_one_rank() -> None:
    layout = build_structure("block_shuffle", blocks=4).layout(12)  # 16 does not divide 12
    assert layout.axes == ()
    assert math.prod(layout.view) == 12
