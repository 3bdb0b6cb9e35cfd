"""Block-diagonal products against einsum, at odd shapes, with gradients; and what they keep for backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from sffn_kernels.block_diagonal import block_diagonal, shuffled_block_diagonal
from torch import Tensor, nn

Op = Callable[[Tensor, Tensor], Tensor]
BLOCKS = 3
SIZES = [
    (3, 32, 20),
    (3, 96, 7),
    (1, 5, 4),
    (5, 1, 3),
    (4, 8, 8),
]  # blocks, inputs of a block, outputs of a block


def plain_reference(x: Tensor, weight: Tensor) -> Tensor:
    """y[k, o] = sum_i w[k, o, i] x[k, i], features grouped by block."""
    blocks, _, inputs = weight.shape
    y = torch.einsum("...ki,koi->...ko", x.reshape(*x.shape[:-1], blocks, inputs), weight)
    return y.flatten(-2)


def shuffled_reference(z: Tensor, weight: Tensor) -> Tensor:
    """y[s, l] = sum_r w[l, s, r] z[r*K + l], features s*K + l."""
    blocks, _, reduced = weight.shape
    return torch.einsum("...rl,lsr->...sl", z.reshape(*z.shape[:-1], reduced, blocks), weight).flatten(-2)


both = pytest.mark.parametrize(
    ("op", "reference"),
    [(block_diagonal, plain_reference), (shuffled_block_diagonal, shuffled_reference)],
    ids=["plain", "shuffled"],
)
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["fp32", "float64"]
)


def compare(op: Op, reference: Op, x: Tensor, weight: Tensor, tolerance: float) -> None:
    """Outputs and gradients, for a gradient that is not contiguous."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    got, expected = op(x, weight), reference(x.double(), weight.double())
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    sent = torch.randn(*got.shape[::-1], dtype=x.dtype).permute(*range(got.dim())[::-1])
    ours = torch.autograd.grad(got, [x, weight], sent)
    theirs = torch.autograd.grad(expected, [x, weight], sent.double())
    for mine, right, leaf in zip(ours, theirs, (x, weight), strict=True):
        assert mine.shape == leaf.shape
        torch.testing.assert_close(mine.double(), right.double(), rtol=10 * tolerance, atol=10 * tolerance)


@both
@precisions
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("leading", [(0,), (1,), (7,), (), (2, 3)], ids=str)
def test_outputs_and_gradients_are_einsums(
    op: Op,
    reference: Op,
    dtype: torch.dtype,
    tolerance: float,
    sizes: tuple[int, int, int],
    leading: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    blocks, inputs, outputs = sizes
    weight = torch.randn(blocks, outputs, inputs, dtype=dtype) / inputs**0.5
    compare(op, reference, torch.randn(*leading, blocks * inputs, dtype=dtype), weight, tolerance)


@both
def test_inputs_and_weights_that_are_not_contiguous(op: Op, reference: Op) -> None:
    torch.manual_seed(1)
    wide = torch.randn(5, 24, 4, dtype=torch.float64)
    weights = torch.randn(3, 8, 7, dtype=torch.float64).transpose(1, 2)
    for x in (
        wide[:, :, 2],
        wide.transpose(1, 2),
        wide[::2].permute(2, 0, 1),
        torch.randn(24).double().expand(6, 24),
    ):
        compare(op, reference, x, weights, 1e-12)
        compare(op, reference, x, weights.contiguous(), 1e-12)


@pytest.mark.parametrize("cuts", [[0, 3], [0, 1, 3], [0, 1, 2, 3]], ids=str)
def test_shards_of_the_plain_product_make_up_the_whole(cuts: list[int]) -> None:
    x, weight = torch.randn(4, 15, dtype=torch.float64), torch.randn(BLOCKS, 2, 5, dtype=torch.float64)
    parts = [block_diagonal(x[:, 5 * a : 5 * b], weight[a:b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=-1), plain_reference(x, weight), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gradcheck(op: Op, reference: Op, tokens: int) -> None:
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, (x, weight))


@both
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(op: Op, reference: Op, wanted: str) -> None:
    x, weight = torch.randn(3, 6), torch.randn(3, 4, 2)
    (x if wanted == "x" else weight).requires_grad_()
    y = op(x, weight)
    got = y.grad_fn
    y.sum().backward()
    assert got is not None
    assert (x.grad is None) == (wanted != "x")
    assert (weight.grad is None) == (wanted != "weight")


@both
def test_the_parameter_itself_is_saved_for_backward(op: Op, reference: Op) -> None:
    """A saved view would keep a gathered copy of a ZeRO-3 parameter alive until backward."""
    weight = nn.Parameter(torch.randn(3, 4, 2))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        op(x, weight)
    of_weight = [
        tensor
        for tensor in saved
        if tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ]
    assert len(of_weight) == 1, "saved once"
    assert of_weight[0] is weight
    assert sum(tensor.numel() for tensor in saved) == weight.numel() + x.numel(), (
        "nothing but x and the weight"
    )
