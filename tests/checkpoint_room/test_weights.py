"""Weights by name: merged into dense ones, approximated by structured ones."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.weights import Weights, approximated, merged
from sffn_dist.conversion import inspection
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import ffn_structure, model_tensors
from sffn_dist.structured.functional import to_dense

FFN: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "rank": 6},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 4},
}


def random(
    ffn: dict[str, Any], *, guide: bool = False, alpha: float = 0.0, activation: str = "gelu"
) -> Weights:
    model = {"layers": 2, "width": 16, "heads": 4, "sequence": 8, "vocab": 32, "activation": activation}
    config = loading.from_tree(
        {"model": model, "ffn": {"width": 32, **ffn}, "train": {"steps": 1, "global_batch_size": 8}}
    )
    specs = model_tensors(config, guide=guide)

    def full(name: str) -> torch.Tensor:
        return torch.randn(
            specs[name].shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )

    return Weights(config, full, "drawn", guide=guide, alpha=alpha)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("kind", FFN)
def test_merged_is_the_product_and_the_guide_with_its_weight(kind: str, guide: bool, activation: str) -> None:
    weights = random(FFN[kind], guide=guide, alpha=0.3 if guide else 0.0, activation=activation)
    dense = merged(weights)
    assert dense.config.ffn.kind == "dense"
    assert dense.names() == list(model_tensors(dense.config, guide=False))
    for name in dense.names():
        if not name.startswith("decoder.layers.1.mlp") or not name.endswith("weight"):
            assert torch.equal(
                dense.full(name), weights.full(name)
            )  # what is not structured, layer 0 with it
            continue
        prefix = name.removesuffix("weight")
        leaves = {"low_rank": ("up", "down"), "block_dense": ("up", "block_in")}.get(
            kind, ("block_out", "block_in")
        )
        factors = {
            leaf: weights.full(prefix + leaf) for leaf in leaves
        }  # in the other order than they are applied in
        expected = to_dense(ffn_structure(weights.config, 1), factors)
        if guide:
            expected = 0.7 * expected + 0.3 * weights.full(f"{prefix}guide")
        torch.testing.assert_close(dense.full(name), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FFN)
def test_approximated_keeps_the_rest_and_the_dense_matrices_as_guides(kind: str) -> None:
    dense = random({"kind": "dense"})
    made = approximated(dense, {**FFN[kind], "dense_layers": (1,)}, guide=True)
    assert made.names() == list(model_tensors(made.config, guide=True))
    assert made.alpha == 1.0
    for name in made.names():
        source = name.replace(".guide", ".weight")
        if source in dense.names():
            assert torch.equal(made.full(name), dense.full(source))
    back = merged(made)  # alpha 1: the model is the one that it came from
    assert all(
        torch.equal(back.full(name), dense.full(name)) for name in dense.names() if ".mlp." not in name
    )
    for name in (name for name in dense.names() if ".mlp." in name):
        torch.testing.assert_close(back.full(name), dense.full(name), rtol=0, atol=1e-5)


def test_approximated_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"ffn\.rank = 99: must not exceed"):
        approximated(random({"kind": "dense"}), {"kind": "low_rank", "rank": 99})
    with pytest.raises(ConfigError, match=r"ffn\.blocks: missing"):
        approximated(random({"kind": "dense"}), {"kind": "block_shuffle"})


def test_an_import_keeps_the_weight_of_its_guides(tmp_path: Path) -> None:
    """Whatever its step and schedule say; resharding keeps it too."""
    weights = random(FFN["low_rank"], guide=True, alpha=0.6)
    made = reshard.write_weights(dataclasses.replace(weights, step=7), tmp_path / "a")
    for manifest in (made, reshard.reshard(made, tmp_path / "b", tensor=2)):
        back = Reader(manifest).weights()
        assert (back.alpha, back.guide, back.step) == (0.6, True, 7)
        assert inspection.describe(manifest, spectra=False)["alpha"] == 0.6
        assert json.loads((manifest.folder / "start.json").read_text())["guide"] == {"mode": "fixed_step"}
        assert manifest.damage(manifest.files) == []


def test_nothing_is_near_what_is_not_finite() -> None:
    dense = random({"kind": "dense"})
    spoilt = dataclasses.replace(dense, full=lambda name: dense.full(name) * float("nan"))
    with pytest.raises(ConfigError, match=r"mlp\.linear_fc1\.weight holds values that are not finite"):
        approximated(spoilt, FFN["low_rank"]).full("decoder.layers.1.mlp.linear_fc1.up")
