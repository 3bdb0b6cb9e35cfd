"""The files of an exported folder: shards, types, a place that is whole or not there, the tokenizer, the
model card.
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sffn_dist.checkpoint.weights import merged
from sffn_dist.conversion.hf import source
from sffn_dist.conversion.hf.export import export
from sffn_dist.spec import counts
from sffn_dist.spec.config import ConfigError

transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu"}
GROUPED: dict[str, Any] = {**LLAMA, "kv_heads": 2}
ONLY_STRUCTURED: dict[str, tuple[dict[str, Any], str]] = {
    "layernorm_swiglu": (
        {"norm": "layernorm", "activation": "swiglu"},
        "model.norm = layernorm with model.activation = swiglu",
    ),
    "rmsnorm_gelu": (
        {"norm": "rmsnorm", "activation": "gelu"},
        "model.norm = rmsnorm with model.activation = gelu",
    ),
    "rmsnorm_erf": (
        {"norm": "rmsnorm", "activation": "gelu_erf"},
        "model.norm = rmsnorm with model.activation = gelu_erf",
    ),
    "heads_beside_width": ({**LLAMA, "heads": 3, "attention_dim": 12}, "model.heads = 3"),
}


def loaded(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more).eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def test_shards_hold_the_same_tensors(tree_of: Any, drawn: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    weights = drawn(tree_of("low_rank", **GROUPED))
    whole = export(weights, tmp_path / "whole", ffn="merged", dtype="fp32")
    shards = export(weights, tmp_path / "shards", ffn="merged", dtype="fp32", shard_bytes=3000)
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.numel() * 4 for t in load_file(shards / file).values()) for file in files]
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 3000 for size in sizes)
    assert torch.equal(logits(loaded(shards), tokens), logits(loaded(whole), tokens))
    got, expected = source.read(shards), source.read(whole)
    assert all(torch.equal(got.full(name), expected.full(name)) for name in expected.names())
    assert (shards / "README.md").read_text().replace("shards", "whole") == (whole / "README.md").read_text()


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_bf16_is_the_rounded_model(ffn: Any, tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    weights = drawn(tree_of("low_rank", **GROUPED))
    folder = export(weights, tmp_path / "m", ffn=ffn, dtype="bf16")
    assert loaded(folder, trust_remote_code=ffn == "structured").dtype == torch.bfloat16
    expected, got = merged(weights) if ffn == "merged" else weights, source.read(folder)
    for name in expected.names():
        assert torch.equal(got.full(name), expected.full(name).to(torch.bfloat16).float()), name


@pytest.mark.parametrize("variant", ONLY_STRUCTURED)
def test_what_no_architecture_has_is_refused_merged(
    variant: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    settings, expected = ONLY_STRUCTURED[variant]
    with pytest.raises(ConfigError, match=expected) as caught:
        export(drawn(tree_of("low_rank", **settings)), tmp_path / "m", ffn="merged", dtype="fp32")
    assert "structured" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "file", "dangling link", "empty folder"])
def test_an_existing_target_is_refused_and_untouched(
    what: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    target = tmp_path / "m"
    if what == "file":
        target.write_text("mine")
    elif what == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if what == "folder":
            (target / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=str(target)):
        export(drawn(tree_of(**LLAMA)), target, ffn="merged", dtype="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not target.is_dir() or [path.name for path in target.iterdir()] == (
        ["mine"] if what == "folder" else []
    )


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("at", ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"])
def test_a_failure_leaves_nothing(
    error: BaseException, at: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    weights = drawn(tree_of("low_rank", **LLAMA))

    def full(name: str) -> torch.Tensor:
        if name == at:
            raise error
        return weights.full(name)

    with pytest.raises(type(error)):
        export(replace(weights, full=full), tmp_path / "m", ffn="merged", dtype="fp32", shard_bytes=3000)
    assert list(tmp_path.iterdir()) == []
    assert export(weights, tmp_path / "m", ffn="merged", dtype="fp32").is_dir(), (
        "the same place serves afterwards"
    )


def test_another_export_to_the_same_place_is_refused(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    (tmp_path / ".m.partial").mkdir()
    with pytest.raises(ConfigError, match=r"\.m\.partial exists"):
        export(drawn(tree_of(**LLAMA)), tmp_path / "m", ffn="merged", dtype="fp32")
    assert (tmp_path / ".m.partial").is_dir(), "it is another's"


def test_the_target_is_not_there_until_it_is_whole(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    weights, seen = drawn(tree_of(**LLAMA)), []

    def full(name: str) -> torch.Tensor:
        seen.append((tmp_path / "deep" / "m").exists())
        return weights.full(name)

    export(replace(weights, full=full), tmp_path / "deep" / "m", ffn="merged", dtype="fp32")
    assert seen == [False] * len(weights.names())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]


def test_one_tensor_is_in_memory_at_a_time(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    weights = drawn(tree_of(**LLAMA))
    given: list[weakref.ref[torch.Tensor]] = []

    def full(name: str) -> torch.Tensor:
        assert [ref for ref in given if ref() is not None] == [], "an earlier one is still held"
        tensor = weights.full(name).clone()
        given.append(weakref.ref(tensor))
        return tensor

    export(replace(weights, full=full), tmp_path / "m", ffn="structured", dtype="bf16", shard_bytes=3000)
    assert len(given) == len(weights.names())


def test_a_place_that_cannot_be_written_is_named(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file/m: cannot be written"):
        export(drawn(tree_of(**LLAMA)), tmp_path / "file" / "m", ffn="merged", dtype="fp32")


def test_wrong_arguments_and_tensors_are_refused(tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    weights = drawn(tree_of(**LLAMA))
    for wrong in ({"ffn": "dense"}, {"dtype": "fp16"}, {"shard_bytes": 0}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            export(weights, tmp_path / "m", **{"ffn": "merged", "dtype": "fp32", **wrong})
    with pytest.raises(ConfigError, match=r"embedding\.word_embeddings\.weight is \[2\]"):
        export(replace(weights, full=lambda name: torch.zeros(2)), tmp_path / "m", ffn="merged", dtype="fp32")
    assert list(tmp_path.iterdir()) == []


def test_export_and_source_need_no_transformers() -> None:
    import subprocess

    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import sffn_dist.conversion.hf.export, sffn_dist.conversion.hf.source\nprint('megatron' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


# -------------------------------------------------------------------------------------- tokenizer, model card


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "c": 5, "Ċ": 6}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_the_tokenizer_travels_with_its_end_of_text(
    ffn: Any, tokenizer: Any, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    weights = drawn(tree_of("low_rank", **GROUPED), tokenizer=tokenizer.to_str())
    folder = export(weights, tmp_path / "m", ffn=ffn, dtype="fp32")
    got = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=ffn == "structured")
    text = "ab c\na b\n ab"
    assert got(text)["input_ids"] == tokenizer.encode(text).ids
    assert got.decode(got(text)["input_ids"]) == text
    assert (got.eos_token_id, got.bos_token_id, got.pad_token_id) == (0, 0, 0)
    assert got.model_max_length == weights.config.model.sequence
    assert got(["ab", "a b c"], padding=True, return_tensors="pt")["attention_mask"].tolist()[0].count(0) == 4
    model = loaded(folder, trust_remote_code=ffn == "structured")
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (0, 0, None)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 0)
    assert source.read(folder).tokenizer == weights.tokenizer


def test_no_tokenizer_and_no_end_of_text(tokenizer: Any, tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    folder = export(drawn(tree_of(**LLAMA)), tmp_path / "none", ffn="merged", dtype="fp32")
    assert not (folder / "tokenizer.json").exists()
    assert loaded(folder).config.eos_token_id is None
    text = tokenizer.to_str().replace("<|endoftext|>", "<odd>")
    folder = export(drawn(tree_of(**LLAMA), tokenizer=text), tmp_path / "odd", ffn="merged", dtype="fp32")
    got = transformers.AutoTokenizer.from_pretrained(folder)
    assert (got.eos_token, got.pad_token) == (None, None)
    for broken in ("{", "[]", '{"model": 3}'):
        with pytest.raises(ConfigError, match="no tokenizer"):
            export(drawn(tree_of(**LLAMA), tokenizer=broken), tmp_path / "broken", ffn="merged", dtype="fp32")
    assert not (tmp_path / "broken").exists()


# --------------------------------------------------------- what a tokenizer's folder says, import to export

SAYS: dict[str, dict[str, Any]] = {
    "config.json": {"bos_token_id": 7, "eos_token_id": [8, 0]},
    "generation_config.json": {"eos_token_id": [8, 0], "temperature": 0.6, "do_sample": True},
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "added_tokens_decoder": {"9": {"content": "<pad>", "special": True}},
        "model_max_length": 999,
    },
}
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def foreign(tokenizer: Any, tree_of: Any, drawn: Any, tmp_path: Path) -> Path:
    """A folder as others publish it, whose tokenizer puts <s> before a text."""
    from tokenizers import Tokenizer, processors

    folder = export(drawn(tree_of(**LLAMA)), tmp_path / "foreign", ffn="merged", dtype="fp32")
    made = Tokenizer.from_str(tokenizer.to_str())
    made.add_special_tokens(["<s>", "</s>"])
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 7)]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    made.save(str(folder / "tokenizer.json"))
    for name, tree in SAYS.items():
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**before, **tree}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def check_what_it_says(folder: Path) -> Any:
    """Special tokens, chat template and generation config are those of SAYS."""
    got = transformers.AutoTokenizer.from_pretrained(folder)
    assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (7, 8, 9)
    assert got.apply_chat_template([{"content": "ab"}], tokenize=False) == "<s>ab"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([8, 0], 0.6)
    model = loaded(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (7, [8, 0])
    assert model.generation_config.temperature == 0.6
    return got


def test_what_a_folder_says_is_carried_to_the_export(foreign: Path, tmp_path: Path) -> None:
    """Through a checkpoint; a model that was only converted encodes as it did."""
    from sffn_dist.checkpoint import reader, reshard

    reshard.write_weights(source.read(foreign), tmp_path / "imported")
    reshard.reshard(reshard.Manifest.read(tmp_path / "imported"), tmp_path / "cut", tensor=1)
    weights = reader.read_weights(tmp_path / "cut")
    got = check_what_it_says(export(weights, tmp_path / "back", ffn="merged", dtype="fp32"))
    assert got("ab c").input_ids == transformers.AutoTokenizer.from_pretrained(foreign)("ab c").input_ids
    assert got("ab c").input_ids[0] == 7
    assert got.model_max_length == weights.config.model.sequence


@pytest.mark.parametrize("bos", [False, True])
def test_the_exported_tokenizer_emits_what_training_saw(bos: bool, foreign: Path, tmp_path: Path) -> None:
    """import -> prepared corpus -> checkpoint -> export: the ids of a text are those in the shards."""
    from sffn_dist.checkpoint import reader, reshard
    from sffn_dist.data.prepare import prepare
    from sffn_dist.data.shards import open_corpus
    from sffn_dist.spec import loading

    imported = reshard.write_weights(source.read(foreign), tmp_path / "imported").folder
    texts = ["ab c\na b\n", "cab a", "b", "a b ab c"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    tree = json.loads((imported / "start.json").read_text())
    settings = {"dir": str(tmp_path / "data"), "source": str(tmp_path / "rows.jsonl"), "heldout_share": 0.5}
    tree["data"] |= {**settings, "bos": bos}
    config = loading.from_tree({**tree, "train": {"steps": 1, "global_batch_size": 8}})
    corpus = open_corpus(prepare(config))
    assert (corpus.meta.end_of_text, corpus.meta.bos) == (8, 7 if bos else None)

    weights = reader.read_weights(imported)
    carried = {name: (corpus.folder / name).read_text() for name in weights.tokenizer_settings}
    trained = replace(
        weights,
        config=config,
        trained=True,
        tokenizer=(corpus.folder / "tokenizer.json").read_text(),
        tokenizer_settings=carried,
    )
    got = check_what_it_says(export(trained, tmp_path / "back", ffn="merged", dtype="fp32"))
    stream = [*corpus.train[:].tolist(), *corpus.heldout[:].tolist()]
    held = " ".join(map(str, stream))
    for text in texts:
        assert " ".join(map(str, [*got(text).input_ids, 8])) in held
        assert (got(text).input_ids[0] == 7) is bos
    assert len(stream) == sum(len(got(text).input_ids) + 1 for text in texts)


def test_more_tokens_than_rows_are_refused_at_import(foreign: Path) -> None:
    tree = json.loads((foreign / "tokenizer_config.json").read_text())
    tree["added_tokens_decoder"] |= {str(n): {"content": f"<{n}>", "special": True} for n in range(10, 38)}
    (foreign / "tokenizer_config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: has tokens up to id 37, .* vocab_size = 37"):
        source.read(foreign)


def test_a_folder_without_a_tokenizer_says_what_training_needs(
    foreign: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a start from it is refused before anything is prepared, unless data.tokenizer is named."""
    from sffn_dist.checkpoint import reshard
    from sffn_dist.launch import run_identity
    from sffn_dist.spec import loading

    tokenizer = (foreign / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    imported = reshard.write_weights(source.read(foreign), tmp_path / "imported").folder
    assert "holds no tokenizer; training from it needs data.tokenizer" in caplog.text
    tree = {
        **json.loads((imported / "start.json").read_text()),
        "train": {"steps": 1, "global_batch_size": 8},
    }
    with pytest.raises(ConfigError, match=r"data\.tokenizer = null: must name the tokenizer of init_from = "):
        run_identity.check_source_of_weights(loading.from_tree(tree))
    tree["data"] = {"tokenizer": str(tokenizer)}
    run_identity.check_source_of_weights(loading.from_tree(tree))


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_the_card_says_what_the_model_is(ffn: Any, tree_of: Any, drawn: Any, tmp_path: Path) -> None:
    import yaml

    facts = {
        "data_fingerprint": "f00d",
        "revision": "a|b\nc",
        "results": {"heldout_loss": 3.25},
        "unknown": None,
    }
    weights = drawn(tree_of("block_dense", **LLAMA), facts=facts, step=1200)
    text = (export(weights, tmp_path / "m", ffn=ffn, dtype="bf16") / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "block-dense" in yaml.safe_load(header)["tags"]
    assert "license" not in yaml.safe_load(header)
    config = (merged(weights) if ffn == "merged" else weights).config
    for row in ("| data_fingerprint | f00d |", "| revision | a\\|b c |", "| results.heldout_loss | 3.25 "
                                                                         "|", "| rank | 8 |",
                f"| all | {counts.parameters(config):,} |", "1,200 steps", "2406.16450"):  # fmt: skip
        assert row in body, row
    assert ("trust_remote_code" in body) == (ffn == "structured")
    assert "unknown" not in body
    known = export(replace(weights, facts={"license": "mit"}), tmp_path / "known", ffn=ffn, dtype="bf16")
    assert yaml.safe_load((known / "README.md").read_text().split("---\n")[1])["license"] == "mit"


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_the_lines_of_the_card_run_as_printed(
    ffn: Any, tokenizer: Any, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    """From beside the folder, with nobody to answer a question."""
    import os
    import re
    import subprocess

    weights = drawn(tree_of("low_rank", **GROUPED), tokenizer=tokenizer.to_str())
    folder = export(weights, tmp_path / 'my "model"', ffn=ffn, dtype="fp32")
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert lines
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", lines[1]],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "y/N" not in done.stdout + done.stderr
    assert done.stdout.startswith("a")


def test_the_tokenizer_gives_what_generate_takes(
    tokenizer: Any, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    """Transformers 4 would give token_type_ids too, unless told."""
    weights = drawn(tree_of(**LLAMA), tokenizer=tokenizer.to_str())
    folder = export(weights, tmp_path / "m", ffn="merged", dtype="fp32")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("kind", ["low_rank", "block_shuffle"])
def test_the_card_says_what_tensor_parallel_ranks_hold(
    kind: str, tree_of: Any, drawn: Any, tmp_path: Path
) -> None:
    text = (
        export(drawn(tree_of(kind, **LLAMA)), tmp_path / "m", ffn="structured", dtype="fp32") / "README.md"
    ).read_text()
    whole = "the structured feed-forward layers are whole on every rank"
    assert ("factors at the inner features are cut" in text, whole in text) == (
        kind == "low_rank",
        kind != "low_rank",
    )
