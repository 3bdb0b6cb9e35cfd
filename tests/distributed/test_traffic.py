"""What a step sends: the ledger's counts equal the formulas, the formulas equal the published table."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec import loading
from sffn_dist.spec.split_table import linear_tensors
from sffn_dist.spec.traffic import (
    TrafficGroup,
    Transfer,
    dense_linear,
    feed_forward,
    layer_traffic,
    model_traffic,
    total,
)
from sffn_dist.structured.registry import build_structure

LINEARS = Path(__file__).with_name("linear_cases.py")
TRAINING = Path(__file__).with_name("training_cases.py")
MODELS = Path(__file__).with_name("model_cases.py")
# kind, rank, blocks, h, f
SHAPES: dict[int, list[tuple[str, int | None, int | None, int, int]]] = {
    2: [
        ("dense", None, None, 16, 64),
        ("low_rank", 4, None, 16, 64),
        ("block_dense", 8, 4, 16, 64),
        ("block_dense", 6, 1, 16, 64),
        ("block_shuffle", None, 4, 16, 64),
        ("block_shuffle", None, 1, 16, 64),
        ("block_dense", 9, 3, 12, 72),  # neither divides the other
        ("block_shuffle", None, 3, 12, 72),
    ],
    4: [
        ("dense", None, None, 16, 64),
        ("low_rank", 4, None, 16, 64),
        ("block_dense", 8, 4, 16, 64),
        ("block_dense", 8, 2, 16, 64),
        ("block_shuffle", None, 4, 16, 64),
        ("block_shuffle", None, 2, 16, 64),
        ("block_dense", 12, 6, 12, 72),
        ("block_shuffle", None, 6, 12, 72),
        ("block_shuffle", None, 4, 24, 48),  # f + h < p h: the features are turned
    ],
}


def table(
    kind: str, rank: int | None, blocks: int | None, h: int, f: int, p: int, t: int
) -> dict[str, Fraction]:
    """The table written out: elements a token and rank, each x (p-1)/p, the gradients' for t tokens."""
    b, r = blocks or 1, rank or 0
    g = math.gcd(
        b,
        p,
        # groups of blocks; where ranks are more, BlockShuffle's second linear cuts q groups of the other
        # blocks too
    )
    q = math.gcd(b, p // g)
    part = Fraction(p - 1, p)

    def summed(width: int, chunks: int) -> Fraction:  # without SP
        return Fraction(width) if chunks == p else width + Fraction(width, chunks)

    if kind == "dense":
        columns = 2 * h, 3 * h, 0, 2 * h, 2 * h
    elif kind == "low_rank":
        columns = 2 * r, 2 * r, Fraction(4 * h * r, t), 2 * r, 2 * r
    elif kind == "block_dense":
        columns = (
            r + Fraction(r, g),
            r + Fraction(r, g),
            Fraction(2 * h * r * (1 + b), b * t),
            summed(r, g),
            2 * r,
        )
    elif g == p and f + h < p * h:
        both = Fraction(h, p) + Fraction(f + h, p)
        columns = both, both, Fraction(4 * h * h, b * t), Fraction(f, p) + h, Fraction(f, p) + h
    else:
        both = Fraction(h, g) + Fraction(h, q)
        columns = both, both, Fraction(4 * h * h, b * t), summed(h, q), summed(h, g)
    names = ("forward", "backward", "gradient", "forward without SP", "backward without SP")
    return {name: part * column for name, column in zip(names, columns, strict=True)}


@pytest.mark.parametrize(("p", "shape"), [(p, shape) for p in SHAPES for shape in SHAPES[p]], ids=str)
def test_the_table(ranks: Callable[..., Any], p: int, shape: tuple[Any, ...]) -> None:
    """The ledger of p ranks, per token, equals the table, for every structure, with and without sequence
    parallelism.
    """
    expected = table(*shape, p, 12)
    for sequence in (True, False):
        found = ranks(p, p).run(LINEARS, "traffic", **case(shape, sequence=sequence, rows=4, batch=3))
        assert all(counts == found[0] for counts in found), "ranks receive different amounts"
        sums: dict[str, Fraction] = defaultdict(Fraction)
        for (_, purpose, _), elements in found[0].items():
            sums[purpose] += elements / 12
        suffix = "" if sequence else " without SP"
        assert sums["forward"] == expected[f"forward{suffix}"]
        assert sums["backward"] == expected[f"backward{suffix}"]
        assert sums["gradient"] == (expected["gradient"] if sequence else 0)


def case(shape: tuple[Any, ...], **more: Any) -> dict[str, Any]:
    return {
        **dict(zip(("kind", "rank", "blocks", "h", "f"), shape, strict=True)),
        "gated": False,
        "alpha": None,
        "recompute": "none",
        "rows": 8,
        "batch": 3,
        **more,
    }


def by_kind(moved: Iterable[Transfer]) -> dict[tuple[str, str], Fraction]:
    sums: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    for one in moved:
        sums[one.purpose, one.kind] += one.elements
    return {key: elements for key, elements in sums.items() if elements}


@pytest.mark.parametrize(("p", "shape"), [(p, shape) for p in SHAPES for shape in SHAPES[p]], ids=str)
def test_layers_send_what_is_predicted(ranks: Callable[..., Any], p: int, shape: tuple[Any, ...]) -> None:
    """By purpose and kind of collective: gated or not, with the guide, keeping the bottlenecks alone."""
    kind, rank, blocks, h, f = shape
    switches = itertools.product([True, False], [True, False], [None, 0.5], ["none", "bottleneck"])
    for sequence, gated, alpha, recompute in switches:
        if kind == "dense" and (alpha or recompute != "none"):
            continue
        arguments = case(shape, sequence=sequence, gated=gated, alpha=alpha, recompute=recompute)
        group = TrafficGroup(p, 24, sequence)
        expected = feed_forward(
            group, build_structure(kind, rank, blocks), h, f, gated=gated, narrow=recompute == "bottleneck"
        )
        if alpha:
            expected += [*dense_linear(group, "column", h, h), *dense_linear(group, "row", h, h)]
        found: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        for (place, purpose, way), elements in ranks(p, p).run(LINEARS, "traffic", **arguments)[0].items():
            assert place in ("linear_fc1", "linear_fc2")
            found[purpose, way] += elements
        assert found == by_kind(expected), arguments


def tree(kind: str, sequence: bool, **extra: Any) -> dict[str, Any]:
    model = {
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "attention_dim": 32,
        "sequence": 8,
        "vocab": 64,
    }
    return {
        "model": {**model, **extra.pop("model", {})},
        "ffn": {"kind": kind, "width": 64, "rank": 8, "blocks": 4, "dense_layers": [0]},
        "guide": {"mode": "fixed_step", "fraction": 0.5},
        "train": {"steps": 4, "global_batch_size": 2, "micro_batch_size": 2},
        "parallel": {"tensor": 2, "sequence": sequence},
        "recompute": "none",
        **extra,
    }


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("low_rank", {}),
        ("block_dense", {"recompute": "full"}),
        (
            "block_shuffle",
            {"recompute": "bottleneck", "model": {"activation": "swiglu", "norm": "rmsnorm", "bias": False}},
        ),
        ("low_rank", {"recompute": "bottleneck", "model": {"tie_embeddings": False}}),
        ("low_rank", {"recompute": "full", "model": {"kv_heads": 1}}),
    ],
    ids=["plain", "full", "bottleneck-swiglu", "bottleneck-untied", "one-key-value-head"],
)
@pytest.mark.parametrize("sequence", [True, False])
def test_models_send_what_is_predicted(
    ranks: Callable[..., Any], kind: str, sequence: bool, extra: dict[str, Any]
) -> None:
    """Every collective of a micro-batch over the tensor-parallel group, by place, purpose and kind, in
    elements and bytes.
    """
    for guided in (False, True):
        config = loading.from_tree(tree(kind, sequence, **extra))
        expected: dict[tuple[str, str, str], list[Fraction]] = defaultdict(lambda: [Fraction(), Fraction()])
        moved = model_traffic(config)
        if guided:
            moved += [
                Transfer(one.purpose, one.kind, one.elements, f"decoder.layers.{layer}.{one.place}")
                for layer in range(config.model.layers)
                for one in layer_traffic(config, layer, guide=True)
            ]
        for one in moved:
            sums = expected[one.place, one.purpose, one.kind]
            sums[0] += one.elements
            sums[1] += one.elements * (one.size or 4)
        found = ranks(2, 2).run(MODELS, "traffic", tree=tree(kind, sequence, **extra), guided=guided)[0]
        assert found == {key: tuple(sums) for key, sums in expected.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_receives_what_the_plan_says(ranks: Callable[..., Any], stage: int) -> None:
    """A step of the engine with two micro-batches, gradients once; ZeRO adds nothing to the tensor-parallel
    group's forward, backward, gradients.
    """
    train = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2}
    config = {**tree("block_dense", True, recompute="bottleneck"), "train": train, "zero": {"stage": stage}}
    for found, planned in ranks(2, 2).run(TRAINING, "received", tree=config):
        assert found == {purpose: planned[purpose] for purpose in found}
        assert all(found.values())
        assert planned["bytes"] == 4 * sum(found.values())


def test_one_rank_sends_nothing() -> None:
    config = loading.from_tree({**tree("low_rank", True), "parallel": {"tensor": 1, "sequence": True}})
    assert model_traffic(config) == []
    specs = linear_tensors(build_structure("low_rank", 8), "column", 16, 64)
    assert all(spec.block_groups(1) == (0,) for spec in specs.values())
    assert total([]) == 0
