"""Exported folders: they load in transformers and compute what the model computes."""

from __future__ import annotations

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
    del tensors[f"{prefix}up"], tensors[f"{prefix}bias"]
    save_file(tensors, path, {"format": "pt"})
    found = dict(loaded(tmp_path / "m", trust_remote_code=True).named_parameters())
    assert 0.1 < found[f"{prefix}up"].std() < 1.0
    assert not found[f"{prefix}bias"].any()
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
