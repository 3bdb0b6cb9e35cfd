"""Initialisation: the singular values the paper asks for, the guide as the dense meaning, reproducible
draws.
"""

from __future__ import annotations

import pytest
import torch

from sffn_dist.structured.functional import draw, to_dense
from sffn_dist.structured.linalg import nearest_orthonormal
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

STRUCTURES = [
    build_structure("dense"),
    build_structure("low_rank", rank=6),
    build_structure("block_dense", 8, 4),
    build_structure("block_shuffle", blocks=4),
]
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.kind)
SHAPES = pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (32, 16), (16, 16)])
STD = 0.02


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dense_weights_are_normal_with_the_given_deviation() -> None:
    weight = draw(build_structure("dense"), 300, 200, STD, seeded(0))["weight"]
    assert weight.shape == (200, 300)
    assert float(weight.std()) == pytest.approx(STD, rel=0.01)  # deviation of the estimate: 0.3%
    assert abs(float(weight.mean())) < 3 * STD / 60_000**0.5
    inside = float((weight.abs() < STD).float().mean())
    assert inside == pytest.approx(0.6827, abs=0.01)


@SHAPES
def test_low_rank_is_the_truncated_svd_of_a_dense_draw(inputs: int, outputs: int) -> None:
    factors = draw(build_structure("low_rank", rank=6), inputs, outputs, STD, seeded(3))
    full = torch.randn(outputs, inputs, generator=seeded(3)) * STD  # the same draw
    u, s, vh = torch.linalg.svd(full.double(), full_matrices=False)
    product = (factors["up"] @ factors["down"]).double()
    torch.testing.assert_close(torch.linalg.svdvals(product)[:6], s[:6], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(product, (u[:, :6] * s[:6]) @ vh[:6], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors["up"].norm(dim=0).double(), s[:6].sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors["down"].norm(dim=1).double(), s[:6].sqrt(), rtol=1e-5, atol=1e-6)


@SHAPES
@pytest.mark.parametrize("structure", STRUCTURES[2:], ids=lambda structure: structure.kind)
def test_block_factors_have_singular_values_one(structure: Structure, inputs: int, outputs: int) -> None:
    factors = draw(structure, inputs, outputs, STD, seeded(1))
    assert {name: tuple(factor.shape) for name, factor in factors.items()} == structure.factor_shapes(
        inputs, outputs
    )
    for factor in factors.values():
        values = torch.linalg.svdvals(factor.double())
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)
        if factor.dim() == 3:
            assert not torch.allclose(factor[0], factor[1]), "blocks are drawn one by one"


def test_nearest_orthonormal_is_the_nearest() -> None:
    matrix = torch.randn(3, 5, 4, dtype=torch.float64, generator=seeded(2))
    nearest = nearest_orthonormal(matrix)
    torch.testing.assert_close(
        nearest.transpose(-1, -2) @ nearest, torch.eye(4).double().expand(3, 4, 4), rtol=0, atol=1e-12
    )
    distance = (matrix - nearest).square().sum()
    for seed in range(30):
        other = torch.linalg.qr(
            matrix + 0.3 * torch.randn(3, 5, 4, dtype=torch.float64, generator=seeded(seed))
        ).Q
        signs = torch.sign((other * matrix).sum(-2, keepdim=True))
        assert (matrix - other * signs).square().sum() > distance


@every_structure
def test_the_guide_is_what_the_factors_stand_for(structure: Structure) -> None:
    factors = draw(structure, 16, 32, STD, seeded(4), guide=True)
    plain = draw(structure, 16, 32, STD, seeded(4))
    assert ("guide" in factors) == (structure.kind != "dense")
    for name, factor in plain.items():
        assert torch.equal(factor, factors[name]), "a guide changes no draw"
    if structure.kind != "dense":
        assert torch.equal(factors["guide"], to_dense(structure, plain))
        assert factors["guide"].shape == (32, 16)


@every_structure
def test_draws_are_reproducible_by_seed(structure: Structure) -> None:
    first, second, other = (draw(structure, 16, 32, STD, seeded(seed), guide=True) for seed in (5, 5, 6))
    for name, factor in first.items():
        assert torch.equal(factor, second[name])
        assert not torch.allclose(factor, other[name], atol=1e-4), f"{name} does not depend on the seed"
        assert factor.dtype == torch.float32
        assert not factor.requires_grad


@every_structure
def test_a_generator_keeps_the_draw_apart_from_the_global_one(structure: Structure) -> None:
    torch.manual_seed(0)
    first = draw(structure, 16, 32, STD, seeded(7))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = draw(structure, 16, 32, STD, seeded(7))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["low_rank", "block_dense", "block_shuffle", "dense"])
def test_factors_are_computed_on_the_given_device(kind: str) -> None:
    """Of the generator's numbers: the host's singular value decompositions of a large model take minutes."""
    structure = build_structure(kind, rank=8, blocks=2)
    plain = draw(structure, 16, 32, STD, seeded(4), guide=True)
    here = draw(structure, 16, 32, STD, seeded(4), guide=True, device=torch.device("cpu"))
    assert all(torch.equal(plain[name], here[name]) for name in plain)
    elsewhere = draw(structure, 16, 32, STD, seeded(4), guide=True, device=torch.device("meta"))
    assert {name: (factor.device.type, factor.shape) for name, factor in elsewhere.items()} == {
        name: ("meta", factor.shape) for name, factor in plain.items()
    }
