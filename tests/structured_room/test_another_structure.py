"""A structure that the package does not know, declared in this file alone: it trains, reshards, is planned
and exported like the others.

W = A (x) B, a Kronecker pair: A ``left`` (M/k, N/k), B ``right`` (k, k), k = ``ffn.blocks``. With x as a
matrix X (N/k, k), y = A X B^T. Column use applies B first and cuts the rows of A, row use applies A first and
cuts its columns: another order for each role, a bottleneck of h features, weights that are used more than
once a token. Nothing of it is as in the package's own structures.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.run_folder import folder_of
from sffn_dist.conversion.hf.export import export
from sffn_dist.conversion.verification import compare_logits, differences
from sffn_dist.spec import counts, loading, plan
from sffn_dist.spec.config import ConfigError
from sffn_dist.structured import functional, registry
from sffn_dist.structured.cut import Cut, Layout, Role
from sffn_dist.structured.products import Product
from sffn_dist.structured.structure import Shapes, Size, Structure, StructuredMatrix, divisor_problems
from sffn_dist.structured.structure_ops import Factors, StructureOps


class Kronecker(Structure):
    """``right`` (k, k), ``left`` (M/k, N/k)."""

    kind = "kronecker"
    settings = ("blocks",)
    factors = ("right", "left")

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        k = self.needed_blocks
        return {"right": (k, k), "left": (outputs // k, inputs // k)}

    def factor_order(self, role: Role) -> tuple[str, ...]:
        return ("right", "left") if role == "column" else ("left", "right")

    def bottleneck(self, inputs: int, outputs: int) -> int:
        return min(inputs, outputs)  # h, which size_problems keeps below f

    def multiplications(self, inputs: int, outputs: int) -> int:
        return outputs * inputs // self.needed_blocks + min(inputs, outputs) * self.needed_blocks

    @classmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        k = shapes["right"][0]
        return StructuredMatrix(cls(blocks=k), shapes["left"][0] * k, shapes["left"][1] * k)

    def layout(self, features: int) -> Layout:
        return Layout((features // self.needed_blocks, self.needed_blocks), (0,))

    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        rows, columns = self.factor_shapes(inputs, outputs)["left"]
        if role == "column":
            return "left", Cut((*gate, rows // math.prod(gate), columns), (len(gate),))
        return "left", Cut((rows, columns), (1,))

    def size_problems(self, outer: Size, inner: Size, prefix: str = "") -> Any:
        yield from divisor_problems(f"{prefix}blocks", self.blocks, outer, inner)
        if outer.value > inner.value:
            yield (
                f"{outer.name} = {outer.value}: must not exceed {inner.name} = {inner.value} for "
                f"{prefix}kind = {self.kind}"
            )


class Left:
    """X (n, k) -> A X."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (weight @ x.unflatten(-1, (weight.shape[1], -1))).flatten(-2)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return (weight.t() @ grad.unflatten(-1, (weight.shape[0], -1))).flatten(-2)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        rows, columns = grad.unflatten(-1, (weight.shape[0], -1)), x.unflatten(-1, (weight.shape[1], -1))
        return (rows @ columns.transpose(-1, -2)).flatten(0, -3).sum(0)


class Right:
    """X (n, k) -> X B^T."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, weight.shape[1])) @ weight.t()).flatten(-2)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return (grad.unflatten(-1, (-1, weight.shape[0])) @ weight).flatten(-2)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        k = weight.shape[0]
        return grad.reshape(-1, k).t() @ x.reshape(-1, k)


class KroneckerOps(StructureOps):
    """The nearest Kronecker product is a rank-1 approximation of the matrix's entries in another order
    (Van Loan).
    """

    def products(self, role: Role) -> tuple[Product, Product]:
        return (Right(), Left()) if role == "column" else (Left(), Right())

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        pairs = factors["left"] @ x.unflatten(-1, (factors["left"].shape[1], -1)) @ factors["right"].t()
        return pairs.flatten(-2)

    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        k = self.structure.needed_blocks
        rows, columns = matrix.shape[0] // k, matrix.shape[1] // k
        u, s, vh = torch.linalg.svd(
            matrix.view(rows, k, columns, k).transpose(1, 2).reshape(rows * columns, k * k)
        )
        root = s[0].sqrt()
        return {"right": (root * vh[0]).view(k, k), "left": (root * u[:, 0]).view(rows, columns)}


def register() -> None:
    if Kronecker.kind not in registry.kinds():
        registry.register(Kronecker, KroneckerOps)


if "RANK" in os.environ:  # ranks read this file once for every case
    register()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Other tests of this process know the built-in structures alone."""
    register()
    yield
    del registry._registered[Kronecker.kind]


LAYERS, H, F, K, VOCAB, SEQUENCE = 2, 32, 64, 4, 64, 16
STEPS, SAVED = 9, 4  # guided in steps 2 to 5: saved while it lasts


def tree(run: Path, *, tensor: int = 1, model: dict[str, Any] | None = None, **over: Any) -> dict[str, Any]:
    return {
        "model": {
            "layers": LAYERS,
            "width": H,
            "heads": 4,
            "sequence": SEQUENCE,
            "vocab": VOCAB,
            **(model or {}),
        },
        "ffn": {"width": F, "kind": "kronecker", "blocks": K},
        "guide": {"mode": "window", "begin": 2, "end": 6, "stochastic": True},
        # an epsilon above the noise in gradients that are 0 by symmetry
        "train": {
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "epsilon": 1e-5,
        },
        "parallel": {"tensor": tensor, "sequence": tensor > 1},
        "checkpoint": {"keep": 9},
        "run": {"dir": str(run)},
        **over,
    }


def train(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """In a rank: the same as training_cases.train, which loads no other structure than the registered
    ones.
    """
    spec = importlib.util.spec_from_file_location(
        "training_cases", Path(__file__).parents[1] / "distributed" / "training_cases.py"
    )
    assert spec
    assert spec.loader
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    result: dict[str, Any] = training.train(tree, steps=steps)
    return result


def logits_difference(a: str, b: str) -> float:
    """In a process of its own, since a model joins a process group."""
    return compare_logits(Path(a), Path(b)).largest


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_two_ranks_with_a_guide_equal_one(ranks: Callable[..., Any], tmp_path: Path, gated: bool) -> None:
    """Losses, weights and moments; the second rank's run is resumed from the first one's checkpoint,
    resharded.
    """
    model = {"activation": "swiglu" if gated else "gelu"}
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    start = ranks(1).run(__file__, "train", tree=tree(one, model=model), steps=SAVED)[0]
    alone = ranks(1).run(__file__, "train", tree=tree(one, model=model), steps=STEPS)[0]
    pair = ranks(2, 2).run(__file__, "train", tree=tree(two, tensor=2, model=model), steps=STEPS)
    curve = [*start["losses"], *alone["losses"]]
    assert curve[0] - curve[-1] > 0.1, "it learns"
    assert 0 < sum(pair[0]["drawn"]) < 4 * 2 * LAYERS, "guides were drawn, and were not"
    assert np.abs(np.subtract(curve, pair[0]["losses"])).max() < 1e-5
    assert pair[0]["replicas"] == pair[1]["replicas"] == []
    saved = Manifest.read(folder_of(one, SAVED))
    made = reshard.reshard(saved, folder_of(resumed, SAVED), tensor=2)
    assert made.tensor_parallel == 2
    assert list(differences(saved, made)) == []
    again = ranks(2, 2).run(__file__, "train", tree=tree(resumed, tensor=2, model=model), steps=STEPS)[0]
    assert again["start"] == SAVED
    assert np.abs(np.subtract(alone["losses"], again["losses"])).max() < 1e-5


def test_the_plan_has_its_parameters_and_flops(tmp_path: Path) -> None:
    """A layer of K: two matrices of A and B each, FLOPs 6 a multiplication; the first layer is dense."""
    config = loading.from_tree(tree(tmp_path))
    left, right, biases = F * H // K**2, K * K, F + H
    planned = plan.plan(config, world=1)
    assert planned["ffn"] == {"kind": "kronecker", "width": F, "blocks": K, "dense_layers": [0]}
    assert planned["parameters_by_part"]["ffn_structured"] == 2 * (left + right) + biases
    assert planned["guide_parameters"] == 2 * F * H
    products = 2 * (F * H // K + H * K)
    dense = counts.all_dense(config)
    saved = 6 * (2 * F * H - products)
    assert planned["flops_per_step"] == (counts.flops_per_token(dense) - saved) * 4 * SEQUENCE
    assert planned["guide_flops_per_guided_step"] == 6 * 2 * F * H * 4 * SEQUENCE


def test_it_is_exported_merged_and_refused_structured(
    ranks: Callable[..., Any], nursery: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plain = tree(run, guide={"mode": "off"})
    ranks(1).run(__file__, "train", tree=plain, steps=2)
    weights = Reader(Manifest.read(folder_of(run, 2))).weights()
    folder = export(weights, tmp_path / "merged", ffn="merged", dtype="fp32")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Starcoder2ForCausalLM"]
    assert nursery(__file__, "logits_difference", a=str(folder), b=str(folder_of(run, 2))) < 1e-4
    with pytest.raises(ConfigError, match=r"ffn\.kind = kronecker: modeling_sffn\.py does not compute it"):
        export(weights, tmp_path / "structured", ffn="structured", dtype="fp32")
    assert not (tmp_path / "structured").exists()


def test_its_map_is_its_dense_matrix_and_its_rules_are_the_configs(tmp_path: Path) -> None:
    structure = registry.build_structure("kronecker", blocks=2)
    factors = {
        name: torch.randn(shape, dtype=torch.float64)
        for name, shape in structure.factor_shapes(6, 10).items()
    }
    dense = functional.to_dense(structure, factors)
    torch.testing.assert_close(dense, torch.kron(factors["left"], factors["right"]))
    torch.testing.assert_close(functional.to_dense(structure, functional.from_dense(structure, dense)), dense)
    with pytest.raises(ConfigError) as error:
        loading.from_tree(tree(tmp_path, tensor=8, ffn={"kind": "kronecker", "width": 60, "blocks": 5}))
    assert {"ffn.blocks = 5: must divide model.width = 32"} < set(error.value.problems)
    assert any(
        text.startswith("ffn.width = 60: must be divisible by parallel.tensor = 8")
        for text in error.value.problems
    )
    with pytest.raises(ConfigError, match=r'ffn\.blocks: missing; ffn\.kind = "kronecker" needs it'):
        loading.from_tree(tree(tmp_path, ffn={"kind": "kronecker"}))


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(ValueError, match="kind = 'kronecker': registered already"):
        registry.register(Kronecker, KroneckerOps)
