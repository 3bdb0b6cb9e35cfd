"""The communication ledger counts what is known by hand: every collective, Megatron's linears, a model, an
optimiser step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sffn_dist.parallel.ledger import Ledger, LedgerEntry
from sffn_dist.spec import loading
from sffn_dist.spec.traffic import zero_traffic

CASES = Path(__file__).with_name("ledger_cases.py")
TOKENS, H = 12, 6
# by Megatron's own linears on 2 ranks: (kind, place, purpose) -> elements a token, times h (p-1)/p
WITH_SEQUENCE = {
    ("all_gather", "linear_fc1", "forward"): 1,
    ("reduce_scatter", "linear_fc2", "forward"): 1,
    ("all_gather", "linear_fc2", "backward"): 1,
    ("all_gather", "linear_fc1", "backward"): 1,  # x once more, for the weight gradient
    ("reduce_scatter", "linear_fc1", "backward"): 1,
}
WITHOUT_SEQUENCE = {("all_reduce", "linear_fc2", "forward"): 2, ("all_reduce", "linear_fc1", "backward"): 2}
# name of the case -> kind, elements that rank 0 and rank 1 receive, bytes an element
COLLECTIVES: dict[str, tuple[str, int, int, int]] = {
    "all_reduce": ("all_reduce", 6, 6, 4),
    "async": ("all_reduce", 6, 6, 4),
    "bf16": ("all_reduce", 6, 6, 2),
    "coalesced": ("all_reduce", 7, 7, 4),
    "coalesced_all_gather": ("all_gather", 11, 11, 4),
    "coalesced_reduce_scatter": ("reduce_scatter", 5, 5, 4),
    "all_gather": ("all_gather", 5, 5, 4),
    "all_gather_into_tensor": ("all_gather", 5, 5, 4),
    "reduce_scatter": ("reduce_scatter", 5, 5, 4),
    "reduce_scatter_tensor": ("reduce_scatter", 5, 5, 4),
    "all_to_all_even": ("all_to_all", 6, 6, 4),
    "all_to_all_uneven": ("all_to_all", 6, 3, 4),
    "all_to_all_empty": ("all_to_all", 0, 0, 4),
    "broadcast": ("broadcast", 0, 5, 4),
    "scatter": ("scatter", 0, 5, 4),
    "gather": ("gather", 0, 5, 4),
    "reduce": ("reduce", 0, 5, 4),
    "barrier": ("barrier", 0, 0, 4),
    "functional_all_reduce": ("all_reduce", 6, 6, 4),
    "functional_all_gather": ("all_gather", 5, 5, 4),
    "functional_reduce_scatter": ("reduce_scatter", 3, 3, 4),
    "functional_all_to_all": ("all_to_all", 6, 3, 4),
    "functional_broadcast": ("broadcast", 0, 5, 4),
}


def tree(**extra: Any) -> dict[str, Any]:
    return {
        "model": {
            "layers": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "attention_dim": 16,
            "sequence": 16,
            "vocab": 64,
        },
        "ffn": {"width": 64, "kind": "dense"},
        "guide": {"mode": "off"},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2},
        **extra,
    }


@pytest.mark.parametrize(("sequence", "expected"), [(True, WITH_SEQUENCE), (False, WITHOUT_SEQUENCE)])
def test_megatrons_linears(
    ranks: Callable[..., Any], sequence: bool, expected: dict[tuple[str, str, str], int]
) -> None:
    for rows in ranks(2, 2).run(
        CASES, "megatron_linears", h=H, f=8, rows=4, batch=TOKENS // 4, sequence=sequence
    ):
        half = TOKENS * H // 2
        assert {(row.kind, row.place, row.purpose): row.elements for row in rows} == {
            k: n * half for k, n in expected.items()
        }
        assert all((row.group, row.calls, row.bytes) == ("tensor", 1, 4 * row.elements) for row in rows)


def test_every_collective(ranks: Callable[..., Any]) -> None:
    by_rank = ranks(2, 2).run(CASES, "each_collective")
    for name, (kind, *received, size) in COLLECTIVES.items():
        for elements, rows in zip(received, by_rank, strict=True):
            assert rows.pop(name) == [
                LedgerEntry(kind, "ranks 0,1", "", "other", 1, Fraction(elements), Fraction(elements * size))
            ], name
    assert by_rank[0] == {
        "send": [LedgerEntry("send", "ranks 0,1", "", "other", 1, Fraction(0), Fraction(0))]
    }
    assert by_rank[1] == {
        "send": [LedgerEntry("recv", "ranks 0,1", "", "other", 1, Fraction(5), Fraction(20))]
    }


def test_groups_are_told_by_themselves_and_not_by_their_ranks(ranks: Callable[..., Any]) -> None:
    for rows, refusal in ranks(2, 2).run(CASES, "labels"):
        assert [(row.group, row.elements) for row in rows] == [("tensor", 2), ("all", 4)]
        assert refusal == "the labels tensor, model name 1 groups, some of them twice"


def test_a_collective_that_it_cannot_count_is_refused(ranks: Callable[..., Any]) -> None:
    for message in ranks(2, 2).run(CASES, "unknown"):
        assert message.startswith("the ledger does not know what a rank receives in _c10d_functional::isend(")


@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_places_in_modules_within_modules(ranks: Callable[..., Any], recompute: bool | None) -> None:
    again = 0 if recompute is None else 1
    for rows in ranks(2, 2).run(CASES, "nested", recompute=recompute):
        assert {(row.place, row.purpose): (row.calls, row.elements) for row in rows} == {
            ("outer.inner", "forward"): (1, 4),
            ("outer", "forward"): (1, 3),
            ("", "other"): (1, 2),
            ("outer", "backward"): (2, 8),
            ("outer.inner", "backward"): (1 + again, 4 + 4 * again),
            ("outer.inner.weight", "gradient"): (1, 4),
        }


def test_nothing_is_left_behind_by_an_exception(ranks: Callable[..., Any]) -> None:
    for hooks, rows in ranks(2, 2).run(CASES, "exception"):
        assert hooks == 0
        assert [(row.place, row.purpose, row.calls) for row in rows] == [("", "other", 1)]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_model(ranks: Callable[..., Any], recompute: str) -> None:
    """Every linear's traffic stands at its own place; what is recomputed counts as backward; no result
    changes.
    """
    config = tree(parallel={"tensor": 2, "sequence": True}, recompute=recompute)
    half = 2 * 16 * 32 // 2  # tokens x h (p-1)/p
    again = recompute == "full"
    for rows, changed in ranks(2, 2).run(CASES, "model_step", tree=config):
        assert changed == []
        got = {
            (row.kind, row.place, row.purpose): row.elements / half
            for row in rows
            if row.purpose in ("forward", "backward")
        }
        expected: dict[tuple[str, str, str], float] = {
            ("reduce_scatter", "embedding.word_embeddings", "forward"): 1,
            ("all_gather", "embedding.word_embeddings", "backward"): 1,
            ("all_gather", "output_layer", "forward"): 1,
            ("all_gather", "output_layer", "backward"): 1,
            ("reduce_scatter", "output_layer", "backward"): 1,
            ("all_reduce", "", "forward"): 3 / 16,  # the loss: maximum, target and sum of every token
        }
        for layer in ("decoder.layers.0", "decoder.layers.1"):
            for first, second in (
                ("self_attention.linear_qkv", "self_attention.linear_proj"),
                ("mlp.linear_fc1", "mlp.linear_fc2"),
            ):
                expected["all_gather", f"{layer}.{first}", "forward"] = 1
                expected["reduce_scatter", f"{layer}.{second}", "forward"] = 1
                expected["all_gather", f"{layer}.{second}", "backward"] = 1
                expected["all_gather", f"{layer}.{first}", "backward"] = 1 + again
                expected["reduce_scatter", f"{layer}.{first}", "backward"] = 1
            if again:  # but not fc2's: the recomputation ends at the last tensor that backward needs
                expected["reduce_scatter", f"{layer}.self_attention.linear_proj", "backward"] = 1
        assert got == expected
        replicated = {row.place for row in rows if row.place.endswith((".weight", ".bias"))}
        assert len(replicated) == 2 * 6 + 2, "two norms and two biases a layer, and the last norm"
        assert all(
            row.purpose in ("gradient", "other") and row.elements == 32
            for row in rows
            if row.place in replicated
        )


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimiser_step(ranks: Callable[..., Any], stage: int) -> None:
    for rows, sizes in ranks(2, 1).run(CASES, "engine_step", tree=tree(zero={"stage": stage})):
        data = {
            purpose: [row for row in rows if (row.group, row.purpose) == ("data", purpose)]
            for purpose in ("forward", "other")
        }
        parameters = sum(sizes.values())
        assert sum(row.elements for row in data["other"] if row.kind == "all_gather") == parameters // 2
        if stage == 1:
            assert not data["forward"]
            assert (
                sum(row.elements for row in data["other"] if row.kind == "all_reduce") == parameters + 1
            )  # and the norm
        else:
            assert (
                sum(row.elements for row in data["other"] if row.kind == "reduce_scatter") == parameters // 2
            )
            layer = "decoder.layers.0.mlp.linear_fc1"
            whole = sum(size for name, size in sizes.items() if name.startswith(f"{layer}."))
            assert [row.elements for row in data["forward"] if row.place == layer] == [whole // 2]
        assert all(row.elements == 0 for row in rows if row.group == "tensor"), "a group of one"


@pytest.mark.parametrize(
    ("stage", "precision", "reduce_dtype"),
    [
        *((stage, "fp32", "bf16") for stage in range(4)),  # of bf16 training alone
        *((stage, "bf16", dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    ],
)
def test_zero_sends_what_the_plan_counts(
    ranks: Callable[..., Any], stage: int, precision: str, reduce_dtype: str
) -> None:
    """Bytes over the data-parallel group in a step of one micro-step, by kind of collective."""
    config = tree(zero={"stage": stage, "reduce_dtype": reduce_dtype})
    planned: dict[str, Fraction] = defaultdict(Fraction)
    for moved in zero_traffic(loading.from_tree(config), precision, 2, guide=False):
        planned[moved.kind] += moved.elements * (moved.size or 0)
    for rows, _ in ranks(2, 1).run(CASES, "engine_step", tree=config, precision=precision):
        sent: dict[str, Fraction] = defaultdict(Fraction)
        for row in rows:
            if row.group == "data":
                sent[row.kind] += row.bytes
        if stage == 3:  # more in the first step, in which DeepSpeed learns the order of use
            assert sent["all_gather"] > planned["all_gather"]
            sent["all_gather"] = planned["all_gather"]
        for kind, size in planned.items():
            assert float(sent[kind]) == pytest.approx(float(size), rel=0.01), kind


@pytest.fixture
def three_ranks() -> Iterator[None]:
    """Rank 1 of three, which answers without the other two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("three_ranks")
def test_counts_are_exact_and_sums_select() -> None:
    parts = [torch.zeros(n) for n in (2, 5, 1)]
    model = nn.ModuleDict({"a": nn.Identity(), "ab": nn.Identity()})
    model["a"].register_forward_hook(lambda *_: dist.all_reduce(torch.zeros(5)))
    model["ab"].register_forward_hook(lambda *_: dist.all_to_all(parts, parts))
    assert dist.group.WORLD
    ledger = Ledger(model, {"all": dist.group.WORLD})
    for _ in range(2):
        with ledger:
            model["a"](torch.zeros(1))
            model["ab"](torch.zeros(1))
            dist.reduce_scatter_tensor(
                torch.zeros(7, dtype=torch.float64), torch.zeros(21, dtype=torch.float64)
            )
    assert ledger.entries == [
        LedgerEntry("all_reduce", "all", "a", "forward", 2, Fraction(40, 3), Fraction(160, 3)),
        LedgerEntry("all_to_all", "all", "ab", "forward", 2, Fraction(6), Fraction(24)),
        LedgerEntry("reduce_scatter", "all", "", "other", 2, Fraction(28), Fraction(224)),
    ]
    assert ledger.elements() == Fraction(40, 3) + 34
    assert ledger.elements(place="a") == Fraction(40, 3)
    assert (
        ledger.elements(place="")
        == ledger.elements(kind="reduce_scatter")
        == ledger.elements(purpose="other")
        == 28
    )
    with ledger, pytest.raises(RuntimeError, match="open already"):
        ledger.__enter__()
    assert ledger.elements(group="tensor") == ledger.elements(place="a", purpose="other") == 0


class _Penalty(nn.Module):
    """Takes a gradient in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        y.register_hook(lambda gradient: dist.all_reduce(gradient.clone()))
        return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.usefixtures("three_ranks")
def test_a_backward_pass_within_a_forward_is_backward() -> None:
    model = _Penalty()
    with Ledger(model, {}) as ledger:
        model(torch.ones(1, 2, requires_grad=True))
    assert [(row.place, row.purpose) for row in ledger.entries] == [("inner", "backward")]
