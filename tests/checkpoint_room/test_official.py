"""Checkpoints of the paper authors' code: the imported model computes what theirs does.

The reference is their architecture in plain torch on their own state_dict, written from what their code
computes; their classes of configuration nodes are imitated by ones that pickle alike.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sffn_dist.conversion import official
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors

CASES = Path(__file__).with_name("logits_cases.py")


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


theirs = _beside("official_reference")
H, A, INNER, HEADS, KV, LAYERS, VOCAB, LENGTH, D = (
    getattr(theirs, name) for name in ("H", "A", "INNER", "HEADS", "KV", "LAYERS", "VOCAB", "LENGTH", "D")
)
METHODS = theirs.METHODS
KINDS = {
    "linear": "dense",
    "lowrank": "low_rank",
    "blockdense": "block_dense",
    "blockshuffle": "block_shuffle",
}
OMEGA = {
    "dictconfig.DictConfig": "_content",
    "listconfig.ListConfig": "_content",
    "nodes.AnyNode": "_val",
    "base.Metadata": "",
}


# ---------------------------------------------------------------------------------------- files as theirs are


@pytest.fixture(scope="module")
def omega() -> Iterator[Callable[[Any], Any]]:
    """Plain data -> nodes that pickle as OmegaConf's do; the classes are gone when the files are read."""
    classes: dict[str, type] = {}
    for full in OMEGA:
        module, name = f"omegaconf.{full.split('.')[0]}", full.split(".")[1]
        classes[name] = type(name, (), {"__module__": module, "__qualname__": name})
    made = {cls.__module__: types.ModuleType(cls.__module__) for cls in classes.values()}
    for name, cls in classes.items():
        setattr(made[cls.__module__], name, cls)

    def node(value: Any, parent: Any = None) -> Any:
        name = (
            "DictConfig"
            if isinstance(value, dict)
            else "ListConfig"
            if isinstance(value, list)
            else "AnyNode"
        )
        found, metadata = classes[name](), classes["Metadata"]()
        vars(metadata).update(ref_type=Any, object_type=dict, optional=True, key=None, flags={})
        found.__dict__["_metadata"], found.__dict__["_parent"] = metadata, parent
        if name == "DictConfig":
            found.__dict__["_content"] = {key: node(item, found) for key, item in value.items()}
        elif name == "ListConfig":
            found.__dict__["_content"] = [node(item, found) for item in value]
        else:
            found.__dict__["_val"] = value
        return found

    def written(value: Any) -> Any:
        sys.modules.update({"omegaconf": types.ModuleType("omegaconf"), **made})
        return node(value)

    yield written
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        del sys.modules[name]


@pytest.fixture
def save(
    tmp_path: Path, omega: Callable[[Any], Any]
) -> Callable[..., tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    """A file as their trainer writes it, its state_dict and settings."""

    def write(
        method: str = "lowrank",
        act: str = "gelu",
        norm: str = "layernorm",
        guide: str = "off",
        change: Callable[[dict[str, Any]], None] = lambda tree: None,
        with_config: bool = True,
    ) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        config = theirs.configured(
            method,
            act,
            norm,
            bias=norm == "layernorm",
            guided={"off": None, "on": True, "over": False}[guide],
        )
        change(config)
        state = theirs.state_dict(config, None if guide == "off" else 0.7 if guide == "on" else 0.25)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], betas=(0.9, 0.95)).state_dict()
        tree = {
            "model": state,
            "step": 12,
            "nparam": 9,
            "optimizer": optimizer,
            "lr_scheduler": None,
            "resume_kwargs": {"a": 1},
        }
        torch.save({**tree, "config": omega(config)} if with_config else tree, tmp_path / "12.pth")
        forget()
        return tmp_path / "12.pth", state, config

    return write


# ----------------------------------------------------------------------------------------------- what is read

TOKENS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
VARIANTS = [
    (method, act, norm, guide)
    for method in METHODS
    for act, norm in (("gelu", "layernorm"), ("swiglu", "rmsnorm"), ("swiglu", "layernorm"))
    for guide in (("off",) if method == "linear" else ("off", "on", "over"))
]


@pytest.mark.parametrize(("method", "act", "norm", "guide"), VARIANTS)
def test_logits_are_theirs(ranks: Any, save: Any, method: str, act: str, norm: str, guide: str) -> None:
    path, state, config = save(method, act, norm, guide)
    (got,) = ranks(1).run(CASES, "logits", importer="official", path=str(path), tokens=TOKENS.numpy())
    expected = theirs.reference(state, config, TOKENS, 0.7 if guide == "on" else 0.0)
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_is_theirs(save: Any, method: str) -> None:
    path, _, _ = save(method, "swiglu", "rmsnorm", "off" if method == "linear" else "on")
    weights = official.read(path)
    model, ffn, train, guide = (
        weights.config.model,
        weights.config.ffn,
        weights.config.train,
        weights.config.guide,
    )
    assert (model.layers, model.width, model.heads, model.kv_heads, model.attention_dim) == (
        LAYERS,
        H,
        HEADS,
        KV,
        A,
    )
    assert (model.sequence, model.vocab, model.rope_base, model.norm, model.activation) == (
        LENGTH,
        VOCAB,
        500,
        "rmsnorm",
        "swiglu",
    )
    assert (model.bias, model.tie_embeddings) == (False, False)
    assert (ffn.kind, ffn.width, ffn.rank, ffn.blocks) == (
        KINDS[method], INNER, METHODS[method].get("rank"), METHODS[method].get("nblocks")
    )  # fmt: skip
    assert (train.steps, train.global_batch_size, train.micro_batch_size, train.seed) == (100, 512, 64, 1005)
    assert (train.learning_rate, train.beta2, train.warmup_share, train.clip) == (6e-4, 0.95, 0.1, 1.0)
    assert (weights.step, weights.origin, weights.guide) == (13, str(path), method != "linear")
    if method != "linear":
        assert (guide.mode, guide.begin, guide.end, guide.schedule, guide.stochastic) == (
            "window",
            0,
            40,
            "linear",
            True,
        )
        assert weights.alpha == pytest.approx(0.7)


def test_what_is_left_out_is_said(save: Any) -> None:
    notices = official.read(save("lowrank", "gelu", "layernorm", "over")[0]).notices
    assert "not imported: optimizer" in notices
    assert any("guides, whose time is over" in notice for notice in notices)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_theirs_to_the_bit(save: Any, method: str) -> None:
    path, state, _ = save(method, "gelu", "layernorm", "off" if method == "linear" else "on")
    weights = official.read(path)
    specs = model_tensors(weights.config, guide=weights.guide)
    assert set(weights.names()) == set(specs)
    rows = [
        *(range(3 * D)),
        *range(A, A + D),
        *range(A + KV * D, A + KV * D + D),
    ]  # the first group: 3 queries, a key, a value
    for name, spec in specs.items():
        assert tuple(weights.full(name).shape) == spec.shape
    qkv = weights.full("decoder.layers.1.self_attention.linear_qkv.weight")
    assert torch.equal(qkv[: 5 * D], state["model.layers.1.qkv_linear.weight"][rows])
    assert torch.equal(weights.full("embedding.word_embeddings.weight"), state["model.wte.weight"])
    if method != "linear":
        guide = weights.full("decoder.layers.2.mlp.linear_fc2.guide")
        assert torch.equal(guide, state["model.layers.2.mlp.fc2.guide_linear"])
    weights.full("decoder.final_layernorm.weight").zero_()
    assert weights.full("decoder.final_layernorm.weight").any(), "each call reads anew"


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_overrides_stand_for_the_config(save: Any, method: str) -> None:
    path, _, _ = save(method, "swiglu", "layernorm", "off", with_config=False)
    with pytest.raises(ConfigError, match=r"model\.heads"):
        official.read(path)
    weights = official.read(path, [f"model.heads={HEADS}", "model.rope_base=500", f"model.sequence={LENGTH}"])
    with_config = official.read(save(method, "swiglu", "layernorm", "off")[0])
    assert weights.config.model == with_config.config.model
    assert weights.config.ffn == with_config.config.ffn


def test_a_bare_state_dict_and_a_wrapped_one(save: Any, tmp_path: Path) -> None:
    _, state, _ = save("blockshuffle", "gelu", "layernorm", "off")
    state["model.ln_f._extra_state"] = torch.empty(0, dtype=torch.uint8)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "f.pth")
    weights = official.read(tmp_path / "f.pth", [f"model.heads={HEADS}"])
    assert weights.config.ffn.kind == "block_shuffle"
    assert torch.equal(weights.full("embedding.word_embeddings.weight"), state["model.wte.weight"])


def test_every_layer_may_be_structured(save: Any, tmp_path: Path) -> None:
    _, state, _ = save("lowrank")
    for key in [key for key in state if key.startswith("model.layers.0.mlp.fc")]:
        del state[key]
    state.update(
        {key.replace("layers.1", "layers.0"): value for key, value in state.items() if "layers.1.mlp" in key}
    )
    torch.save({"model": state}, tmp_path / "f.pth")
    assert official.read(tmp_path / "f.pth", [f"model.heads={HEADS}"]).config.ffn.dense_layers == ()


# -------------------------------------------------------------------------------------------- what is refused

CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "learned positions": lambda model: model["pos_emb"].update(name="absolute"),
    "rotary_interleaved": lambda model: model["pos_emb"].update(rotary_interleaved=True),
    "seq_len_interpolation_factor": lambda model: model["pos_emb"].update(seq_len_interpolation_factor=2.0),
    "scale_attn_by_inverse_layer_idx": lambda model: model.update(scale_attn_by_inverse_layer_idx=True),
    "act = 'relu'": lambda model: model.update(act="relu"),
}


def test_what_cannot_be_represented_is_listed(save: Any) -> None:
    for name, change in CHANGES.items():
        path, _, _ = save(change=lambda tree, change=change: change(tree["model"]["kwargs"]))
        with pytest.raises(ConfigError, match=name):
            official.read(path)
    path, _, _ = save(
        change=lambda tree: [change(tree["model"]["kwargs"]) for change in CHANGES.values()] and None
    )
    with pytest.raises(ConfigError) as caught:
        official.read(path)
    assert len(caught.value.problems) == len(CHANGES)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "lost": (
        lambda s: s.pop("model.layers.1.o_linear.bias"),
        "has nothing for decoder.layers.1.self_attention.linear_proj.bias",
    ),
    "more": (lambda s: s.update(x=torch.ones(2)), "x is not a parameter"),
    "shape": (
        lambda s: s.update({"model.ln_f.bias": torch.ones(31)}),
        r"decoder.final_layernorm.bias is \[31\] there",
    ),
    "type": (lambda s: s.update({"model.ln_f.bias": "x"}), "ln_f.bias is not a tensor"),
    "integers": (
        lambda s: s.update({"model.ln_f.bias": torch.ones(32, dtype=torch.int8)}),
        "ln_f.bias is not a tensor",
    ),
    "embedding": (lambda s: s.pop("model.wte.weight"), "no model.wte.weight"),
    "ratio": (lambda s: s.pop("model.layers.1.mlp.fc1.ratio"), "ratio"),
    "ratios": (lambda s: s.update({"model.layers.1.mlp.fc1.ratio": torch.tensor(0.1)}), "ratios"),
    "guide": (
        lambda s: s.pop("model.layers.2.mlp.fc1.guide_linear"),
        "has nothing for decoder.layers.2.mlp.linear_fc1.guide",
    ),
    "factor": (lambda s: s.pop("model.layers.1.mlp.fc1.lr2"), "linear_fc1: has no up"),
    "no layers": (lambda s: [s.pop(key) for key in list(s) if "layers" in key], "not all of a GPT"),
    "untied": (lambda s: s.update({"lm_head.weight": torch.ones(VOCAB, H)}), "lm_head"),
    "flat": (lambda s: s.update({"model.wte.weight": torch.ones(3)}), "not all of a GPT"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_wrong_is_named(save: Any, damage: str) -> None:
    path, state, _ = save("lowrank", guide="on")
    change, message = DAMAGES[damage]
    change(state)
    torch.save({"model": state}, path)
    with pytest.raises(ConfigError, match=message):
        official.read(path, [f"model.heads={HEADS}", "model.tie_embeddings=true"])


@pytest.mark.parametrize(
    "value", [3, [], {}, {"model": {}}, {"model": {3: torch.ones(1)}}, {"model": 3}, torch.ones(2)]
)
def test_other_contents_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "f.pth")
    with pytest.raises(ConfigError, match=r"f\.pth"):
        official.read(tmp_path / "f.pth")


def test_nothing_is_executed(payload: Any, save: Any, refused: Any) -> None:
    path, state, _ = save()
    for tree in ({"model": state, "config": payload}, {"model": {**state, "x": payload}}, {"model": payload}):
        torch.save(tree, path)
        refused(lambda: official.read(path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_read_or_are_refused(
    save: Any, repickled: Any, tmp_path: Path, data: st.DataObject
) -> None:
    if not (tmp_path / "12.pth").exists():
        save("blockdense", guide="on")

    def flipped(whole: bytes) -> bytes:
        changed = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    if data.draw(st.booleans()):
        (tmp_path / "g.pth").write_bytes(repickled(tmp_path / "12.pth", flipped))
    else:
        whole = flipped((tmp_path / "12.pth").read_bytes())
        (tmp_path / "g.pth").write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        weights = official.read(tmp_path / "g.pth")
        shapes = {name: tuple(weights.full(name).shape) for name in weights.names()}
    except ConfigError:
        return
    assert shapes == {
        name: spec.shape for name, spec in model_tensors(weights.config, guide=weights.guide).items()
    }
