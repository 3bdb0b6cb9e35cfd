"""p ranks equal one device: output and every gradient of a structured feed-forward layer, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sffn_kernels.bottleneck import at_a_time

from sffn_dist.spec import loading
from sffn_dist.spec.feed_forward_activations import FeedForward, rebuilt_at_once
from sffn_dist.spec.layer_activations import MicroBatch
from sffn_dist.spec.split_table import ffn_structure

CASES = Path(__file__).with_name("linear_cases.py")
NAIVE = Path(__file__).with_name("naive_cases.py")
# kind, rank, blocks, h, f: odd sizes, blocks of 3, fewer blocks than ranks, and BlockShuffle's features
# turned (f + h < p h)
SHAPES: dict[int, list[tuple[str, int | None, int | None, int, int]]] = {
    1: [("low_rank", 7, None, 15, 33), ("block_dense", 9, 3, 15, 33), ("block_shuffle", None, 3, 15, 33)],
    2: [
        ("low_rank", 6, None, 15, 22),
        ("block_dense", 12, 4, 20, 24),
        ("block_dense", 6, 1, 15, 22),
        ("block_shuffle", None, 2, 14, 44),
        ("block_shuffle", None, 4, 20, 48),
        ("block_shuffle", None, 4, 68, 48),
        ("block_shuffle", None, 1, 15, 22),
        ("block_dense", 9, 3, 15, 24),
        ("block_shuffle", None, 3, 15, 36),
    ],
    4: [
        ("low_rank", 4, None, 15, 20),
        ("block_dense", 8, 2, 14, 20),
        ("block_dense", 8, 8, 16, 24),
        ("block_dense", 12, 6, 12, 24),
        ("block_shuffle", None, 6, 12, 72),
        ("block_shuffle", None, 2, 14, 40),
        ("block_shuffle", None, 4, 20, 64),
        ("block_shuffle", None, 4, 20, 48),
        ("block_shuffle", None, 1, 15, 20),
    ],
}  # fmt: skip
SWITCHES = list(itertools.product(*[[False, True]] * 4, ["none", "bottleneck"]))


@pytest.mark.parametrize("shape", [(world, *shape) for world in SHAPES for shape in SHAPES[world]], ids=str)
def test_ranks_equal_one_device(ranks: Callable[..., Any], shape: tuple[Any, ...]) -> None:
    world, kind, rank, blocks, h, f = shape
    for gated, bias, sequence, guided, recompute in SWITCHES:
        if sequence and world == 1:
            continue
        arguments: dict[str, Any] = {
            "kind": kind, "rank": rank, "blocks": blocks, "h": h, "f": f, "gated": gated, "bias": bias,
            "recompute": recompute, "sequence": sequence, "alpha": 0.3 if guided else None,
            "rows": 3 * world if sequence else 5, "batch": 3,
        }  # fmt: skip
        for errors in ranks(world, world).run(CASES, "feed_forward_errors", **arguments):
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < 1e-12, f"{worst}: {errors[worst]:.1e} in {arguments}"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "rank", "blocks", "share"),
    [("low_rank", 16, None, 1 / 5), ("block_dense", 24, 4, 1 / 5), ("block_shuffle", None, 4, 1 / 3)],
)
def test_the_bottlenecks_alone_are_kept(
    ranks: Callable[..., Any], world: int, kind: str, rank: int | None, blocks: int | None, share: float
) -> None:
    """At a third of the dense parameters (h 64, f 256); what is kept is x and both bottlenecks, each split
    over the ranks.
    """
    sizes = {"h": 64, "f": 256, "rows": 16, "gated": False, "sequence": world > 1}

    def kept(kind: str, rank: int | None, blocks: int | None, recompute: str) -> list[int]:
        structure = {"kind": kind, "rank": rank, "blocks": blocks, "recompute": recompute}
        return ranks(world, world).run(CASES, "saved_bytes", **structure, **sizes)

    dense, ours = kept("dense", None, None, "none"), kept(kind, rank, blocks, "bottleneck")
    assert dense == [8 * 16 * (64 + 2 * 256) // world] * world
    assert ours == [8 * 16 * (64 + 2 * (rank or 64)) // world] * world
    assert max(ours) <= share * min(dense)
    usual = kept(kind, rank, blocks, "none")
    assert max(ours) < min(usual) / 2
    # what the plan's estimate of memory takes a layer to keep beside its input
    ffn = {"kind": kind, "width": 256, "rank": rank, "blocks": blocks, "dense_layers": []}
    for gated in (False, True):
        sizes["gated"] = gated
        activation = "swiglu" if gated else "gelu"
        config = loading.from_tree(
            {
                "model": {
                    "layers": 1,
                    "width": 64,
                    "heads": 4,
                    "sequence": 16,
                    "vocab": 64,
                    "activation": activation,
                },
                "ffn": ffn,
                "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
                "parallel": {"tensor": world, "sequence": True},
            }
        )
        for recompute in ("none", "bottleneck"):
            part = MicroBatch(config.model_copy(update={"recompute": recompute}), 8, False, False)
            planned = part.stream + FeedForward(part, ffn_structure(config, 0)).kept
            assert kept(kind, rank, blocks, recompute) == [planned] * world
    sizes["gated"] = False
    # without sequence parallelism x is whole on every rank, and z but for the chunk that block_shuffle's
    # first linear reads
    sizes["sequence"] = False
    assert kept("dense", None, None, "none") == [8 * 16 * (64 + 2 * 256 // world)] * world
    narrow = 64 + 64 // world if kind == "block_shuffle" else 2 * (rank or 0)
    assert kept(kind, rank, blocks, "bottleneck") == [8 * 16 * (64 + narrow)] * world


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize(
    ("kind", "rank", "blocks"), [("low_rank", 4, None), ("block_dense", 8, 2), ("block_shuffle", None, 2)]
)
def test_any_leading_dimensions(
    ranks: Callable[..., Any], kind: str, rank: int | None, blocks: int | None, recompute: str
) -> None:
    """As Megatron's own layer takes them; few tokens without a gradient are decoded."""
    found = ranks(1, 1).run(
        CASES, "any_leading_dimensions", kind=kind, rank=rank, blocks=blocks, recompute=recompute
    )
    assert max(found) < 1e-12


def test_peak_of_a_layer(ranks: Callable[..., Any]) -> None:
    """At 32% of the parameters, of many tokens: with recompute: bottleneck a quarter of what the dense
    layer's passes hold.
    """
    sizes = {"h": 32, "f": 128, "rows": 40_960}

    def peak(kind: str, rank: int | None, blocks: int | None, recompute: str) -> int:
        return ranks(1, 1).run(
            CASES, "peak_bytes", kind=kind, rank=rank, blocks=blocks, recompute=recompute, **sizes
        )[0]

    dense = peak("dense", None, None, "none")
    x = 8 * 40_960 * 32
    assert dense >= 3 * 4 * x  # y, gelu(y) and a gradient of that size
    assert peak("low_rank", 8, None, "bottleneck") <= dense / 4
    assert peak("block_dense", 12, 4, "bottleneck") <= dense / 4
    assert peak("block_shuffle", None, 4, "bottleneck") <= dense / 2
    assert peak("low_rank", 8, None, "none") > dense / 2
    for tokens in (1, 1024, 1025, 24_577, 40_960):  # what the plan takes for granted
        assert rebuilt_at_once(tokens) == at_a_time(tokens)


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    ("kind", "rank", "blocks"), [("low_rank", 4, None), ("block_dense", 8, 2), ("block_shuffle", None, 2)]
)
def test_other_uses(
    ranks: Callable[..., Any], kind: str, rank: int | None, blocks: int | None, sequence: bool, recompute: str
) -> None:
    """Autocast computes in its precision; what is frozen is neither computed nor summed; a second
    derivative is refused, not wrong.
    """
    arguments = {"kind": kind, "rank": rank, "blocks": blocks, "sequence": sequence, "recompute": recompute}
    for found in ranks(2, 2).run(CASES, "other_uses", **arguments):
        casts, error = found["autocast"]
        assert casts
        assert error < 0.03
        assert found["frozen"] < 1e-6
        assert found["summed"] == 0
        assert found["last"] < 1e-6
        if recompute == "none":
            assert found["last_backward"] == 0, "nothing needs to travel for the last factor's gradient"
        assert "once_differentiable" in found["twice"]
        assert found["guide"].startswith("guide_weight = 0.5")
        own = "tokens" if sequence else "replicated"
        assert found["tokens"] == [own, "caller", own]


@pytest.mark.parametrize(
    ("kind", "rank", "blocks"), [("low_rank", 4, None), ("block_dense", 8, 2), ("block_shuffle", None, 2)]
)
def test_what_is_frozen_while_guided_changes_no_other_gradient(
    ranks: Callable[..., Any], kind: str, rank: int | None, blocks: int | None
) -> None:
    for recompute in ("none", "bottleneck"):
        for sequence in (True, False):
            options = {
                "kind": kind,
                "rank": rank,
                "blocks": blocks,
                "sequence": sequence,
                "recompute": recompute,
            }
            assert max(ranks(2, 2).run(CASES, "frozen_guided", **options)) < 1e-12
        assert max(ranks(1).run(CASES, "frozen_guided", **{**options, "sequence": False})) < 1e-12


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    "structure",
    [
        {"kind": "low_rank", "rank": 6},
        {"kind": "block_dense", "rank": 8, "blocks": 4},
        {"kind": "block_shuffle", "blocks": 4},
    ],
    ids=lambda structure: structure["kind"],
)
def test_the_naive_split_computes_the_same(
    ranks: Callable[..., Any], structure: dict[str, Any], sequence: bool
) -> None:
    """What the benchmark compares with is the same layer."""
    for inputs, outputs in ((16, 32), (32, 16)):
        for error in ranks(2, 2).run(
            NAIVE, "error", structure=structure, inputs=inputs, outputs=outputs, sequence=sequence
        ):
            assert error < 1e-4
