"""Block-diagonal products by Triton: every tiling, any strides, split sums; the operation under its
checks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sffn_kernels import block_diagonal, dispatch
from sffn_kernels.launching import Tile
from torch import Tensor

ours = pytest.importorskip("sffn_kernels.block_diagonal_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
TILES = pytest.mark.parametrize("tile", ours.CONFIGS, ids=lambda tile: tile.name)


def swapped(x: Tensor) -> Tensor:
    """The same values with the last two dimensions' strides swapped: Monarch's shuffle as a view."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert got.dtype == dtype
    if expected.numel() and expected.any():
        assert (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt() < TOLERANCE[
            dtype
        ]
    else:
        assert not got.any()


@TILES
@pytest.mark.parametrize("view", [lambda x: x, swapped], ids=["by block", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tiling(tile: Tile, view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Tokens, inputs and outputs that no tile divides; 3 blocks; an output in the shuffled order too."""
    for tokens in (0, 1, 150):
        x, weight, grad = (
            torch.randn(shape, device=DEVICE).to(dtype)
            for shape in ((tokens, 3, 96), (3, 70, 96), (tokens, 3, 70))
        )
        x64, weight64, grad64 = x.double(), weight.double(), grad.double()
        forward = torch.einsum("tki,koi->tko", x64, weight64)
        close(ours.product(view(x), view(weight), tile), forward, dtype)
        out = view(torch.empty(tokens, 3, 70, dtype=dtype, device=DEVICE))
        assert ours.product(view(x), weight, tile, out) is out
        close(out, forward, dtype)
        close(
            ours.input_gradient(view(grad), view(weight), tile),
            torch.einsum("tko,koi->tki", grad64, weight64),
            dtype,
        )
        close(
            ours.weight_gradient(view(grad), view(x), tile), torch.einsum("tko,tki->koi", grad64, x64), dtype
        )


def test_a_long_sum_is_split_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_TOKENS", 64)
    x, grad = torch.randn(391, 2, 20, device=DEVICE), torch.randn(391, 2, 10, device=DEVICE)
    seen: list[torch.Size] = []
    batched = ours.batched
    monkeypatch.setattr(
        ours, "batched", lambda a, b, out, tile: (seen.append(out.shape), batched(a, b, out, tile))
    )
    first, again = (ours.weight_gradient(grad, x, ours.CONFIGS[3]) for _ in range(2))
    assert seen[0] == (6, 2, 10, 20), "six partial sums"
    assert torch.equal(first, again)
    close(first, torch.einsum("tko,tki->koi", grad.double(), x.double()), torch.float32)


@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_interleaved(setting: str) -> None:
    x, weight = torch.randn(2, 9, 3, 10, device=DEVICE), torch.randn(3, 7, 10, device=DEVICE)
    with dispatch.using(setting):
        y = block_diagonal.interleaved_product(x, weight)
    assert y.is_contiguous()
    close(y, torch.einsum("abki,koi->abok", x.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_the_operation(setting: str) -> None:
    x = torch.randn(7, 12, device=DEVICE, requires_grad=True)
    weight = torch.randn(3, 5, 4, device=DEVICE, requires_grad=True)
    with dispatch.using(setting):
        torch.library.opcheck(torch.ops.sffn.block_diagonal.default, (x.view(7, 3, 4), weight))
        for op in (block_diagonal.block_diagonal, block_diagonal.shuffled_block_diagonal):
            results = []
            for way in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
                x.grad = weight.grad = None
                y = way(x, weight)
                y.square().sum().backward()
                results.append((y.detach(), x.grad, weight.grad))
            for eager, compiled in zip(*results, strict=True):
                torch.testing.assert_close(compiled, eager)


def test_the_kernel_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ours, "batched", lambda a, b, out, tile: seen.append(tile.name))
    with dispatch.using("triton"):
        block_diagonal.product(torch.ones(2, 2, 2, device=DEVICE), torch.ones(2, 2, 2, device=DEVICE))
        assert seen
        seen.clear()
        block_diagonal.product(torch.ones(2, 2, 2).double(), torch.ones(2, 2, 2).double())
        assert not seen, "float64 is plain torch's"
    with dispatch.using("torch"):
        block_diagonal.product(torch.ones(2, 2, 2, device=DEVICE), torch.ones(2, 2, 2, device=DEVICE))
    assert not seen
