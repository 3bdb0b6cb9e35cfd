"""Exported folders: they load in transformers and compute what the model computes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sffn_dist.checkpoint.weights import Weights, merged
from sffn_dist.conversion.hf import source
from sffn_dist.conversion.hf.export import export
from sffn_dist.spec import counts

transformers = pytest.importorskip("transformers")

KINDS = ("dense", "low_rank", "block_dense", "block_shuffle")
LLAMA = {"norm": "rmsnorm", "activation": "swiglu"}
STARCODER2 = {"norm": "layernorm", "activation": "gelu"}
# every combination of family, tied embeddings and grouped queries, with every kind; biases and heads of
# another width on the way
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_embeddings": True, "kv_heads": 2, "bias": True},
    "llama_untied": {**LLAMA, "tie_embeddings": False, "kv_heads": 1, "bias": True, "attention_dim": 32},
    "llama_tied_ungrouped": {**LLAMA, "tie_embeddings": True, "bias": False},
    "llama_plain": {**LLAMA, "tie_embeddings": False, "bias": False},
    "starcoder": {**STARCODER2, "tie_embeddings": True, "kv_heads": 2, "bias": True},
    "starcoder_untied": {
        **STARCODER2,
        "tie_embeddings": False,
        "kv_heads": 1,
        "bias": True,
        "activation": "gelu_erf",
    },
    "starcoder_untied_tanh": {
        **STARCODER2,
        "tie_embeddings": False,
        "kv_heads": 2,
        "bias": False,
        "attention_dim": 8,
    },
    "starcoder_tied_ungrouped": {**STARCODER2, "tie_embeddings": True, "bias": False, "attention_dim": 32},
    "starcoder_plain": {**STARCODER2, "tie_embeddings": False, "bias": False},
}
ONLY_STRUCTURED: dict[str, dict[str, Any]] = {
    "layernorm_swiglu": {"norm": "layernorm", "activation": "swiglu", "bias": True, "kv_heads": 2},
    "rmsnorm_gelu": {"norm": "rmsnorm", "activation": "gelu", "bias": False, "tie_embeddings": False},
    "rmsnorm_erf": {"norm": "rmsnorm", "activation": "gelu_erf", "bias": True},
    "heads_beside_width": {**LLAMA, "heads": 3, "attention_dim": 12, "bias": False},
}
EVERY = {**VARIANTS, **ONLY_STRUCTURED}


def loaded(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more).eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.std() > 0.3, "logits too small to tell models apart"
    return float((got - expected).abs().max())


def same_tensors(got: Weights, expected: Weights) -> None:
    assert got.names() == expected.names()
    for name in expected.names():
        assert torch.equal(got.full(name), expected.full(name)), name


@pytest.fixture(
    params=[(kind, guide) for kind in KINDS for guide in (False, True) if kind != "dense" or not guide],
    ids=str,
)
def structure(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_computes_what_the_model_computes(
    structure: tuple[str, bool],
    variant: str,
    tree_of: Any,
    drawn: Any,
    reference: Any,
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    kind, guide = structure
    weights = drawn(tree_of(kind, **VARIANTS[variant]), guide=guide, alpha=0.3 if guide else 0.0)
    folder = export(weights, tmp_path / "m", ffn="merged", dtype="fp32")
    model, expected = loaded(folder), reference(weights, tokens)
    assert type(model).__name__ == ("LlamaForCausalLM" if "llama" in variant else "Starcoder2ForCausalLM")
    assert difference(logits(model, tokens), expected) < 1e-4
    back = source.read(folder)
    same_tensors(back, merged(weights))
    assert back.config.model == weights.config.model.model_copy(
        update={"kv_heads": weights.config.kv_heads, "attention_dim": weights.config.attention_dim}
    )


@pytest.mark.parametrize("variant", EVERY)
def test_structured_computes_what_the_model_computes(
    structure: tuple[str, bool],
    variant: str,
    tree_of: Any,
    drawn: Any,
    reference: Any,
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    kind, guide = structure
    layers = [] if variant == "rmsnorm_erf" else [1]
    weights = drawn(
        tree_of(kind, ffn={"dense_layers": layers}, **EVERY[variant]),
        guide=guide,
        alpha=0.3 if guide else 0.0,
        step=7,
    )
    folder = export(weights, tmp_path / "m", ffn="structured", dtype="fp32")
    assert (
        difference(logits(loaded(folder, trust_remote_code=True), tokens), reference(weights, tokens)) < 1e-5
    )
    back = source.read(folder)
    same_tensors(back, weights)
    assert (back.guide, back.alpha, back.step) == (guide, weights.alpha, 7)
    for section in ("kind", "rank", "blocks", "width", "dense_layers"):
        assert getattr(back.config.ffn, section) == getattr(weights.config.ffn, section)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_structured_holds_factors_and_nothing_dense(
    kind: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    weights = drawn(tree_of(kind, ffn={"dense_layers": []}, **LLAMA))
    model = loaded(export(weights, tmp_path / "m", ffn="structured", dtype="fp32"), trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == counts.parameters(weights.config)


@pytest.mark.parametrize("variant", ["llama", "layernorm_swiglu"])
@pytest.mark.parametrize("remote", [True, False], ids=["remote", "ours"])
def test_structured_saved_by_transformers_loads_again(
    variant: str, remote: bool, tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    from sffn_dist.conversion.hf.modeling_sffn import SffnForCausalLM

    weights = drawn(tree_of("block_dense", **EVERY[variant]), guide=True, alpha=0.4)
    folder = export(weights, tmp_path / "m", ffn="structured", dtype="fp32")
    model = (
        loaded(folder, trust_remote_code=True) if remote else SffnForCausalLM.from_pretrained(folder).eval()
    )
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    same_tensors(source.read(tmp_path / "again"), weights)


def test_a_structured_model_may_be_made_and_trained_in_transformers(
    tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = export(
        drawn(tree_of("block_shuffle", **LLAMA), guide=True), tmp_path / "m", ffn="structured", dtype="fp32"
    )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(torch.isfinite(p).all() and p.abs().max() < 10 for p in model.parameters())
    assert all(p.std() > 0 for name, p in model.named_parameters() if p.dim() > 1), "every matrix is drawn"
    model(tokens, labels=tokens).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_what_a_file_lacks_is_drawn_and_nothing_else(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    weights = drawn(tree_of("low_rank", ffn={"dense_layers": []}, **LLAMA), guide=True, alpha=0.5)
    path = export(weights, tmp_path / "m", ffn="structured", dtype="fp32") / "model.safetensors"
    tensors = load_file(path)
    prefix = "model.layers.0.mlp.linear_fc1."
    up = f"{prefix}up.up_proj."
    del tensors[f"{up}weight"], tensors[f"{up}bias"]
    save_file(tensors, path, {"format": "pt"})
    found = dict(loaded(tmp_path / "m", trust_remote_code=True).named_parameters())
    assert 0.1 < found[f"{up}weight"].std() < 1.0
    assert not found[f"{up}bias"].any()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("variant", ["llama", "layernorm_swiglu"])
def test_structured_has_what_transformers_gives_a_model(
    variant: str, tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = export(
        drawn(tree_of("low_rank", **EVERY[variant])), tmp_path / "m", ffn="structured", dtype="fp32"
    )
    model = loaded(folder, trust_remote_code=True)
    expected = logits(model, tokens)
    eager = loaded(folder, trust_remote_code=True, attn_implementation="eager")
    assert difference(logits(eager, tokens), expected) < 1e-5
    out = eager(tokens, output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:].detach()
    assert difference(got, expected) < 1e-5
    model.train().gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("ffn", ["merged", "structured"])
@pytest.mark.parametrize("variant", ["llama", "starcoder"])
def test_generation_with_a_cache_is_generation_without(
    ffn: Any, variant: str, tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = export(
        drawn(tree_of("block_shuffle", **VARIANTS[variant])), tmp_path / "m", ffn=ffn, dtype="fp32"
    )
    model = loaded(folder, trust_remote_code=ffn == "structured")
    prompt = tokens[:, :4]
    got = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, expected)
    assert torch.equal(got, model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))


# ---------------------------------------------------------------------------- what others do with its modules


@pytest.mark.parametrize("variant", ["llama", "starcoder"])
def test_adapters_reach_the_factors_of_low_rank(
    variant: str, tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    weights = drawn(tree_of("low_rank", ffn={"dense_layers": [1]}, **VARIANTS[variant]))
    folder = export(weights, tmp_path / "m", ffn="structured", dtype="fp32")
    model = loaded(folder, trust_remote_code=True)
    expected = logits(model, tokens)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(logits(adapted, tokens), expected), "an adapter starts at zero"
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    prefix = "base_model.model.model.layers.0.mlp."
    halves = ("gate_proj", "up_proj") if weights.config.gated else ("up_proj",)
    first = [f"{prefix}linear_fc1.{module}" for module in ("down", *(f"up.{half}" for half in halves))]
    second = [f"{prefix}linear_fc2.{module}" for module in ("down.down_proj", "up")]
    assert found >= {*first, *second}
    adapted.train()(tokens, labels=tokens).loss.backward()
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_base_model_is_an_auto_model(
    tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = export(drawn(tree_of("low_rank", **LLAMA)), tmp_path / "m", ffn="structured", dtype="fp32")
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    model = loaded(folder, trust_remote_code=True)
    with torch.no_grad():
        hidden = base(tokens).last_hidden_state
        assert difference(model.lm_head(hidden), model(tokens).logits) < 1e-5


TENSOR_PARALLEL = """
import json, sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
dist.init_process_group("gloo")
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        logits = model(tokens).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    mlp = model.model.layers[0].mlp
    sizes = {name: list(p.to_local().shape if hasattr(p, "to_local") else p.shape)
             for name, p in mlp.named_parameters()}
    if dist.get_rank() == 0:
        torch.save((logits, sizes), folder + "/parallel.pt")
dist.destroy_process_group()
"""


def test_tensor_parallel_ranks_of_transformers_equal_one(
    tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The factors at the inner features are cut, the others are whole; blocks are whole. One launch for all:
    it takes longer than they do.
    """
    folders = {}
    for variant, kind in itertools.product(
        ("llama", "starcoder"), ("low_rank", "block_dense", "block_shuffle")
    ):
        tree = tree_of(kind, ffn={"dense_layers": [1]}, **{**VARIANTS[variant], "kv_heads": 2})
        weights = drawn(tree, guide=variant == "llama", alpha=0.3 if variant == "llama" else 0.0)
        folders[variant, kind] = export(weights, tmp_path / variant / kind, ffn="structured", dtype="fp32")
    script = tmp_path / "ranks.py"
    script.write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), json.dumps(tokens.tolist()), *map(str, folders.values())],
        capture_output=True, text=True, timeout=480, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, folder in folders.items():
        model = loaded(folder, trust_remote_code=True)
        got, sizes = torch.load(folder / "parallel.pt")
        assert difference(got, logits(model, tokens)) < 1e-4, case
        whole = dict(model.model.layers[0].mlp.named_parameters())
        cut = {name for name, size in sizes.items() if size != list(whole[name].shape)}
        inner = {name for name in sizes if "_proj.weight" in name}
        cut_weights = {name for name in cut if name.endswith("weight")}
        assert cut_weights == (inner if case[1] == "low_rank" else set()), case
