"""Structured matrices: the map is its dense meaning, from_dense is the optimum, initialisation is the
paper's.

The references are written from the paper's formulas with plain loops, not with the package's own maps.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sffn_dist.structured import functional
from sffn_dist.structured.functional import from_dense
from sffn_dist.structured.linalg import truncated_svd
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

# (structure, inputs N, outputs M): square, wide, tall, odd sizes, bottlenecks that the blocks do not divide
# evenly
CASES = [
    (build_structure("dense"), 5, 7),
    *((build_structure("low_rank", rank=r), n, m) for r, n, m in [(3, 7, 5), (1, 4, 9), (5, 5, 5)]),
    *(
        (build_structure("block_dense", r, b), n, m)
        for r, b, n, m in [(6, 3, 9, 7), (4, 2, 6, 3), (3, 1, 5, 7), (8, 4, 8, 16)]
    ),
    *(
        (build_structure("block_shuffle", blocks=b), n, m)
        for b, n, m in [(2, 8, 16), (3, 9, 27), (3, 6, 15), (4, 16, 8), (1, 3, 5)]
    ),
    (build_structure("block_shuffle", blocks=3), 21, 6),
]
STRUCTURED = [case for case in CASES if case[0].kind != "dense"]


def label(value: object) -> str:
    return f"{value.kind}-R{value.rank}-B{value.blocks}" if isinstance(value, Structure) else str(value)


every_case = pytest.mark.parametrize(("structure", "inputs", "outputs"), CASES, ids=label)
structured_cases = pytest.mark.parametrize(("structure", "inputs", "outputs"), STRUCTURED, ids=label)


def random_factors(structure: Structure, inputs: int, outputs: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = structure.factor_shapes(inputs, outputs)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def reference(structure: Structure, factors: Mapping[str, Tensor], inputs: int, outputs: int) -> Tensor:
    """The dense (M, N) matrix, entry by entry, differentiable in the factors."""
    if structure.kind == "dense":
        return factors["weight"]
    if structure.kind == "low_rank":
        return factors["up"] @ factors["down"]
    b = structure.needed_blocks
    if structure.kind == "block_dense":
        return factors["up"] @ torch.block_diag(*factors["block_in"])
    v, u = factors["block_in"], factors["block_out"]
    per_block, columns = min(inputs, outputs) // b, inputs // b
    rows = []
    for row in range(outputs):
        s, l = divmod(row, b)  # y[s*B + l] = sum_r U[l, s, r] z[r*B + l]
        total = torch.zeros(inputs, dtype=torch.float64)
        for r in range(per_block):
            k, q = divmod(r * b + l, per_block)  # z[k, q] = sum_p V[k, q, p] x[k*N/B + p], flattened
            before, after = torch.zeros(k * columns).double(), torch.zeros((b - 1 - k) * columns).double()
            total = total + u[l, s, r] * torch.cat([before, v[k, q], after])
        rows.append(total)
    return torch.stack(rows)


@every_case
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (3, 0, 2), (1, 1, 5)], ids=str)
def test_forward_is_the_dense_matrix(
    structure: Structure, inputs: int, outputs: int, leading: tuple[int, ...]
) -> None:
    factors = random_factors(structure, inputs, outputs)
    dense = reference(structure, factors, inputs, outputs)
    x = torch.randn(*leading, inputs, dtype=torch.float64)
    y = functional.apply(structure, x, factors)
    assert y.shape == (*leading, outputs)
    torch.testing.assert_close(y, x @ dense.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(functional.to_dense(structure, factors), dense, rtol=1e-12, atol=1e-12)
    assert functional.to_dense(structure, factors).is_contiguous()


@every_case
def test_forward_of_what_is_not_contiguous(structure: Structure, inputs: int, outputs: int) -> None:
    factors = random_factors(structure, inputs, outputs)
    dense = reference(structure, factors, inputs, outputs)
    wide = torch.randn(4, inputs, 3, 2, dtype=torch.float64)
    for x in (
        wide[:, :, 0, 0],
        wide.permute(3, 0, 2, 1),
        wide[::2, :, 1].transpose(1, 2),
        torch.randn(1, inputs).double().expand(5, -1),
    ):
        torch.testing.assert_close(
            functional.apply(structure, x, factors), x @ dense.t(), rtol=1e-12, atol=1e-12
        )
    strided = {
        name: factor.transpose(-1, -2).contiguous().transpose(-1, -2) for name, factor in factors.items()
    }
    torch.testing.assert_close(
        functional.apply(structure, wide[..., 0, 0], strided), wide[..., 0, 0] @ dense.t()
    )


@every_case
def test_gradients_are_those_through_the_dense_matrix(
    structure: Structure, inputs: int, outputs: int
) -> None:
    factors = {
        name: factor.requires_grad_() for name, factor in random_factors(structure, inputs, outputs).items()
    }
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    sent = torch.randn(3, 2, outputs, dtype=torch.float64).transpose(
        0, 1
    )  # a gradient that is not contiguous
    ours = torch.autograd.grad(functional.apply(structure, x, factors), [x, *factors.values()], sent)
    dense = reference(structure, factors, inputs, outputs)
    theirs = torch.autograd.grad(x @ dense.t(), [x, *factors.values()], sent)
    for name, got, expected in zip(["x", *factors], ours, theirs, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@structured_cases
def test_gradcheck(structure: Structure, inputs: int, outputs: int) -> None:
    factors = {
        name: factor.requires_grad_() for name, factor in random_factors(structure, inputs, outputs).items()
    }
    x = torch.randn(2, inputs, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional.apply(structure, x, dict(zip(factors, values, strict=True)))

    assert torch.autograd.gradcheck(run, (x, *factors.values()))


# ------------------------------------------------------------------------------------------------- from_dense


def optimum(structure: Structure, matrix: Tensor) -> float:
    """Least squared error of the structure, by Eckart-Young: the tail of every block's singular values."""
    outputs, inputs = matrix.shape
    b = structure.blocks or 1
    if structure.kind in ("low_rank", "block_dense"):
        blocks = [(part, structure.needed_rank // b) for part in matrix.split(inputs // b, dim=1)]
    else:
        per_block, n = min(inputs, outputs) // b, inputs // b
        blocks = []
        for k in range(b):
            joined = [
                feature % b for feature in range(k * per_block, (k + 1) * per_block)
            ]  # the output blocks that k feeds
            blocks += [(matrix[l::b, k * n : (k + 1) * n], joined.count(l)) for l in range(b)]
    return sum(float(torch.linalg.svdvals(part)[rank:].square().sum()) for part, rank in blocks)


def squared_error(structure: Structure, factors: Mapping[str, Tensor], matrix: Tensor) -> float:
    dense = reference(structure, factors, matrix.shape[1], matrix.shape[0])
    return float((dense - matrix).square().sum())


@every_case
def test_from_dense_reaches_the_optimum_and_no_random_step_improves_it(
    structure: Structure, inputs: int, outputs: int
) -> None:
    matrix = torch.randn(outputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factors = from_dense(structure, matrix)
    assert {name: tuple(factor.shape) for name, factor in factors.items()} == structure.factor_shapes(
        inputs, outputs
    )
    error = squared_error(structure, factors, matrix)
    best = 0.0 if structure.kind == "dense" else optimum(structure, matrix)
    assert error == pytest.approx(best, rel=1e-9, abs=1e-20)
    for trial in range(20):
        noise = random_factors(structure, inputs, outputs, seed=trial)
        moved = {name: factor + 1e-3 * noise[name] for name, factor in factors.items()}
        assert squared_error(structure, moved, matrix) > error


@every_case
def test_from_dense_gives_back_what_has_the_structure(
    structure: Structure, inputs: int, outputs: int
) -> None:
    dense = reference(structure, random_factors(structure, inputs, outputs), inputs, outputs)
    again = reference(structure, from_dense(structure, dense), inputs, outputs)
    torch.testing.assert_close(again, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("structure", "inputs", "outputs"),
    [
        (build_structure("low_rank", rank=5), 5, 8),
        (build_structure("low_rank", rank=5), 8, 5),
        (build_structure("block_dense", 6, 2), 6, 9),
    ],
    ids=label,
)
def test_from_dense_at_full_rank_is_exact(structure: Structure, inputs: int, outputs: int) -> None:
    matrix = torch.randn(outputs, inputs, dtype=torch.float64)
    factors = from_dense(structure, matrix)
    torch.testing.assert_close(functional.to_dense(structure, factors), matrix, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_from_dense_is_the_optimum_for_any_shape(blocks: int, rank: int, n: int, m: int, seed: int) -> None:
    matrix = torch.randn(
        m * blocks, n * blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    for structure in (
        build_structure("low_rank", rank=rank),
        build_structure("block_dense", rank * blocks, blocks),
        build_structure("block_shuffle", blocks=blocks),
    ):
        error = squared_error(structure, from_dense(structure, matrix), matrix)
        assert error == pytest.approx(optimum(structure, matrix), rel=1e-9, abs=1e-18)


def test_truncated_svd_pads_a_rank_beyond_the_matrix_and_halves_the_singular_values() -> None:
    matrix = torch.randn(3, 4, dtype=torch.float64)
    left, right = truncated_svd(matrix, 5)
    assert (left.shape, right.shape) == ((3, 5), (5, 4))
    torch.testing.assert_close(left @ right, matrix)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(left[:, :3].norm(dim=0), values.sqrt())
    torch.testing.assert_close(right[:3].norm(dim=1), values.sqrt())
