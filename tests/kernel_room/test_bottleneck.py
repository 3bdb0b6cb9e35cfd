"""From bottleneck to bottleneck: plain torch, the operation with autograd, and every Triton tiling,
against the formula in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sffn_kernels import bottleneck, bottleneck_plain, dispatch
from sffn_kernels.launching import Tile
from torch import Tensor

bottleneck_triton = pytest.importorskip("sffn_kernels.bottleneck_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
ACTIVATIONS = ["gelu", "gelu_erf", "swiglu"]


class Case(NamedTuple):
    """Sizes of a shard: L blocks of U with R inputs each (L = 0: a matrix), K blocks of V (0: a matrix), f
    features, O outputs.
    """

    blocks: int
    inputs: int
    k: int
    features: int
    outputs: int


CASES = {
    "low_rank": Case(0, 96, 0, 207, 50),
    "block_dense": Case(0, 40, 3, 210, 48),
    "block_shuffle": Case(3, 33, 3, 189, 51),
    "shuffle then dense": Case(2, 20, 5, 130, 35),
    "shuffle then matrix": Case(3, 17, 0, 99, 40),
}
SHARDS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def shard(
    case: Case, activation: str, dtype: torch.dtype, tokens: int, bias: bool = True, seed: int = 0
) -> list[Tensor | None]:
    """[z, U, b, V, dL/dout]."""
    generator = torch.Generator().manual_seed(seed)
    rows = case.features * (2 if activation == "swiglu" else 1)

    def draw(*shape: int) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .div(math.sqrt(shape[-1]))
            .to(DEVICE, dtype)
        )

    l, k = case.blocks, case.k
    z = draw(tokens, l, case.inputs) if l else draw(tokens, case.inputs)
    second = draw(l, rows // l, case.inputs) if l else draw(rows, case.inputs)
    first = draw(k, case.outputs // k, case.features // k) if k else draw(case.outputs, case.features)
    return [z, second, draw(rows) if bias else None, first, draw(tokens, case.outputs)]


def formula(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    """Written down from the paper's index form, in the public order of the features: s*L + l."""
    y = torch.einsum("tlr,lsr->tsl", z, second).flatten(1) if second.dim() == 3 else z @ second.t()
    y = y if bias is None else y + bias
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        a = gate / (1 + torch.exp(-gate)) * up
    elif activation == "gelu":
        a = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    else:
        a = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    if first.dim() == 2:
        return a @ first.t()
    return torch.einsum("tki,koi->tko", a.unflatten(-1, (first.shape[0], -1)), first).flatten(1)


def truth(tensors: list[Tensor | None], activation: str) -> list[Tensor | None]:
    """[out, and the gradients of z, U, b, V] in float64."""
    *inputs, grad = [None if tensor is None else tensor.double().clone() for tensor in tensors]
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in inputs]
    out = formula(*leaves, activation)  # type: ignore[arg-type]
    out.backward(grad)
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def compare(got: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert ours.dtype == dtype
            if theirs.numel() and theirs.any():
                error = (ours.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
                assert error < TOLERANCE[dtype]
            else:
                assert not ours.any()


def computed(tensors: list[Tensor | None], activation: str, *, keep: bool) -> list[Tensor | None]:
    """[out, gradients] by the module's own forward and backward."""
    z, second, bias, first, grad = tensors
    weights = (z, second, bias, first, activation)
    out, kept = bottleneck.forward(*weights, keep=keep)  # type: ignore[arg-type]
    assert (kept is None) == (not keep)
    return [out, *bottleneck.backward(grad, *weights, kept)]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ plain torch


@SHARDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_plain_torch(case: Case, activation: str, keep: bool, tokens: int) -> None:
    for bias in (True, False):
        tensors = shard(case, activation, torch.float64, tokens, bias)
        with dispatch.using("torch"):
            compare(computed(tensors, activation, keep=keep), truth(tensors, activation), torch.float64)


@SHARDS
def test_some_tokens_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, the last one shorter: the same, and dL/dz is handed over once, complete, before the
    weights' gradients are.
    """
    tensors = shard(case, "swiglu", torch.float64, 37)
    monkeypatch.setattr(bottleneck, "at_a_time", lambda tokens: 8)
    compare(computed(tensors, "swiglu", keep=False), truth(tensors, "swiglu"), torch.float64)
    handed: list[Tensor] = []
    z, second, bias, first, grad = tensors
    arguments = (
        grad,
        z,
        second,
        bias,
        first,
        "swiglu",
        None,
        bottleneck.EVERYTHING,
        lambda found: handed.append(found.clone()),
    )
    found = bottleneck.backward(*arguments)  # type: ignore[arg-type]
    assert len(handed) == 1
    assert torch.equal(handed[0], found.z)


@pytest.mark.parametrize("keep", [True, False])
def test_sums_over_parts_are_held_in_fp32(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """In bf16 a hundred parts summed in bf16 would be wrong by a percent or more."""
    tensors = shard(CASES["low_rank"], "gelu", torch.bfloat16, 1600)
    monkeypatch.setattr(bottleneck, "at_a_time", lambda tokens: 16)
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 5e-3)
    with dispatch.using("torch"):
        compare(computed(tensors, "gelu", keep=keep), truth(tensors, "gelu"), torch.bfloat16)


def test_what_is_frozen_is_not_computed() -> None:
    z, second, bias, first, grad = shard(CASES["block_shuffle"], "gelu", torch.float32, 5)
    for wanted in (
        bottleneck.BottleneckNeedsGrad(first=False),
        bottleneck.BottleneckNeedsGrad(z=False),
        bottleneck.BottleneckNeedsGrad(second=False, bias=False),
    ):
        tensors = (grad, z, second, bias, first)
        found = bottleneck.backward(*tensors, "gelu", None, wanted)  # type: ignore[arg-type]
        assert [gradient is not None for gradient in found] == list(wanted)


@settings(max_examples=40, deadline=None)
@given(
    l=st.integers(0, 4),
    k=st.integers(0, 4),
    run=st.integers(1, 5),
    r=st.integers(1, 6),
    o=st.integers(1, 3),
    t=st.integers(0, 5),
)
def test_any_sizes(l: int, k: int, run: int, r: int, o: int, t: int) -> None:
    case = Case(l, r, k, max(l, 1) * max(k, 1) * run, max(k, 1) * o)
    for activation in ("gelu", "swiglu"):
        tensors = shard(case, activation, torch.float64, t)
        compare(computed(tensors, activation, keep=True), truth(tensors, activation), torch.float64)


def test_what_does_not_fit_is_refused() -> None:
    z, second, bias, first, _ = shard(CASES["low_rank"], "gelu", torch.float32, 3)
    assert first is not None
    with pytest.raises(ValueError, match=r"activation = 'relu': must be one of gelu, gelu_erf, swiglu"):
        bottleneck.apply(z, second, bias, first, "relu")  # type: ignore[arg-type]
    blocks = torch.zeros(2, 9, 5)  # 9 columns do not make up 2 blocks of V
    assert not bottleneck_plain.fits(blocks, torch.zeros(2, 3, 9), "gelu")
    with pytest.raises(ValueError, match="whole columns"):
        bottleneck.apply(torch.zeros(3, 2, 5), blocks, None, torch.zeros(2, 3, 9), "gelu")


# --------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("case", [Case(0, 3, 0, 4, 2), Case(2, 2, 2, 4, 2)], ids=["matrix", "blocks"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_gradcheck(case: Case, activation: str, tokens: int) -> None:
    leaves = [
        tensor.requires_grad_()
        for tensor in shard(case, activation, torch.float64, tokens)[:4]
        if tensor is not None
    ]
    assert torch.autograd.gradcheck(lambda *tensors: bottleneck.apply(*tensors, activation), leaves)


@pytest.mark.parametrize("setting", ["torch", "triton"])
@pytest.mark.parametrize("name", ["low_rank", "block_shuffle"])
def test_opcheck(name: str, setting: str) -> None:
    tensors = shard(CASES[name], "gelu", torch.float32, 5)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors[:4]]
    with dispatch.using(setting):
        torch.library.opcheck(torch.ops.sffn.bottleneck.default, (*leaves, "gelu"))


@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_compiled_and_recomputed(setting: str) -> None:
    """Under torch.compile without a graph break, and under activation checkpointing."""
    z, second, bias, first, grad = shard(CASES["block_shuffle"], "gelu", torch.float32, 7)

    def layer(z: Tensor) -> Tensor:
        return F.silu(bottleneck.apply(z, second, bias, first, "gelu"))  # type: ignore[arg-type]

    ways: list[Callable[[Tensor], Tensor]] = [
        layer,
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda z: torch.utils.checkpoint.checkpoint(layer, z, use_reentrant=False),
    ]
    results = []
    with dispatch.using(setting):
        for way in ways:
            assert z is not None
            leaf = z.clone().requires_grad_()
            out = way(leaf)
            out.backward(grad)
            results.append((out.detach(), leaf.grad))
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


# ----------------------------------------------------------------------------------------------------- Triton


def strided(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same values, none of them contiguous."""

    def spread(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() == 1:
            return tensor
        wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]

    return [spread(tensor) for tensor in tensors]


@SHARDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep", [True, False])
def test_triton(case: Case, activation: str, keep: bool) -> None:
    """The kernels that would run, at a number of tokens that no tile divides."""
    with dispatch.using("triton"):
        for dtype, change in ((torch.float32, list), (torch.float16, list), (torch.float32, strided)):
            tensors = shard(case, activation, dtype, 75, bias=change is list)
            compare(computed(change(tensors), activation, keep=keep), truth(tensors, activation), dtype)
        compare(
            computed(shard(case, activation, torch.float32, 0), activation, keep=keep),
            truth(shard(case, activation, torch.float32, 0), activation),
            torch.float32,
        )


@pytest.mark.parametrize("tile", bottleneck_triton.FORWARD, ids=lambda tile: tile.name)
@pytest.mark.parametrize("name", ["block_dense", "block_shuffle"])
def test_every_tiling_forward(name: str, tile: Tile) -> None:
    tensors = shard(CASES[name], "gelu", torch.float32, 150)
    z, second, bias, first, _ = tensors
    kept = bottleneck_triton.build(z, second, bias, first, "gelu", tile)
    out = bottleneck_plain.narrow(kept.features, first, kept.y.shape[1])  # type: ignore[arg-type]
    compare([out], truth(tensors, "gelu")[:1], torch.float32)
    with dispatch.using("torch"):
        plain = bottleneck.rebuild(z, second, bias, first, "gelu")  # type: ignore[arg-type]
    torch.testing.assert_close(kept.y, plain.y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", bottleneck_triton.BACKWARD, ids=lambda tile: tile.name)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_tiling_backward(activation: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck_triton, "BACKWARD", (tile,))
    tensors = shard(CASES["block_shuffle"], activation, torch.float32, 150)
    for keep in (True, False):
        with dispatch.using("triton"):
            compare(computed(tensors, activation, keep=keep), truth(tensors, activation), torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_every_stream(blocks: int, activation: str) -> None:
    """Up to the longest R that each takes, with more outputs than one program sums."""
    ours = bottleneck_triton
    tables = (ours.STREAMS_BLOCKS, ours.STREAMS_BLOCKS_10, ours.STREAMS_BLOCKS_GATED_10)
    for tile, outputs in dict.fromkeys(itertools.chain(*(tables if blocks else (ours.STREAMS,)))):
        case = Case(blocks, tile.k - 5, 0, 70, outputs + 3)
        tensors = shard(case, activation, torch.float32, 70)
        found = bottleneck_triton.through(*tensors[:4], activation, tile, outputs)
        compare([found], truth(tensors, activation)[:1], torch.float32)


def test_a_longer_bottleneck_than_streams_take_runs_all_the_same() -> None:
    longest = bottleneck_triton.LONGEST
    tensors = shard(Case(0, longest + 1, 0, 40, 20), "gelu", torch.float32, 20)
    assert not list(bottleneck_triton.streams(tensors[1], "gelu"))
    assert list(bottleneck_triton.streams(tensors[1][:, :longest], "gelu"))  # type: ignore[index]
    with dispatch.using("triton"):
        compare(computed(tensors, "gelu", keep=False), truth(tensors, "gelu"), torch.float32)


def test_no_wide_feature_is_written() -> None:
    """The streamed forward pass allocates its output and copies of weights, nothing of T x f elements."""
    tensors = shard(Case(2, 16, 2, 240, 24), "gelu", torch.float32, 300)
    made: list[int] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket._qualified_op_name.split("::")[1] in (
                "new_empty",
                "empty_like",
                "clone",
                "mm",
                "bmm",
                "addmm",
            ):
                made.append(out.numel())
            return out

    with dispatch.using("triton"), Seen():
        bottleneck.forward(*tensors[:4], "gelu", keep=False)  # type: ignore[arg-type]
    assert 0 < max(made) < 300 * 240 / 4
