"""Exported folders under other versions of transformers: `make test-versions`.

Each version lies in a folder of its own below build/, installed by pip --target beside the one torch, and is
put before the environment's packages in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("versions_cases.py")
FOLDER = Path(os.environ.get("VERSIONS_FOLDER", ROOT / "build" / "versions"))
INSTALLED = importlib.metadata.version("transformers")
TOO_OLD = "4.46.3"
VERSIONS = ("4.48.3", "4.57.6", INSTALLED)  # the oldest that a structured export takes, the newest 4, and 5
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2, "bias": True}
STARCODER2 = {"norm": "layernorm", "activation": "gelu", "kv_heads": 2, "bias": True}
TREE: dict[str, Any] = {
    "model": {"layers": 2, "width": 16, "heads": 4, "sequence": 32, "vocab": 7, "init_std": 0.3},
    "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
}
FFNS: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "rank": 5},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}

pytestmark = pytest.mark.versions


def run_under(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """versions_cases.py under this version of transformers, installed at its first use."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    if version != INSTALLED:
        target = FOLDER / f"transformers-{version}"
        if not target.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            partial = target.with_name(f".{target.name}")
            subprocess.run([*command, "--target", str(partial), f"transformers=={version}"], check=True)
            partial.rename(target)
        environment["PYTHONPATH"] = str(target)
    command = [sys.executable, str(CASES), version, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL
    )


def tokenizer_text() -> str:
    """The text of a tokenizer.json of seven tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "c": 5, "Ċ": 6}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return str(made.to_str())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, drawn: Callable[..., Any]) -> list[str]:
    """Folders of each architecture and structure, each with the logits that transformers' installed version
    gives.
    """
    from sffn_dist.conversion.hf.export import export

    folder, made = tmp_path_factory.mktemp("exports"), []
    for kind, settings in FFNS.items():
        for ffn in ("structured", "merged"):
            for name, model in (("llama", LLAMA), ("starcoder2", STARCODER2)):
                for guide in (False, True) if ffn == "structured" else (False,):
                    tree = {
                        **TREE,
                        "model": {**TREE["model"], **model},
                        "ffn": {"width": 24, **settings, "dense_layers": [1]},
                    }
                    weights = drawn(
                        tree, guide=guide, alpha=0.3 if guide else 0.0, tokenizer=tokenizer_text()
                    )
                    target = folder / f"{kind}_{ffn}_{name}{'_guided' if guide else ''}"
                    made.append(str(export(weights, target, ffn=ffn, dtype="fp32")))
    done = run_under(INSTALLED, "record", *made)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("version", VERSIONS)
def test_exports_load_compute_and_generate(version: str, exports: list[str]) -> None:
    """Load, the same logits, causal, AutoModel, generate(**tokenizer(...)), the card's own lines."""
    done = run_under(version, "check", *exports)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["folder"] for row in rows] == [Path(folder).name for folder in exports]
    assert all(row["transformers"] == version for row in rows)


def test_a_version_that_is_too_old_is_refused_by_name(exports: list[str]) -> None:
    """Of merged exports, which are transformers' own architectures, nothing is asked."""
    structured = next(folder for folder in exports if "structured" in folder)
    merged = next(folder for folder in exports if "merged" in folder)
    done = run_under(TOO_OLD, "check", merged)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_under(TOO_OLD, "check", structured)
    assert done.returncode != 0
    assert f"transformers = {TOO_OLD}: modeling_sffn.py needs 4.48 or newer" in done.stderr
