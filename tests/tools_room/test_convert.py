"""tools/convert.py as a user starts it, on the checkpoints of a real run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 4


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pretrain.py on the CPU: BlockDense, SwiGLU and RMSNorm, in its guided phase at the first of
    its two checkpoints.
    """
    folder = tmp_path_factory.mktemp("convert")
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    (folder / "text").mkdir()
    for part in range(3):
        (folder / "text" / f"{part}.txt").write_text(
            text[part * 20_000 : (part + 1) * 20_000], encoding="utf-8"
        )
    tree = {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512,
                  "activation": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False},
        "ffn": {"kind": "block_dense", "width": 64, "rank": 16, "blocks": 2},
        "guide": {"mode": "fixed_step", "fraction": 0.75},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.34},
        "train": {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 2},
        "precision": "fp32",
        "checkpoint": {"interval": 2, "keep": 3},
        "evaluation": {"interval": 2, "sequences": 2},
        "sample": {"tokens": 0},
        "run": {"dir": str(folder / "run")},
    }  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(tree), encoding="utf-8")
    done = _python(root / "sffn_dist" / "pretrain.py", "--config", folder / "tiny.json")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def _python(*command: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


@pytest.fixture
def convert(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``convert(*arguments, code=0)``: what the tool prints.

    Logits are compared in a process of their own, since that starts ranks.
    """
    spec = importlib.util.spec_from_file_location("convert_tool", root / "tools" / "convert.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*arguments: Any, code: int = 0) -> str:
        if arguments[0] == "verify":
            done = _python(root / "tools" / "convert.py", *arguments)
            got, out, err = done.returncode, done.stdout, done.stderr
        else:
            try:
                got = tool.main([str(argument) for argument in arguments])
            except SystemExit as ended:
                got = int(str(ended.code))
            out, err = capsys.readouterr()
        assert got == code, out + err
        return err if code == 2 else out

    return call


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def test_inspect(convert: Callable[..., str], run: Path, tmp_path: Path) -> None:
    found = json.loads(convert("inspect", step(run, 2), "--json"))
    assert (found["step"], found["phase"], found["guide_optimizer_steps"]) == (2, "guided", 2)
    assert 0 < found["alpha"] < 1
    assert found["damage"] == []
    assert [(row["layer"], row["bound"]) for row in found["spectra"]] == [(0, 32), (0, 32), (1, 32), (1, 32)]
    broken = tmp_path / "broken"
    shutil.copytree(step(run, 4), broken)
    data = bytearray((broken / "rank_00000.safetensors").read_bytes())
    data[-3] ^= 1
    (broken / "rank_00000.safetensors").write_bytes(data)
    page = convert("inspect", broken, "--no-spectra", code=1)
    assert "step 4 of 4, finished" in page
    assert "rank_00000.safetensors: sha256" in page


def test_there_and_back(root: Path, convert: Callable[..., str], run: Path, tmp_path: Path) -> None:
    """The guided checkpoint goes out merged and structured, both say what it says; the merged one comes
    back as it went.
    """
    source, merged, structured, back = (
        step(run, 2),
        tmp_path / "merged",
        tmp_path / "structured",
        tmp_path / "back",
    )
    convert("to-hf", source, merged, "--ffn", "merged")
    convert("to-hf", source, structured, "--ffn", "structured", "--shard-size", "0.0001")
    assert (merged / "tokenizer.json").exists()
    assert len(list(structured.glob("model-*.safetensors"))) > 1
    assert (source.parents[1] / "evaluations.jsonl").exists()
    assert "heldout_loss" in (merged / "README.md").read_text(encoding="utf-8"), (
        "the model card has the results"
    )
    assert "the same likeliest token at 100.0%" in convert("verify", source, merged)
    convert("from-hf", merged, back)
    assert json.loads(convert("verify", structured, back, "--tolerance", "1e-5", "--json"))["same"]
    approximated = tmp_path / "approximated"
    convert(
        "from-hf",
        merged,
        approximated,
        "--ffn",
        "block_shuffle",
        "--blocks",
        "2",
        "--guide",
        "--dense-layers",
        "none",
    )
    found = json.loads(convert("inspect", approximated, "--no-spectra", "--json"))
    text = str(run.parent / "text")
    start = _python(
        root / "sffn_dist" / "pretrain.py", "--config", approximated / "start.json", "--plan", "--json",
        "train.steps=8", f"data.source={text}",
    )  # fmt: skip
    assert start.returncode == 0, start.stderr
    plan = json.loads(start.stdout)
    assert (plan["ffn.kind"], [phase["phase"] for phase in plan["phases"]]) == (
        "block_shuffle",
        ["guided", "plain"],
    )
    assert (found["ffn"]["kind"], found["phase"], found["alpha"], found["tensors"]) == (
        "block_shuffle",
        "guided",
        1.0,
        ["weight"],
    )


def test_reshard_and_verify(convert: Callable[..., str], run: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    convert("reshard", run, two, "--tensor", "2", "--data", "2")
    assert len(list(two.glob("rank_*.safetensors"))) == 4
    assert "the same bits" in convert("verify", run, two)
    page = convert("verify", step(run, 2), two, code=1)
    assert "NOT the same" in page
    assert "step: 2 and 4" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reshard", "{run}", "{out}", "--tensor", "3"], "must be divisible by parallel.tensor = 3"),
        (["reshard", "{run}", "{run}", "--tensor", "2"], "exists already"),
        (["to-hf", "{none}", "{out}", "--ffn", "merged"], "no such file or folder"),
        (["from-megatron", "{run}", "{out}"], "this is checkpoint, not megatron"),
        (
            ["from-hf", "{here}", "{out}"],
            "must be the .pth of the paper's authors; or a checkpoint or a run of sffn_dist; or",
        ),
        (["to-hf", "{run}", "{out}"], "--ffn"),
        (["from-hf", "{run}", "{out}", "--rank", "0"], "--rank"),
    ],
)
def test_refusals_name_the_place_and_write_nothing(
    convert: Callable[..., str], run: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    places = {"run": run, "out": tmp_path / "out", "none": tmp_path / "none", "here": tmp_path}
    text = convert(*(part.format(**places) for part in arguments), code=2)
    assert says in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_an_import_prints_starts(
    root: Path, convert: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    convert("to-hf", step(run, 4), tmp_path / "hf", "--ffn", "merged")
    printed = convert("from-hf", tmp_path / "hf", tmp_path / "imported")
    _, advice, command = printed.partition("to train on: pretrain.py ")
    assert advice
    arguments = command.split(" (or")[0].replace("train.steps=...", "train.steps=1").split()
    small = ["train.global_batch_size=2", "train.micro_batch_size=2", "evaluation.sequences=2"]
    small += [f"data.source={run.parent / 'text'}", "data.heldout_share=0.34", "sample.tokens=0"]
    small += [f"data.dir={tmp_path / 'data'}", f"run.dir={tmp_path / 'on'}", "precision=fp32"]
    done = _python(root / "sffn_dist" / "pretrain.py", *arguments, *small)
    assert done.returncode == 0, done.stderr


def test_an_import_that_no_run_can_start_from_says_why(
    convert: Callable[..., str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file names the token that ends a document."""
    convert("to-hf", step(run, 4), tmp_path / "hf", "--ffn", "merged")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / "hf" / name).unlink()
    path = tmp_path / "hf" / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if not key.endswith("_token_id")}
    path.write_text(json.dumps(kept), encoding="utf-8")
    command = [Path("tools/convert.py"), "from-hf", tmp_path / "hf", tmp_path / "imported"]
    done = _python(Path(__file__).parents[2] / command[0], *command[1:])
    assert done.returncode == 0, done.stderr
    assert "to train on: " not in done.stdout
    assert "start.json needs changes first" in done.stdout
    assert "data.end_of_text" in done.stderr
