"""What earlier commits wrote is still read: runs resume, checkpoints reshard, exports load, a prepared corpus
opens.

``v1/`` was written by make_v1.sh. Its metrics go on beyond its checkpoints: a resumed run must write the same
rows again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sffn_dist.data.meta_file import dump_meta, read_meta

GOLDEN = Path(__file__).parent / "v1"
CORPUS_TIME = 1767225600  # part of the prepared corpus's name
ROOT = Path(__file__).parents[2]
# keys of v1's config files that have another name since: (section, old name) -> new name
RENAMED: dict[tuple[str, str], str] = {
    ("guide", "share"): "fraction",
    ("guide", "alpha"): "schedule",
    ("guards", "rollbacks"): "max_rollbacks",
}
PROMPT = [[5, 70, 12, 200, 33, 7, 90, 41]]


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A copy of v1 that a test may write to."""
    folder = tmp_path / "past"
    shutil.copytree(GOLDEN, folder)
    os.utime(folder / "text/corpus.jsonl", (CORPUS_TIME, CORPUS_TIME))
    for name in ("guided.json", "plain.json"):
        tree = json.loads((folder / name).read_text())
        for (section, old), new in RENAMED.items():
            if old in tree.get(section, {}):
                tree[section][new] = tree[section].pop(old)
        (folder / name).write_text(json.dumps(tree))
    return folder


def run(folder: Path, script: str, *arguments: str, code: int = 0) -> str:
    """The output of one of the project's scripts, started in ``folder``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    apart = script.endswith("convert.py") or "--json" in arguments
    return done.stdout if apart else done.stdout + done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "overrides"), [("plain", ()), ("guided", ("parallel.tensor=1", "parallel.sequence=false"))]
)
def test_a_run_resumes(past: Path, name: str, overrides: tuple[str, ...]) -> None:
    """The golden run goes on from step 6, one written on two tensor-parallel ranks on a single one, and
    reaches the same numbers.
    """
    prepared = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((past / "data").rglob("*.*"))
    }
    printed = run(past, "sffn_dist/pretrain.py", "--config", f"{name}.json", *overrides)
    assert "step_00000006" in printed
    resumed, expected = rows(past / name / "metrics.jsonl"), rows(GOLDEN / name / "metrics.jsonl")
    assert [row["step"] for row in resumed] == list(range(12))
    assert [row["seconds"] for row in resumed[:6]] == [row["seconds"] for row in expected[:6]], (
        "rows before step 6 stay"
    )
    assert resumed[6]["seconds"] != expected[6]["seconds"], "step 6 was taken again"
    for key in ("loss", "grad_norm", "lr", "alpha", "guided_share"):
        assert [row[key] for row in resumed] == pytest.approx([row[key] for row in expected], rel=1e-4), key
    passes = 12 * 4 / (4975 // 16)  # sequences trained on, of those that 4976 tokens hold
    assert resumed[-1]["epoch"] == pytest.approx(passes)
    assert json.loads((past / name / "summary.json").read_text())["epochs"] == pytest.approx(passes)
    assert "4,976 tokens to train on; 12 steps pass over them 0.155 times" in printed
    heldout = [row["heldout_loss"] for row in rows(past / name / "evaluations.jsonl")]
    assert heldout == pytest.approx(
        [row["heldout_loss"] for row in rows(GOLDEN / name / "evaluations.jsonl")], rel=1e-4
    )
    opened = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((past / "data").rglob("*.*"))
    }
    assert {path: opened[path] for path in prepared} == prepared, "the corpus is not prepared again"


def test_an_estimate_is_marked_wherever_it_appears(past: Path) -> None:
    """Bits per byte of a corpus whose tokenizer has no exact table, and whose bytes nobody counted."""
    folder = next((past / "data").iterdir())
    meta = read_meta(folder).model_copy(update={"byte_exact": False})
    (folder / "meta.json").write_text(dump_meta(meta))
    printed = run(past, "sffn_dist/pretrain.py", "--config", "plain.json", "logging.tensorboard=true")
    assert "bits per byte are an estimate; remove the folder" in printed
    summary = json.loads((past / "plain/summary.json").read_text())
    assert f"~{summary['bits_per_byte']:.4f}, an estimate" in printed
    assert summary["bits_per_byte_estimated"] is True
    assert rows(past / "plain/evaluations.jsonl")[-1]["bits_per_byte_estimated"] is True
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((past / "plain").rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert events.Scalars("bits_per_byte_estimated")[-1].value == 1.0


def test_another_run_is_refused(past: Path) -> None:
    """The record of the run is compared with the config, key by key."""
    printed = run(
        past, "sffn_dist/pretrain.py", "--config", "guided.json", "parallel.tensor=1", "train.seed=1", code=2
    )
    assert "train.seed = 1: run.dir = 'guided' holds a run with 0" in printed
    assert printed.count("error:") == 1, "no renamed key seems to differ"


def test_a_checkpoint_is_resharded(past: Path) -> None:
    """Two tensor-parallel ranks to one and back give the same bits."""
    run(past, "tools/convert.py", "reshard", "guided", "one", "--tensor", "1")
    run(past, "tools/convert.py", "reshard", "one", "two", "--tensor", "2")
    assert "same bits" in run(past, "tools/convert.py", "verify", "one", "two")
    there = load_file(past / "two" / "rank_00001.safetensors")
    for key, tensor in load_file(GOLDEN / "guided/checkpoints/step_00000006/rank_00001.safetensors").items():
        assert torch.equal(there[key].flatten(), tensor.flatten()), key


def test_a_checkpoint_is_inspected(past: Path) -> None:
    """Phase, structure and settings are read from the manifest."""
    found = json.loads(run(past, "tools/convert.py", "inspect", "guided", "--json"))
    assert (found["step"], found["phase"], found["ffn"]["kind"]) == (6, "guided", "block_shuffle")
    assert found["alpha"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["structured", "merged"])
def test_an_export_loads(past: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both exports give the logits that they gave, and are imported without a difference in them."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(past / "modules"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(past / name, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(PROMPT)).logits[0, -1, :8]
    expected = json.loads((GOLDEN / "expected.json").read_text())["logits"]
    assert logits.tolist() == pytest.approx(expected, abs=1e-4)


def test_an_export_is_imported(past: Path) -> None:
    """The merged export becomes a checkpoint with its weights, and a run may start from it."""
    run(past, "tools/convert.py", "from-hf", "merged", "imported")
    exported = load_file(past / "merged/model.safetensors")
    imported = load_file(past / "imported/rank_00000.safetensors")
    table = next(tensor for key, tensor in imported.items() if "word_embeddings" in key)
    assert torch.equal(table.flatten(), exported["model.embed_tokens.weight"].flatten())
    assert "logits" in run(past, "tools/convert.py", "verify", "merged", "imported")
    tree = json.loads((past / "plain.json").read_text())
    tree |= {"run": {"dir": "fresh"}, "init_from": "plain/checkpoints/step_00000006"}
    (past / "fresh.json").write_text(json.dumps(tree))
    run(past, "sffn_dist/pretrain.py", "--config", "fresh.json", "train.steps=2")
    trained = json.loads((past / "fresh/summary.json").read_text())["heldout_loss"]
    started_at = rows(GOLDEN / "plain/evaluations.jsonl")[0]["heldout_loss"]
    assert trained < started_at + 0.05, "it starts from the golden weights"


def test_a_structured_export_is_imported(past: Path) -> None:
    """Its factors become a checkpoint of the same structure, which gives the same logits."""
    run(past, "tools/convert.py", "from-hf", "structured", "imported")
    manifest = json.loads((past / "imported/manifest.json").read_text())
    assert manifest["config"]["ffn"]["kind"] == "block_dense"
    assert any(name.endswith(".mlp.linear_fc1.block_in") for name in manifest["tensors"])
    assert "the same" in run(past, "tools/convert.py", "verify", "structured", "imported")


def test_a_start_config_is_read(past: Path) -> None:
    """The start.json that an import with guides wrote is a base to train on."""
    options = ("--ffn", "low_rank", "--rank", "8", "--guide")
    run(past, "tools/convert.py", "from-hf", "merged", "imported", *options)
    base = {"base": "start.json", "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 2}}
    (past / "from_import.json").write_text(json.dumps(base | {"data": {"source": "text/corpus.jsonl"}}))
    planned = json.loads(
        run(past, "sffn_dist/pretrain.py", "--config", "from_import.json", "--plan", "--json")
    )
    assert (planned["ffn"]["kind"], planned["ffn"]["rank"]) == ("low_rank", 8)
    assert planned["guided_steps_share"] > 0
