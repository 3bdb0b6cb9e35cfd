"""The guided mix: both products in one accumulator, by kernel and by plain torch, against float64."""

from __future__ import annotations

import pytest
import torch
from sffn_kernels import dispatch, mix
from torch import Tensor

ours = pytest.importorskip("sffn_kernels.mix_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
ALPHAS = [0.0, 1e-6, 0.3, 0.5, 0.9, 1.0]


def drawn(tokens: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    """[x, W, z, U, b]."""
    shapes = ((tokens, 70), (83, 70), (tokens, 33), (83, 33), (83,))
    made: list[Tensor | None] = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype) for shape in shapes
    ]
    return made if bias else [*made[:4], None]


def truth(tensors: list[Tensor | None], alpha: float) -> Tensor:
    x, guide, z, second, bias = (None if tensor is None else tensor.double() for tensor in tensors)
    y = alpha * (x @ guide.t()) + (1 - alpha) * (z @ second.t())  # type: ignore[operator, union-attr]
    return y if bias is None else y + bias


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    if expected.numel():
        assert (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt() < TOLERANCE[
            got.dtype
        ]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tiling(alpha: float, dtype: torch.dtype) -> None:
    for tile in ours.CONFIGS:
        for tokens, bias in ((0, True), (1, False), (150, True)):
            tensors = drawn(tokens, dtype, bias)
            *four, b = tensors
            close(ours.mixed(*four, alpha, b, tile), truth(tensors, alpha))
            transposed = [tensor.t().contiguous().t() for tensor in four if tensor is not None]
            close(ours.mixed(*transposed, alpha, b, tile), truth(tensors, alpha))


@pytest.mark.parametrize("setting", ["torch", "triton"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients(setting: str, alpha: float) -> None:
    with dispatch.using(setting):
        for bias in (True, False):
            tensors = drawn(20, torch.float32, bias)
            leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
            high = [
                None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors
            ]
            y = mix.apply(*leaves[:4], alpha, leaves[4])  # type: ignore[arg-type]
            expected = truth(high, alpha)
            close(y, expected)
            sent = torch.randn_like(y)
            y.backward(sent)
            expected.backward(sent.double())
            for got, want in zip(leaves, high, strict=True):
                if got is not None and want is not None and want.grad is not None and want.grad.any():
                    assert got.grad is not None
                    close(got.grad, want.grad)


@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_checks(setting: str) -> None:
    with dispatch.using(setting):
        leaves = [tensor.requires_grad_() for tensor in drawn(5, torch.float32) if tensor is not None]
        torch.library.opcheck(torch.ops.sffn.mix.default, (*leaves[:4], 0.3, leaves[4]))
        small = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((3, 4), (5, 4), (3, 2), (5, 2), (5,))
        ]
        assert torch.autograd.gradcheck(
            lambda *four_and_b: mix.apply(*four_and_b[:4], 0.3, four_and_b[4]), small
        )
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha = .*: must be within"):
            mix.apply(*drawn(1, torch.float32)[:4], alpha)  # type: ignore[arg-type]
