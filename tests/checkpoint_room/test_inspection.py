"""What inspection says: position, parameters, splits, spectra against the plain SVD, damage."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import KINDS, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.weights import merged
from sffn_dist.conversion import inspection
from sffn_dist.spec import counts, loading
from sffn_dist.spec.split_table import model_tensors

FFN: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 6},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 4},
}


def checkpoint(folder: Path, kind: str, *, step: int = 4, guide: bool = False, tensor: int = 2) -> Manifest:
    model = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "sequence": 8, "vocab": 32}
    clock = {
        "guide": {"mode": "window", "begin": 2, "end": 6},
        "train": {"steps": 10, "global_batch_size": 8},
    }
    config = loading.from_tree(
        {"model": model, "ffn": {"width": 32, **FFN[kind]}, "parallel": {"tensor": tensor}, **clock}
    )
    specs = model_tensors(config, guide=guide)

    def full(name: str, what: str) -> torch.Tensor:
        return torch.randn(
            specs[name].shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}{what}".encode()))
        )

    tree = config.model_dump(mode="json")
    header = Manifest(
        folder,
        step,
        step,
        2 if guide else None,
        "data",
        tensor,
        KINDS,
        tree,
        {},
        {},
        {},
        {"torch": "2"},
        "f00",
    )
    return reshard.write(header, full, folder, texts={"tokenizer.json": "{}"})


@pytest.mark.parametrize(
    ("step", "guide", "phase", "alpha"),
    [
        (0, False, "plain", 0.0),
        (4, True, "guided", 0.5),
        (6, False, "plain", 0.0),
        (10, False, "finished", 0.0),
    ],
)
def test_position(tmp_path: Path, step: int, guide: bool, phase: str, alpha: float) -> None:
    found = inspection.describe(checkpoint(tmp_path / "a", "low_rank", step=step, guide=guide), spectra=False)
    assert (found["step"], found["total_steps"], found["phase"]) == (step, 10, phase)
    assert found["alpha"] == pytest.approx(alpha)
    assert ("guide" in found["parameters"]) == guide
    assert f"step {step} of 10, {phase}" in inspection.render(found)


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("kind", FFN)
def test_spectra_are_those_of_the_matrix(tmp_path: Path, kind: str, guide: bool) -> None:
    manifest = checkpoint(tmp_path / "a", kind, guide=guide and kind != "dense")
    found = inspection.describe(manifest)
    assert len(found["spectra"]) == 4
    dense = merged(Reader(manifest).weights())
    for spectrum in found["spectra"]:
        matrix = dense.full(f"decoder.layers.{spectrum.layer}.mlp.{spectrum.linear}.weight")
        s = torch.linalg.svdvals(matrix.double())
        structured = spectrum.layer == 1 and kind != "dense"
        assert spectrum.kind == (kind if structured else "dense")
        bound = {"low_rank": 6, "block_dense": 8}.get(kind, 16) if structured and not guide else 16
        assert spectrum.bound == bound
        assert (s[bound:] < 1e-4 * s[0]).all(), "no singular value beyond the structure's most"
        assert spectrum.largest == pytest.approx(float(s[0]), rel=1e-6)
        assert spectrum.smallest == pytest.approx(float(s[bound - 1]), rel=1e-4)
        assert spectrum.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-5)
        share = s.square() / s.square().sum()
        share = share[share > 1e-12]
        assert spectrum.effective_rank == pytest.approx(
            math.exp(-float((share * share.log()).sum())), rel=1e-4
        )
        assert 1 <= spectrum.stable_rank <= bound


def test_the_spectrum_of_what_is_not_finite_is_nan() -> None:
    assert inspection.singular_values(torch.full((3, 5), math.inf)).isnan().all()


def test_parameters_and_splits_are_the_tables(tmp_path: Path) -> None:
    manifest = checkpoint(tmp_path / "a", "block_shuffle", guide=True)
    found = inspection.describe(manifest, spectra=False)
    config = loading.from_tree(manifest.config)
    parts = counts.parameters_by_part(config)
    assert found["parameters"] == {
        **parts,
        "total": sum(parts.values()),
        "guide": counts.guide_parameters(config),
    }
    assert (
        sum(math.prod(shape) for shape in manifest.shapes.values())
        == sum(parts.values()) + found["parameters"]["guide"]
    )
    rows = {row["name"]: row for row in found["splits"]["layers"]["block_shuffle"]}
    assert rows["mlp.linear_fc1.block_out"] == {
        "name": "mlp.linear_fc1.block_out", "shape": [4, 8, 4], "rank_shape": [2, 8, 4], "cut": 0
    }  # fmt: skip
    assert rows["mlp.linear_fc2.block_out"]["cut"] == -1
    assert found["splits"]["files"] == 2
    page = inspection.render(found)
    assert "mlp.linear_fc2.guide" in page
    assert "every file has its sha256" in page


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "tokenizer.json"])
def test_damage_is_told(tmp_path: Path, name: str) -> None:
    manifest = checkpoint(tmp_path / "a", "low_rank")
    data = bytearray((manifest.folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (manifest.folder / name).write_bytes(bytes(data))
    found = inspection.describe(manifest, spectra=False)
    assert len(found["damage"]) == 1
    assert inspection.describe(manifest)["damage"] == found["damage"], "told, not stumbled over"
    assert name in found["damage"][0]
    assert "DAMAGED" in inspection.render(found)
