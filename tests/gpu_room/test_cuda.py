"""On a CUDA device: bf16 mathematics of the structures, and the main job itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.structured import functional
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

pytestmark = pytest.mark.gpu

STRUCTURES = [
    (build_structure("low_rank", rank=96), 384, 1536),
    (build_structure("block_dense", rank=96, blocks=3), 384, 1536),
    (build_structure("block_shuffle", blocks=4), 1536, 384),
]


@pytest.mark.parametrize(
    ("structure", "inputs", "outputs"), STRUCTURES, ids=lambda value: getattr(value, "kind", "")
)
def test_bf16_equals_float64(structure: Structure, inputs: int, outputs: int) -> None:
    """Output and every gradient, relative RMS under 5e-3."""
    generator = torch.Generator().manual_seed(0)
    drawn = functional.draw(structure, inputs, outputs, 0.02, generator)
    low = {name: tensor.cuda().bfloat16().requires_grad_() for name, tensor in drawn.items()}
    high = {name: t.detach().double().requires_grad_() for name, t in low.items()}
    x = torch.randn(1000, inputs, generator=generator).cuda().bfloat16()
    weight = torch.randn(1000, outputs, generator=generator).cuda().bfloat16()
    results = []
    for factors, value in ((low, x.clone().requires_grad_()), (high, x.double().requires_grad_())):
        y = functional.apply(structure, value, factors)
        (y * weight.to(y.dtype)).sum().backward()
        results.append([y, value.grad, *[factors[name].grad for name in factors]])
    for got, want in zip(*results, strict=True):
        assert got is not None
        assert want is not None
        error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 5e-3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_main_job(root: Path, tmp_path: Path, stage: int) -> None:
    """bf16 on one device by the script itself: it trains, says which precision, and goes on from its
    checkpoint.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    (tmp_path / "text").mkdir()
    for name in ("argparse", "ast", "calendar", "csv", "datetime", "enum"):
        (tmp_path / "text" / f"{name}.txt").write_text(
            (stdlib / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    tree: dict[str, Any] = {
        "model": {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "sequence": 64, "vocab": 512},
        "ffn": {"kind": "block_dense", "rank": 64, "blocks": 4},
        "guide": {"mode": "fixed_step", "stochastic": True},
        "data": {"dir": str(tmp_path / "data"), "source": str(tmp_path / "text")},
        "train": {"steps": 30, "global_batch_size": 16, "micro_batch_size": 4, "learning_rate": 3e-3},
        "zero": {"stage": stage},
        "checkpoint": {"interval": 10, "keep": 3},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    command = [sys.executable, "sffn_dist/pretrain.py", "--config", str(tmp_path / "config.json")]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "bf16 on cuda" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(30))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert all(row["grad_norm"] > 0 for row in rows)
    for step in (20, 30):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "continuing at step 10" in again.stderr
    resumed = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in resumed] == list(range(30))
    for before, after in zip(rows, resumed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=0.05)


@pytest.mark.parametrize(
    ("structure", "share"),
    [
        ({"kind": "low_rank", "rank": 256}, 1 / 5),
        ({"kind": "block_dense", "rank": 384, "blocks": 4}, 1 / 5),
        ({"kind": "block_shuffle", "blocks": 4}, 1 / 3),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_bottlenecks_alone_are_kept(structure: dict[str, Any], share: float) -> None:
    """By the allocator, bf16, a third of the dense parameters: bytes kept for backward; the same bits;
    near float64.
    """
    script = Path(__file__).with_name("feed_forward_layer.py")
    command = [sys.executable, str(script), json.dumps(structure)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["equal"], "rebuilding the wide activations changes results"
    assert found["error"] < 1e-2
    assert found["bottleneck"] <= share * found["dense"] * 1.001  # the allocator rounds
    assert found["bottleneck"] < found["none"] / 2
