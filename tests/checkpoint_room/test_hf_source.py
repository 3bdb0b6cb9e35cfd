"""Foreign folders, as transformers writes them: read as this project's weights, they compute what they
computed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sffn_dist.checkpoint.weights import Weights, approximated, merged
from sffn_dist.conversion.hf import source
from sffn_dist.conversion.hf.export import export
from sffn_dist.spec.split_table import ffn_structure
from sffn_dist.structured.functional import to_dense
from sffn_dist.structured.structure import Structure

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 12, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0,
    "rms_norm_eps": 0.03, "norm_epsilon": 0.03, "layer_norm_eps": 0.03,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
NEOX = {"use_parallel_residual": False, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": ROPE, "num_key_value_heads": 2}),
    "llama_tied": (
        "Llama",
        {"rope_parameters": ROPE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_attention_bias": ("Llama", {"rope_parameters": ROPE, "attention_bias": True, "head_dim": 8}),
    "llama_mlp_bias": ("Llama", {"rope_parameters": ROPE, "mlp_bias": True}),
    "mistral": ("Mistral", {"rope_parameters": ROPE, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral_wide_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 12}),
    "qwen2": ("Qwen2", {"rope_parameters": ROPE, "num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2", {"rope_parameters": ROPE, "num_key_value_heads": 2}),
    "starcoder2_plain": (
        "Starcoder2",
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_tied": (
        "GPTNeoX",
        {**NEOX, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
}


def foreign(name: str) -> Any:
    """A randomly initialised model; biases and norms are moved away from where they start, so that each of
    them shows.
    """
    architecture, settings = FOREIGN[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{architecture}ForCausalLM")(
        getattr(transformers, f"{architecture}Config")(**SIZES, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found = model(tokens).logits
    assert found.std() > 0.3, "logits too small to tell models apart"
    return found


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_computes_the_same_here(
    name: str, reference: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = foreign(name)
    model.save_pretrained(tmp_path)
    weights = source.read(tmp_path)
    assert close(reference(weights, tokens), logits(model, tokens))
    assert all(weights.full(tensor).dtype == torch.float32 for tensor in weights.names())
    assert str(tmp_path) in weights.origin
    assert (weights.facts["model_type"], weights.facts["eos_token_id"]) == (model.config.model_type, 0)
    assert (weights.guide, weights.step, weights.config.train.steps) == (False, 0, 1)


@pytest.mark.parametrize("name", ["llama_attention_bias", "starcoder2", "gpt_neox_tied", "mistral"])
def test_a_foreign_model_goes_out_again(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = foreign(name)
    model.save_pretrained(tmp_path / "in")
    weights = source.read(tmp_path / "in")
    folder = export(weights, tmp_path / "out", ffn="merged", dtype="fp32")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert close(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("form", ["shards", "bin", "bin shards", "bf16", "embed_out"])
def test_every_form_of_files_reads_alike(name: str, form: str, tmp_path: Path) -> None:
    model = foreign(name)
    model.save_pretrained(tmp_path / "plain")
    expected = source.read(tmp_path / "plain")
    folder = tmp_path / "other"
    model.save_pretrained(folder, max_shard_size=4000 if form == "shards" else "1GB")
    if form == "shards":
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        rewrite(folder, form)
    got = source.read(folder)
    for tensor in expected.names():
        wanted = expected.full(tensor)
        assert torch.equal(got.full(tensor), wanted.bfloat16().float() if form == "bf16" else wanted), tensor
        got.full(tensor).zero_()  # a reader's copy is the reader's
        assert torch.equal(got.full(tensor), got.full(tensor))
        assert form == "bf16" or torch.equal(got.full(tensor), wanted)


def rewrite(folder: Path, form: str) -> None:
    """The folder's safetensors file in another form."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if form == "embed_out":  # as files of GPT-NeoX have it, whatever this version of transformers writes
        names = {"lm_head.weight": "embed_out.weight"} if any("gpt_neox" in key for key in tensors) else {}
        tensors = {names.get(key, key): tensor for key, tensor in tensors.items()}
    if form in ("bf16", "embed_out"):
        from safetensors.torch import save_file

        save_file({k: v.bfloat16() if form == "bf16" else v for k, v in tensors.items()}, path)
        return
    path.unlink()
    if form != "bin shards":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names, where = sorted(tensors), {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({key: tensors[key] for key in names[i::2]}, folder / file)
        where |= dict.fromkeys(names[i::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_masks_that_old_files_hold_are_no_parameters(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    foreign("gpt_neox").save_pretrained(tmp_path)
    masks = {
        "bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(2),
    }
    named = {f"gpt_neox.layers.0.attention.{name}": mask for name, mask in masks.items()}
    save_file({**load_file(tmp_path / "model.safetensors"), **named}, tmp_path / "model.safetensors")
    assert source.read(tmp_path).config.model.bias


def test_settings_of_transformers_4_and_5_read_alike(tmp_path: Path) -> None:
    foreign("llama").save_pretrained(tmp_path)
    expected, path = source.read(tmp_path).config, tmp_path / "config.json"
    tree = json.loads(path.read_text())
    del tree["rope_parameters"]
    path.write_text(json.dumps({**tree, "rope_theta": 500, "rope_scaling": None}))
    assert source.read(tmp_path).config == expected
    path.write_text(json.dumps(tree))
    assert source.read(tmp_path).config.model.rope_base == 10_000
    for key in ("head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "max_position_embeddings"):
        tree.pop(key)
    path.write_text(json.dumps(tree))
    silent = source.read(tmp_path).config.model
    usual = transformers.LlamaConfig()
    assert (silent.norm_epsilon, silent.sequence) == (usual.rms_norm_eps, usual.max_position_embeddings)


# ---------------------------------------------------------------------------------------------- approximation

EXACT = {
    "low_rank": {"kind": "low_rank", "rank": 16},
    "block_dense": {"kind": "block_dense", "rank": 16, "blocks": 1},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 1},
}
LOWER = {
    "low_rank": {"kind": "low_rank", "rank": 5},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}


def imported(name: str, folder: Path) -> tuple[Any, Weights]:
    model = foreign(name)
    model.save_pretrained(folder)
    return model, source.read(folder)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", ["llama", "starcoder2", "gpt_neox"])
def test_full_rank_reproduces_the_source(
    name: str, kind: str, reference: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, weights = imported(name, tmp_path)
    exact = approximated(weights, {**EXACT[kind], "dense_layers": []})
    assert close(reference(exact, tokens), logits(model, tokens))
    guided = approximated(weights, {**LOWER[kind], "dense_layers": [1]}, guide=True)
    assert close(reference(guided, tokens), logits(model, tokens)), "alpha = 1 is the guide alone"
    assert not close(reference(approximated(weights, LOWER[kind]), tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", LOWER)
@pytest.mark.parametrize("name", ["llama", "starcoder2", "gpt_neox"])
def test_lower_rank_is_the_nearest_there_is(name: str, kind: str, tmp_path: Path) -> None:
    _, weights = imported(name, tmp_path)
    lower = approximated(weights, {**LOWER[kind], "dense_layers": []})
    for layer in range(2):
        for linear in ("linear_fc1", "linear_fc2"):
            prefix = f"decoder.layers.{layer}.mlp.{linear}."
            matrix = weights.full(f"{prefix}weight")
            leaves = [
                n.removeprefix(prefix)
                for n in lower.names()
                if n.startswith(prefix) and not n.endswith("bias")
            ]
            got = to_dense(
                ffn_structure(lower.config, layer), {leaf: lower.full(prefix + leaf) for leaf in leaves}
            )
            error = float(torch.linalg.matrix_norm((got - matrix).double()))
            assert error == pytest.approx(smallest_error(kind, matrix.double()), rel=1e-4)
            assert error > 0.05 * float(torch.linalg.matrix_norm(matrix)), "no test if nothing is cut"


def smallest_error(kind: str, matrix: torch.Tensor) -> float:
    """Eckart and Young: the root of the squares of all singular values beyond the rank, over the blocks of
    the structure.
    """
    settings = LOWER[kind]
    blocks = settings.get("blocks", 1)
    inputs, outputs = matrix.shape[1], matrix.shape[0]
    columns = matrix.split(inputs // blocks, dim=1)
    if kind == "block_shuffle":
        parts = [part[l::blocks] for part in columns for l in range(blocks)]
        rank = min(inputs, outputs) // blocks**2
    else:
        parts, rank = list(columns), settings["rank"] // blocks
    return math.sqrt(sum(float(torch.linalg.svdvals(part)[rank:].square().sum()) for part in parts))


@pytest.mark.parametrize("kind", LOWER)
def test_an_approximated_model_goes_out_as_both(
    kind: str, reference: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    _, weights = imported("llama", tmp_path / "in")
    lower = approximated(weights, LOWER[kind])
    expected = reference(lower, tokens)
    for ffn in ("merged", "structured"):
        folder = export(lower, tmp_path / ffn, ffn=ffn, dtype="fp32")  # type: ignore[arg-type]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=ffn == "structured"
        ).eval()
        assert close(logits(model, tokens), expected)
    back = source.read(tmp_path / "structured")
    assert isinstance(ffn_structure(back.config, 1), Structure)
    for name in lower.names():
        assert torch.equal(back.full(name), lower.full(name)), name
    for name in merged(lower).names():
        assert torch.equal(source.read(tmp_path / "merged").full(name), merged(lower).full(name)), name
