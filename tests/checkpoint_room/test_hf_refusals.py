"""Folders that are not what this project can read: refused with their reasons, before any work, and never
run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.weights import finite
from sffn_dist.conversion import deepspeed, formats
from sffn_dist.conversion.hf import config_json, source
from sffn_dist.conversion.hf.export import export
from sffn_dist.spec.config import ConfigError

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2, "bias": False}
Edit = dict[str, Any]
TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'


@pytest.fixture
def folder(tree_of: Any, drawn: Any, tmp_path: Path) -> Path:
    """A good Llama folder, in shards."""
    return export(
        drawn(tree_of(**LLAMA), tokenizer=TOKENIZER),
        tmp_path / "m",
        ffn="merged",
        dtype="fp32",
        shard_bytes=6000,
    )


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes a key away."""
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


def refusal(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        source.read(folder)
    return caught.value.problems


NEOX = {
    "model_type": "gpt_neox", "hidden_act": "gelu", "use_parallel_residual": False, "rotary_pct": 1.0,
    "rope_parameters": ...,
}  # fmt: skip
SETTINGS: dict[str, tuple[Edit, str]] = {
    "type": (
        {"model_type": "gemma3"},
        'model_type = "gemma3": must be one of llama, mistral, qwen2, starcoder2, gpt_neox, sffn',
    ),
    "no type": ({"model_type": ...}, "model_type = null"),
    "activation": ({"hidden_act": "relu"}, 'hidden_act = "relu": this model has silu or swish'),
    "llama gelu": ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    "rope scaling": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}},
        "rope_parameters = {",
    ),
    "old rope scaling": (
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling = {",
    ),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters = {",
    ),
    "rope base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.5}}, "rope_theta = 10.5"),
    "partial": (
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "old partial": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    "window": ({"model_type": "mistral", "sliding_window": 4}, "sliding_window = 4"),
    "window by default": (
        {"model_type": "mistral", "max_position_embeddings": 8192},
        "sliding_window = 4096",
    ),
    "qwen window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4},
        "sliding_window = 4",
    ),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ["),
    "code of its own": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
        'auto_map = {"AutoModelForCausalLM"',
    ),
    "other code": (
        {
            "model_type": "sffn",
            "gated": True,
            "dense_layers": [],
            "auto_map": {"AutoModel": "other.SffnModel"},
        },
        "auto_map = {",
    ),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {"),
    "parallel residual": ({**NEOX, "use_parallel_residual": True}, "use_parallel_residual = true"),
    "parallel by default": ({**NEOX, "use_parallel_residual": ...}, "use_parallel_residual = true"),
    "rotary share": ({**NEOX, "rotary_pct": 0.25}, "rotary_pct = 0.25"),
    "rotary share by default": ({**NEOX, "rotary_pct": ...}, "rotary_pct = 0.25"),
    "size": ({"hidden_size": "16"}, 'hidden_size = "16": must be a positive whole number'),
    "no size": ({"num_hidden_layers": ...}, "num_hidden_layers = null: must be a positive whole number"),
    "heads": (
        {"num_attention_heads": 3, "head_dim": ...},
        "num_attention_heads = 3: must divide hidden_size = 16",
    ),
    "too many layers": ({"num_hidden_layers": 20_000}, "model.layers = 20000"),
    "kv heads": ({"num_key_value_heads": 3}, "model.kv_heads = 3"),
    "guide": (
        {"model_type": "sffn", "gated": True, "dense_layers": [], "guide_alpha": 1.5},
        "guide_alpha = 1.5",
    ),
    "feed-forward": (
        {"model_type": "sffn", "gated": True, "dense_layers": [0], "ffn_kind": "monarch"},
        'ffn_kind = "monarch"',
    ),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_ours_are_named(case: str, folder: Path) -> None:
    changes, expected = SETTINGS[case]
    edit(folder, **changes)
    problems = refusal(folder)
    assert any(
        problem.startswith(f"{folder / 'config.json'}: ") and expected in problem for problem in problems
    ), problems


def test_all_reasons_come_at_once_and_before_any_tensor(folder: Path) -> None:
    edit(
        folder,
        hidden_act="relu",
        layer_types=["x"],
        sliding_window=3,
        rope_parameters={"rope_type": "yarn"},
        vocab_size=-1,
    )
    for path in folder.glob("*.safetensors"):
        path.unlink()
    text = "\n".join(refusal(folder))
    for key in ("hidden_act", "layer_types", "sliding_window", "rope_parameters", "vocab_size"):
        assert f"{key} = " in text
    assert "safetensors" not in text


def test_dropout_is_no_reason(folder: Path) -> None:
    edit(folder, attention_dropout=0.1, residual_dropout=0.1, hidden_dropout=0.1)
    assert source.read(folder).config.model.width == 16


# --------------------------------------------------------------------------------------------- broken folders


def shard(folder: Path, index: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[index]


def change_tensor(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors["?"] = tensors[name]
    change(tensors)
    tensors.pop("?", None)
    save_file(tensors, path)
    return name


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "config.json: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "torn config": (lambda f: cut(f / "config.json", 40), "config.json: cannot be read as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list"),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: cannot be read"),
    "config a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: cannot be read",
    ),
    "no tensors": (lambda f: [p.unlink() for p in f.glob("model*")], "holds neither model.safetensors"),
    "lost shard": (lambda f: shard(f).unlink(), "model-00002-of"),
    "torn shard": (lambda f: cut(shard(f), -8), "model-00002-of"),
    "torn header": (lambda f: cut(shard(f), 30), "model-00002-of"),
    "empty shard": (lambda f: cut(shard(f), 0), "model-00002-of"),
    "two lost shards": (
        lambda f: [shard(f).unlink(), shard(f).unlink()],
        "index.json: names model-00002-of-00004.safetensors, model-00003-of-00004.safetensors, which the",
    ),
    "shard cut short": (lambda f: cut(shard(f), 2000), "00004.safetensors: holds 2000 bytes of the "),
    "empty config": (lambda f: cut(f / "config.json", 0), "config.json: is empty"),
    **{
        f"{what} for {name}": (
            lambda f, name=name, text=text: next(iter(f.glob(name))).write_text(text),
            f"{said}",
        )
        for what, text, said in (
            (
                "pointer",
                "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                "is a Git LFS pointer, not the file itself; run `git lfs pull` in ",
            ),
            ("page", "\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        )
        for name in ("config.json", "model-00001-of*", "model.safetensors.index.json", "tokenizer.json")
    },
    "shard of noise": (lambda f: shard(f).write_bytes(os.urandom(4000)), "model-00002-of"),
    "torn index": (lambda f: cut(f / "model.safetensors.index.json", 50), "index.json: cannot be read"),
    "index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "weight_map = null",
    ),
    "index leads away": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
        "weight_map names",
    ),
    "tokenizer of noise": (
        lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\xfd"),
        "tokenizer.json: cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_folder_is_named(damage: str, folder: Path) -> None:
    act, expected = DAMAGES[damage]
    act(folder)
    problems = refusal(folder)
    assert len(problems) == 1
    assert str(folder) in problems[0]
    assert expected in problems[0]


TENSOR_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "missing": (lambda t, n: t.pop(n), "{name} is not in it, though the index says so"),
    "another shape": (lambda t, n: t.update({n: t[n][:-1].clone()}), "tensor {name} is ["),
    "another rank": (lambda t, n: t.update({n: t[n][None].clone()}), "tensor {name} is [1, "),
    "whole numbers": (
        lambda t, n: t.update({n: t[n].to(torch.int8)}),
        "tensor {name} is of I8, must be floating-point numbers",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_a_broken_tensor_is_named(damage: str, folder: Path) -> None:
    act, expected = TENSOR_DAMAGES[damage]
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    act(tensors, name)
    save_file(tensors, shard(folder))
    assert any(
        str(folder) in problem and expected.format(name=name) in problem for problem in refusal(folder)
    )


def test_a_missing_and_a_superfluous_tensor_are_named(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    folder = export(drawn(tree_of(**LLAMA)), tmp_path / "m", ffn="merged", dtype="fp32")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.gate_proj.bias"] = torch.zeros(24)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(
        2
    )  # old files have it; it is no parameter
    tensors["lm_head.weight"] = torch.zeros(37, 16)  # of a tied model: a place for it
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    text = "\n".join(problems := refusal(folder))
    assert len(problems) == 2
    assert "tensor model.norm.weight is missing" in text
    assert 'tensor "model.layers.1.mlp.gate_proj.bias" has no place' in text


@pytest.mark.parametrize("suffix", ["bin", "pth"])
def test_a_pointer_in_place_of_a_pickle_is_named(suffix: str, folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    file = folder / f"pytorch_model.{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ConfigError, match="git lfs pull"):
        source.read(folder) if suffix == "bin" else formats.weights_of(file)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_output_layer_that_is_not_the_embedding_is_kept_though_tied(
    form: str, tree_of: Any, drawn: Any, reference: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """config.json says tie_word_embeddings, the trained lm_head says otherwise: it wins, with a notice."""
    untied = drawn(tree_of(**{**LLAMA, "tie_embeddings": False}))
    folder = export(untied, tmp_path / "m", ffn="merged", dtype="fp32")
    edit(folder, tie_word_embeddings=True)
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    weights = source.read(folder)
    assert not weights.config.model.tie_embeddings
    assert torch.equal(weights.full("output_layer.weight"), untied.full("output_layer.weight"))
    assert torch.equal(reference(weights, tokens), reference(untied, tokens))
    (notice,) = weights.notices
    assert "lm_head.weight differs from the embedding" in notice
    assert "tie_word_embeddings = true" in notice


def test_an_output_layer_that_is_the_embedding_stays_tied(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    folder = export(drawn(tree_of(**LLAMA)), tmp_path / "m", ffn="merged", dtype="fp32")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    weights = source.read(folder)
    assert weights.config.model.tie_embeddings
    assert weights.notices == ()
    tensors["lm_head.weight"] = torch.zeros(36, 16)
    save_file(tensors, folder / "model.safetensors")
    assert "tensor lm_head.weight is [36, 16], must be as the embedding, [37, 16]" in "".join(refusal(folder))


def test_what_is_left_unread_is_said(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, shard(folder))
    index = folder / "model.safetensors.index.json"
    (unnamed,) = source.read(folder).notices
    assert "rotary_emb.inv_freq in model-00002" in unnamed
    assert "the index does not name it" in unnamed
    tree = json.loads(index.read_text())
    tree["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shard(folder).name
    index.write_text(json.dumps(tree))
    (computed,) = source.read(folder).notices
    assert "rotary_emb.inv_freq" in computed
    assert "computed from the settings" in computed


BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BROKEN)
def test_weights_that_are_no_numbers_are_neither_imported_nor_exported(
    value: float, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    good = drawn(tree_of(**LLAMA))
    broken = good.full(name).clone()
    broken[3, 2] = value
    weights = replace(good, full=lambda other: broken if other == name else good.full(other))
    rule = f"{name}.* = NaN or inf in 1 of 256: must be finite"
    for ffn in ("merged", "structured"):
        with pytest.raises(ConfigError, match=rule):
            export(weights, tmp_path / "m", ffn=ffn, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rule):
        reshard.write_weights(weights, tmp_path / "imported")
    with pytest.raises(ConfigError, match=rule):
        deepspeed.write(weights, lambda *_: torch.zeros(1), dict.fromkeys(good.names(), 1), tmp_path)
    folder = export(good, tmp_path / "good", ffn="merged", dtype="fp32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 2] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rule):
        reshard.write_weights(source.read(folder), tmp_path / "imported")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "imported").exists()


def test_values_beyond_a_type_and_sums_beyond_it(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    """3.4e38 rounds to infinity in bf16; that a sum overflows is no fault of its terms."""
    large = torch.full((37, 16), 3e38)
    assert finite(large, "x", "here") is large
    good = drawn(tree_of(**LLAMA))
    largest = torch.finfo(torch.float32).max
    name = "embedding.word_embeddings.weight"
    weights = replace(
        good, full=lambda other: torch.full((37, 16), largest) if other == name else good.full(other)
    )
    export(weights, tmp_path / "fp32", ffn="merged", dtype="fp32")
    with pytest.raises(ConfigError, match=name):
        export(weights, tmp_path / "bf16", ffn="merged", dtype="bf16")


def test_many_problems_are_cut_short(folder: Path) -> None:
    edit(folder, num_hidden_layers=9)
    problems = refusal(folder)
    assert len(problems) == 21
    assert problems[-1].startswith("and 43 more")
    assert (
        "tensor model.layers.2.input_layernorm.weight is missing; the nearest there is model.layers.1.input"
        in problems[0]
    )
    edit(folder, num_hidden_layers=3000)
    begun = time.monotonic()
    assert len(refusal(folder)) == 21
    assert time.monotonic() - begun < 10.0


# ---------------------------------------------------------------------------------------------------- pickles


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("form", ["zip", "old", "bare", "shard"])
def test_a_malicious_pickle_is_refused_and_not_run(form: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    file, witness = folder / "pytorch_model.bin", tmp_path / "run"
    content = {"model.norm.weight": torch.ones(16), "x": Evil(witness)}
    if form == "shard":
        file = folder / "pytorch_model-00001-of-00001.bin"
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": file.name}}))
    if form == "bare":
        file.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "old")
    (problem,) = refusal(folder)
    assert not witness.exists(), "it was run"
    assert problem.startswith(str(file))
    assert (
        "system" if form in ("zip", "shard") else "not a file that torch.save (1.6 or newer) wrote"
    ) in problem
    with open(file, "rb") as bare:
        if form == "bare":
            pickle.load(bare)
            assert witness.exists(), "the file would have done something"


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {1: torch.ones(2)}], ids=str)
def test_a_pickle_of_something_else_is_refused(content: Any, folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(content, folder / "pytorch_model.bin")
    (problem,) = refusal(folder)
    assert str(folder / "pytorch_model.bin") in problem


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(16, dtype=torch.int64), torch.zeros(16).to_sparse(), torch.zeros(16, device="meta")],
    ids=str,
)
def test_a_pickled_tensor_that_is_no_plain_one_is_named(odd: torch.Tensor, folder: Path) -> None:
    tensors = {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({**tensors, "model.norm.weight": odd}, folder / "pytorch_model.bin")
    (problem,) = refusal(folder)
    assert "tensor model.norm.weight is of torch." in problem


def test_a_torn_pickle_is_refused(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"a": torch.ones(100)}, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        (problem,) = refusal(folder)
        assert str(folder / "pytorch_model.bin") in problem


# ------------------------------------------------------------------------------------------------------- fuzz

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(), st.floats(), st.text(max_size=4),
    st.just(10**400),
    st.sampled_from(["llama", "mistral", "qwen2", "starcoder2", "gpt_neox", "sffn",
                     "gelu", "silu", "layernorm", "low_rank"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
ROPE_KEYS = st.sampled_from(
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "full_attention"]
)
MORE_KEYS = (
    "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "sliding_window",
    "use_sliding_window", "layer_types", "quantization_config", "use_parallel_residual", "layer_norm_eps",
    "norm_epsilon", "use_bias", "training_steps", "guide_alpha", "is_encoder_decoder",
)  # fmt: skip


ODD = (
    None, True, False, 0, 1, -1, 3, 10**400, 2**60, 0.5, -0.0, float("nan"), float("inf"), "", "x", "silu",
    [], [1], ["x"], [[]], {}, {"x": 1}, {"rope_type": []}, {"rope_theta": "1"}, {"rope_theta": float("nan")},
    {"rope_theta": float("inf")}, {"partial_rotary_factor": []}, {"type": {}},
)  # fmt: skip


def reads_or_is_refused(folder: Path, tree: dict[str, Any]) -> bool:
    """True if it was read; every tensor is then there."""
    (folder / "config.json").write_text(json.dumps(tree))
    try:
        weights = source.read(folder)
    except ConfigError:
        return False
    assert all(weights.full(name).dtype == torch.float32 for name in weights.names())
    return True


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "starcoder2", "gpt_neox", "sffn"])
def test_every_setting_with_every_odd_value_reads_or_is_refused(
    model_type: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    folder = export(drawn(tree_of("low_rank", **LLAMA)), tmp_path / "m", ffn="structured", dtype="fp32")
    good = {**json.loads((folder / "config.json").read_text()), "model_type": model_type}
    for key in (*good, *MORE_KEYS):
        for value in ODD:
            (folder / "config.json").write_text(json.dumps({**good, key: value}))
            with contextlib.suppress(ConfigError):
                config_json.read(folder)


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_any_change_of_the_settings_reads_or_is_refused(
    ffn: Any, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    folder = export(drawn(tree_of("low_rank", **LLAMA)), tmp_path / "m", ffn=ffn, dtype="fp32")
    good = json.loads((folder / "config.json").read_text())
    outcomes = []

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(
            st.sampled_from([*good, *MORE_KEYS]),
            VALUES | st.dictionaries(ROPE_KEYS, VALUES, max_size=3),
            min_size=1,
            max_size=3,
        )
    )
    def check(changes: Edit) -> None:
        outcomes.append(reads_or_is_refused(folder, {**good, **changes}))

    check()
    assert set(outcomes) == {True, False}, "both happen"
