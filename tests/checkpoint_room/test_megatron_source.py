"""Checkpoints that megatron-core wrote: the imported model has the logits of the one that was saved."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.enums import ModelType
from torch.distributed.checkpoint.metadata import MetadataIndex

from sffn_dist.conversion import megatron, pickles
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors

CASES, LOGITS = Path(__file__).with_name("megatron_cases.py"), Path(__file__).with_name("logits_cases.py")
TOKENS = np.random.default_rng(1).integers(0, 48, (2, 12))
MODELS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "fused gelu": {"bias_gelu_fusion": True},
    "swiglu": {
        "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False, "group_query_attention": True,
        "num_query_groups": 2, "kv_channels": 10, "untie_embeddings_and_output_weights": True,
        "rotary_base": 700, "norm_epsilon": 1e-3,
    },
    "swiglu with biases": {"swiglu": True},
    "qkv bias": {"add_bias_linear": False, "add_qkv_bias": True, "swiglu": True},
}  # fmt: skip
WAYS = ("stacked", "by_layer", "halves", "legacy", "pipeline", "interleaved")
FILE = "iter_0000007/mp_rank_00/model_optim_rng.pt"
NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]
Write = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture
def write(ranks: Any, tmp_path: Path) -> Write:
    """A checkpoint of a model, and the model's logits."""

    def saved(how: str, model: str = "gelu", tensor: int = 1, **extra: Any) -> tuple[Path, np.ndarray]:
        options = {**MODELS[model], **extra}
        found = ranks(tensor, tensor).run(
            CASES, "save", how=how, folder=str(tmp_path / "c"), tensor=tensor, tokens=TOKENS, **options
        )
        return tmp_path / "c", found[0]

    return saved


VARIANTS = [
    *(("swiglu", how, 2) for how in WAYS),
    *(("gelu", how, 2) for how in WAYS if how != "halves"),  # nothing gated
    *((model, how, 1) for model in MODELS for how in ("stacked", "legacy")),
    *((model, "pipeline", 2) for model in ("swiglu with biases", "qkv bias")),
]


@pytest.mark.parametrize(("model", "how", "tensor"), VARIANTS)
def test_logits_are_the_source_s(ranks: Any, write: Write, model: str, how: str, tensor: int) -> None:
    path, expected = write(how, model, tensor)
    (got,) = ranks(1).run(LOGITS, "logits", importer="megatron", path=str(path), tokens=TOKENS)
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def whole(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format, to be copied and spoilt."""
    base = tmp_path_factory.mktemp("megatron")
    for how in ("stacked", "legacy", "pipeline"):
        ranks(1).run(CASES, "save", how=how, folder=str(base / how), tensor=1, tokens=TOKENS)
    return {how: base / how for how in ("stacked", "legacy", "pipeline")}


@pytest.fixture
def copied(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda how: Path(shutil.copytree(whole[how], tmp_path / how))


def change(path: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a torch file of the test's own making."""
    with torch.serialization.safe_globals([argparse.Namespace, ModelType, *NUMPY]):
        tree = torch.load(path, weights_only=True)
    how(tree)
    torch.save(tree, path)


# ------------------------------------------------------------------------------------------------- the config


def test_the_config_is_that_of_the_arguments(write: Write) -> None:
    weights = megatron.read(write("by_layer", "swiglu")[0])
    model, train = weights.config.model, weights.config.train
    assert (model.layers, model.width, model.heads, model.kv_heads, model.attention_dim) == (4, 24, 4, 2, 40)
    assert (model.sequence, model.vocab, model.rope_base, model.norm, model.norm_epsilon) == (
        12,
        48,
        700,
        "rmsnorm",
        1e-3,
    )
    assert (model.activation, model.bias, model.tie_embeddings) == ("swiglu", False, False)
    assert (weights.config.ffn.kind, weights.config.ffn.width) == ("dense", 40)
    assert (train.steps, train.learning_rate, train.beta2, train.global_batch_size, train.seed) == (
        30,
        3e-4,
        0.95,
        8,
        1234,
    )
    assert (weights.step, weights.guide) == (7, False)
    assert weights.origin.endswith("iter_0000007")
    assert weights.facts["arguments"]["hidden_size"] == 24


@pytest.mark.parametrize(
    ("extra", "activation"),
    [
        ({}, "gelu_erf"),
        ({"bias_gelu_fusion": True}, "gelu"),
        ({"openai_gelu": True}, "gelu"),
        (
            {"bias_gelu_fusion": True, "add_bias_linear": False},
            "gelu_erf",
        ),  # Megatron-LM fuses only with a bias
    ],
)
def test_which_gelu_it_is(copied: Any, extra: dict[str, Any], activation: str) -> None:
    path = copied("legacy")
    change(path / FILE, lambda tree: vars(tree["args"]).update(extra))
    assert megatron.read(path).config.model.activation == activation
    assert megatron.read(path, ["model.activation=gelu_erf"]).config.model.activation == "gelu_erf"


@pytest.mark.parametrize("how", ["stacked", "legacy"])
def test_without_arguments_what_no_shape_tells_must_be_given(copied: Any, how: str) -> None:
    path = copied(how)
    change(path / ("common.pt" if how == "stacked" else FILE), lambda tree: tree.pop("args"))
    with pytest.raises(ConfigError, match=r"(?s)model\.heads.*model\.activation"):
        megatron.read(path)
    with pytest.raises(ConfigError, match=r"model\.activation"):
        megatron.read(path, ["model.heads=4"])
    weights = megatron.read(path, ["model.heads=4", "model.activation=gelu", "model.sequence=12"])
    assert weights.config.model == megatron.read(copied("pipeline"), ["model.activation=gelu"]).config.model
    if how == "stacked":
        (path / "common.pt").unlink()
        assert megatron.read(path, ["model.heads=4", "model.activation=gelu"]).step == 0


def test_a_norm_around_one_becomes_a_plain_one(copied: Any) -> None:
    path = copied("legacy")
    plain = megatron.read(path)
    before = {name: plain.full(name) for name in plain.names()}
    change(path / FILE, lambda tree: vars(tree["args"]).update(apply_layernorm_1p=True))
    weights = megatron.read(path)
    for name, tensor in before.items():
        assert torch.equal(weights.full(name), tensor + 1 if name.endswith("layernorm.weight") else tensor)


def test_tensors_come_in_full_precision_one_at_a_time(copied: Any) -> None:
    path = copied("legacy")
    change(
        path / FILE,
        lambda tree: tree["model"].update(
            {k: v.bfloat16() for k, v in tree["model"].items() if v is not None}
        ),
    )
    weights = megatron.read(path)
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    assert weights.full(name).dtype == torch.float32
    assert torch.equal(weights.full(name), megatron.read(copied("stacked")).full(name).bfloat16().float())
    weights.full(name).zero_()
    assert weights.full(name).any()


def test_only_the_asked_layer_of_a_stacked_tensor_is_read(
    copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = megatron.read(copied("stacked"))
    read: list[int] = []
    real = pickles.load_part
    monkeypatch.setattr(
        pickles, "load_part", lambda path, start, length: read.append(length) or real(path, start, length)
    )
    tensor = weights.full("decoder.layers.3.mlp.linear_fc2.weight")
    assert len(read) == 1
    assert read[0] < 4 * tensor.numel() + 2000


# -------------------------------------------------------------------------------------------- what is refused

UNFIT = {
    "position_embedding_type": "learned_absolute", "rotary_percent": 0.5, "rotary_interleaved": True,
    "use_rope_scaling": True, "num_experts": 8, "multi_latent_attention": True, "squared_relu": True,
    "qk_layernorm": True, "normalization": "L2Norm", "window_size": (128, 0),
    "rotary_seq_len_interpolation_factor": 2, "mtp_num_layers": 1,
}  # fmt: skip


def test_every_reason_is_told_at_once(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("stacked")
    change(path / "common.pt", lambda tree: vars(tree["args"]).update(UNFIT))
    monkeypatch.setattr(pickles, "load_part", None)  # before a tensor is read
    with pytest.raises(ConfigError) as caught:
        megatron.read(path)
    assert len(caught.value.problems) == len(UNFIT)
    assert all(any(key in problem for problem in caught.value.problems) for key in UNFIT)


def lose(path: Path, key: str) -> None:
    change(path / FILE, lambda tree: tree["model"].pop(key))


SPOILT: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "nothing": ("legacy", lambda p: (shutil.rmtree(p), p.mkdir()), "not a Megatron checkpoint"),
    "no folder": ("legacy", lambda p: shutil.rmtree(p), "no such folder"),
    "latest": ("legacy", lambda p: (p / "latest_checkpointed_iteration.txt").write_text("8"), "'8'"),
    "latest elsewhere": (
        "legacy",
        lambda p: (p / "latest_checkpointed_iteration.txt").write_text("../x"),
        "no folder",
    ),
    "latest in bytes": (
        "legacy",
        lambda p: (p / "latest_checkpointed_iteration.txt").write_bytes(b"\xff"),
        "cannot be read",
    ),
    "stage": ("pipeline", lambda p: shutil.rmtree(p / "mp_rank_00_001"), "mp_rank_00_001"),
    "last stage": ("pipeline", lambda p: shutil.rmtree(p / "mp_rank_00_002"), "final_layernorm"),
    "rank file": (
        "pipeline",
        lambda p: (p / "mp_rank_00_001" / "model_optim_rng.pt").unlink(),
        "cannot be read",
    ),
    "tensor": (
        "legacy",
        lambda p: lose(p, "decoder.layers.1.mlp.linear_fc2.weight"),
        "layers.1.mlp.linear_fc2.weight",
    ),
    "one bias": (
        "legacy",
        lambda p: lose(p, "decoder.layers.1.mlp.linear_fc2.bias"),
        "layers.1.mlp.linear_fc2.bias",
    ),
    "more": (
        "legacy",
        lambda p: change(p / FILE, lambda t: t["model"].update(x=torch.ones(1))),
        "x is in it",
    ),
    "no tensor": (
        "legacy",
        lambda p: change(p / FILE, lambda t: t["model"].update(x=[1])),
        "x is not a tensor",
    ),
    "old names": (
        "legacy",
        lambda p: change(p / FILE, lambda t: t.update(model={"language_model": {}})),
        "language_model",
    ),
    "old order": (
        "legacy",
        lambda p: change(p / FILE, lambda t: t.update(checkpoint_version=1.0)),
        "checkpoint_version",
    ),
    "no model": ("legacy", lambda p: change(p / FILE, lambda t: t.pop("model")), "no model"),
    "zarr": ("stacked", lambda p: (p / ".metadata").unlink(), "torch_dist"),
    "chunks": ("stacked", lambda p: [f.unlink() for f in p.glob("*.distcp")], "cannot be read"),
    "short": (
        "stacked",
        lambda p: [f.write_bytes(f.read_bytes()[:-100]) for f in p.glob("*.distcp")],
        "distcp",
    ),
    "metadata": ("stacked", lambda p: (p / ".metadata").write_bytes(pickle.dumps({"a": 1})), "metadata"),
    "torn metadata": (
        "stacked",
        lambda p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:900]),
        "metadata",
    ),
    "common": ("stacked", lambda p: (p / "common.pt").write_bytes(b""), "common.pt"),
}


def read_all(path: Path) -> None:
    weights = megatron.read(path)
    for name, spec in model_tensors(weights.config, guide=False).items():
        assert tuple(weights.full(name).shape) == spec.shape


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_missing_or_wrong_is_named(copied: Any, name: str, refused: Any) -> None:
    how, spoil, message = SPOILT[name]
    path = copied(how)
    spoil(path)
    assert message in refused(lambda: read_all(path))


def test_chunks_that_do_not_make_the_tensor_are_refused(copied: Any, refused: Any) -> None:
    path, name = copied("stacked"), "decoder.layers.mlp.linear_fc2.weight"
    whole = (path / ".metadata").read_bytes()

    def spoil(how: Callable[[Any], Any]) -> str:
        metadata = pickle.loads(whole)  # the test's own
        how(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        return str(refused(lambda: read_all(path)))

    assert "has 0 of 960 elements" in spoil(lambda m: m.state_dict_metadata[name].chunks.pop(2))
    other = MetadataIndex("decoder.final_layernorm.bias", (0,))
    assert "holds no tensor of shape" in spoil(
        lambda m: m.storage_data.update({MetadataIndex(name, (2, 0, 0)): m.storage_data[other]})
    )
    assert ".metadata" in spoil(lambda m: m.storage_data.pop(MetadataIndex(name, (2, 0, 0))))
    for info in (
        {"relative_path": "../x.distcp"},
        {"transform_descriptors": ["zstd"]},
        {"offset": -1},
        {"length": 3},
    ):
        spoil(
            lambda m, info=info: [
                vars(place).update(info) for index, place in m.storage_data.items() if index.fqn == name
            ]
        )


@pytest.mark.parametrize("place", ["legacy", "common.pt", ".metadata", "distcp", "beside the model"])
def test_nothing_is_executed(payload: Any, place: str, copied: Any, refused: Any) -> None:
    path = copied("legacy" if place in ("legacy", "beside the model") else "stacked")
    if place == "legacy":
        change(path / FILE, lambda tree: tree["model"].update(x=payload))
    elif place == "beside the model":
        change(path / FILE, lambda tree: tree.update(args=payload))
    elif place == "common.pt":
        change(path / place, lambda tree: tree.update(args=payload))
    elif place == ".metadata":
        (path / place).write_bytes(pickle.dumps({"planner_data": payload, "state_dict_metadata": {}}))
    else:  # a chunk, of every tensor, in the place that the metadata says
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        for file in path.glob("*.distcp"):
            starts = sorted(
                match.start()
                for match in re.finditer(rb"PK\x03\x04.{26}archive/data\.pkl", file.read_bytes(), re.DOTALL)
            )
            data = bytearray(file.read_bytes())
            for start, end in itertools.pairwise([*starts, len(data)]):
                data[start:end] = buffer.getvalue()[: end - start].ljust(end - start, b"\0")
            file.write_bytes(data)
    refused(lambda: read_all(path))


def test_bytes_in_a_distributed_checkpoint_are_left_alone(copied: Any, harmful: Any, tmp_path: Path) -> None:
    """torch.distributed.checkpoint would unpickle what the metadata calls bytes; here nobody asks for
    them.
    """
    path = copied("stacked")
    for file in path.glob("*.distcp"):
        (path / file.name).write_bytes(file.read_bytes() + pickle.dumps(harmful))
    read_all(path)
    assert not (tmp_path / "executed").exists()


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    "place", ["stacked/.metadata", "stacked/common.pt", "stacked/__0_0.distcp", f"legacy/{FILE}"]
)
@FUZZ
@given(data=st.data())
def test_damaged_files_read_or_are_refused(
    whole: Any, repickled: Any, place: str, data: st.DataObject
) -> None:
    how, _, name = place.partition("/")
    file = whole[how] / name
    before = file.read_bytes()

    def flipped(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    try:
        deep = name.endswith(".pt") and data.draw(st.booleans())
        file.write_bytes(repickled(file, flipped) if deep else flipped(before))
        with contextlib.suppress(ConfigError):
            read_all(whole[how])
    finally:
        file.write_bytes(before)


# ------------------------------------------------------------------------------------ nothing left out unsaid


def test_an_output_layer_that_is_not_the_embedding_is_kept_though_tied(copied: Any) -> None:
    folder = copied("legacy")
    (file,) = folder.rglob("model_optim_rng.pt")

    def say_tied(tree: dict[str, Any]) -> None:
        tree["args"].untie_embeddings_and_output_weights = False
        tree["model"]["output_layer.weight"] = tree["model"]["embedding.word_embeddings.weight"] + 1.0

    change(file, say_tied)
    weights = megatron.read(folder)
    assert not weights.config.model.tie_embeddings
    head, table = weights.full("output_layer.weight"), weights.full("embedding.word_embeddings.weight")
    assert torch.equal(head, table + 1.0)
    assert any("output_layer.weight differs from the embedding" in notice for notice in weights.notices)
    change(file, lambda tree: tree["model"].update({"output_layer.weight": table}))
    assert megatron.read(folder).config.model.tie_embeddings


def test_what_lies_beside_the_model_is_said(copied: Any) -> None:
    folder = copied("legacy")
    (file,) = folder.rglob("model_optim_rng.pt")
    change(file, lambda tree: tree.update(optimizer={"state": torch.zeros(2)}))
    assert any("not imported: optimizer" in notice for notice in megatron.read(folder).notices)


def test_pipeline_stages_that_disagree_are_refused(copied: Any) -> None:
    folder = copied("pipeline")
    files = sorted(folder.rglob("model_optim_rng.pt"))
    name = "embedding.word_embeddings.weight"
    with torch.serialization.safe_globals([argparse.Namespace, ModelType, *NUMPY]):
        first = torch.load(files[0], weights_only=True)
    key = next(key for key in first if key.startswith("model") and name in first[key])
    last_key = "model" if key == "model" else max(key for key in first if re.fullmatch(r"model\d", key))
    change(files[-1], lambda tree: tree[last_key].update({name: first[key][name] + 1.0}))
    with pytest.raises(ConfigError, match="stages do not agree on embedding"):
        megatron.read(folder).full(name)


def test_tensor_parallel_ranks_that_disagree_are_refused(ranks: Any, tmp_path: Path) -> None:
    """About what each of them holds whole."""
    ranks(2, 2).run(CASES, "save", how="legacy", folder=str(tmp_path), tensor=2, tokens=TOKENS)
    files, name = sorted(tmp_path.rglob("model_optim_rng.pt")), "decoder.final_layernorm.weight"
    assert len(files) == 2
    assert megatron.read(tmp_path).full(name).numel()
    change(files[1], lambda tree: tree["model"].update({name: tree["model"][name] + 1.0}))
    with pytest.raises(ConfigError, match=f"hold different values of {name}, must be equal"):
        megatron.read(tmp_path).full(name)
