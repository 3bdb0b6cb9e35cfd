"""The public evaluation harness runs an exported folder as any other, without the network, and finds the
score that is due.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.conversion.hf.export import export

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

WORDS = ("ab", "ba", "c", "a b", "b c a")
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def documents() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(12):
        order = torch.randperm(len(WORDS), generator=generator).tolist()
        choices = [WORDS[i] for i in order[:3]]
        made.append({"question": WORDS[order[3]], "choices": choices, "answer": order[4] % 3})
    return made


def tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "c": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


@torch.no_grad()
def accuracy(folder: Path, docs: list[dict[str, Any]]) -> float:
    """By the definition: the choice whose tokens have the highest log-likelihood after the question's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for doc in docs:
        scores = []
        for choice in doc["choices"]:
            before = tokenizer(doc["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{doc['question']} {choice}")["input_ids"]])
            logp = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1])))
        right += scores.index(max(scores)) == doc["answer"]
    return right / len(docs)


def test_the_harness_scores_a_merged_export(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    tree = tree_of("block_dense", norm="rmsnorm", activation="swiglu", vocab=8)
    docs = documents()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    # a model that is neither always right nor always wrong, so that the score says something
    for seed in range(9):
        folder = export(
            drawn(tree, seed=seed, tokenizer=tokenizer_json()),
            tmp_path / f"m{seed}",
            ffn="merged",
            dtype="fp32",
        )
        expected = accuracy(folder, docs)
        if 0.2 < expected < 0.8:
            break
    assert 0.2 < expected < 0.8
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
    ]
    command += [
        "--tasks",
        "local_choice",
        "--include_path",
        str(tmp_path / "tasks"),
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, **offline}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(report.read_text())["results"]["local_choice"]["acc,none"] == pytest.approx(expected)
