"""DeepSpeed's universal format: a real engine loads what we write and goes on as ours does; what its
converter writes reads back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import KINDS
from sffn_dist.checkpoint.weights import Weights
from sffn_dist.conversion import deepspeed, universal
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors

CASES = Path(__file__).with_name("universal_cases.py")


def tree(
    folder: Path, stage: int = 1, kind: str = "block_shuffle", guided: bool = False, **model: Any
) -> dict[str, Any]:
    """A tiny run."""
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"layers": 2, "width": 16, "heads": 2, "sequence": 8, "vocab": 32, **model},
        "ffn": {"kind": kind, "width": 32, "blocks": 2, "rank": 4},
        "guide": {"mode": "window", "begin": 1, "end": 9} if guided else {},
        "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01},
        "zero": {"stage": stage},
    }


@pytest.mark.parametrize(("stage", "guided"), [(1, False), (1, True), (2, True), (3, False)])
def test_a_deepspeed_engine_goes_on_from_what_we_wrote(
    ranks: Any, tmp_path: Path, stage: int, guided: bool
) -> None:
    (found,) = ranks(1).run(
        CASES, "there", tree=tree(tmp_path, stage, guided=guided), folder=str(tmp_path / "u"), steps=4, more=3
    )
    assert found["got"]["state"] == found["expected"]["state"]
    assert found["got"]["state"] != found["before"]
    assert found["got"]["losses"] == found["expected"]["losses"]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_tensor_parallel_engines_go_on_too(ranks: Any, tmp_path: Path, activation: str) -> None:
    run = tree(tmp_path, 1, "low_rank", guided=True, activation=activation)
    found = ranks(2, 2).run(
        CASES, "there", tree={**run, "parallel": {"tensor": 2}}, folder=str(tmp_path / "u"), steps=3, more=2
    )
    for one in found:
        assert one["got"]["state"] == one["expected"]["state"]
        assert one["got"]["losses"] == one["expected"]["losses"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_s_converter_wrote_reads_back(ranks: Any, tmp_path: Path, stage: int) -> None:
    (worst,) = ranks(1).run(CASES, "back", tree=tree(tmp_path, stage), folder=str(tmp_path / "d"), steps=3)
    assert worst.pop("size") > 1000
    assert set(worst.values()) == {0.0}


# -------------------------------------------------------------------------------------------------- the files


def made(
    folder: Path, kind: str = "block_dense", guide: bool = True, **model: Any
) -> tuple[Weights, Any, dict[str, int]]:
    """Weights and moments of random numbers, and counts."""
    config = loading.from_tree(tree(folder, kind=kind, **model))
    specs = model_tensors(config, guide=guide)
    generator = torch.Generator().manual_seed(1)
    held = {
        (n, k): torch.randn(s.shape, generator=generator) for n, s in specs.items() for k in deepspeed.FILES
    }
    weights = Weights(config, lambda name: held[name, "weight"], "test", guide=guide, alpha=1.0, step=7)
    steps = {name: 3 if name.endswith(".guide") else 6 for name in specs}
    return weights, lambda name, kind: held[name, kind], steps


@pytest.mark.parametrize("kind", ["dense", "low_rank", "block_dense", "block_shuffle"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_was_written_reads_back(tmp_path: Path, kind: str, activation: str) -> None:
    weights, moments, steps = made(tmp_path, kind, guide=kind != "dense", activation=activation)
    place = deepspeed.write(weights, moments, steps, tmp_path / "u")
    for folder in (tmp_path / "u", place):
        found = deepspeed.read(folder)
        assert found.weights.config == weights.config
        assert (found.weights.step, found.weights.guide, dict(found.steps)) == (7, weights.guide, steps)
        for name in weights.names():
            assert torch.equal(found.weights.full(name), weights.full(name))
            assert all(torch.equal(found.full(name, key), moments(name, key)) for key in deepspeed.FILES)


def test_the_tokenizer_travels_there_and_back(tmp_path: Path) -> None:
    """With what its folder said: without it the model would start from a new one."""
    weights, moments, _ = made(tmp_path, guide=False)
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'}
    header = dataclasses.replace(
        reshard.header(weights, tmp_path / "a"), kinds=KINDS, optimizer_steps=6, step=7, origin=None
    )
    written = reshard.write(header, moments, tmp_path / "a", texts=texts)
    universal.to_universal(written, tmp_path / "u")
    back = universal.from_universal(tmp_path / "u", tmp_path / "b")
    assert {name: (back.folder / name).read_text() for name in texts} == texts
    assert texts.keys() <= back.files.keys()


@pytest.mark.parametrize(
    ("kind", "activation", "tensor", "fits"),
    [
        ("dense", "gelu", 2, True),
        ("dense", "swiglu", 2, True),
        ("low_rank", "gelu", 2, True),
        ("low_rank", "swiglu", 2, True),
        ("block_dense", "swiglu", 2, True),
        ("block_dense", "gelu", 4, False),  # more ranks than blocks
        ("block_shuffle", "gelu", 2, False),  # features are dealt
    ],
)
def test_tensor_parallel_ranks_get_their_parts_or_it_is_not_written(
    tmp_path: Path, kind: str, activation: str, tensor: int, fits: bool
) -> None:
    weights, moments, steps = made(tmp_path, kind, guide=kind != "dense", activation=activation, heads=4)
    wrong = deepspeed.uncut(weights.config, tensor, guide=weights.guide)
    assert (not wrong) == fits
    if fits:
        deepspeed.write(weights, moments, steps, tmp_path / "u", tensor=tensor)
        return
    with pytest.raises(ConfigError, match="cannot tell"):
        deepspeed.write(weights, moments, steps, tmp_path / "u", tensor=tensor)
    assert not (tmp_path / "u").exists()


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    weights, moments, steps = made(tmp_path)
    place = deepspeed.write(weights, moments, steps, tmp_path / "u")
    norm = place / "zero" / "decoder.final_layernorm.bias"
    for damage, message in (
        (lambda: torch.save({"param": torch.ones(3)}, norm / "fp32.pt"), "final_layernorm.bias is"),
        (lambda: torch.save({"param": "x"}, norm / "fp32.pt"), "holds no tensor"),
        (lambda: (norm / "fp32.pt").write_bytes(b"PK"), "fp32.pt"),
        (lambda: (norm / "fp32.pt").unlink(), "nothing for decoder.final_layernorm.bias"),
        (lambda: (place / "zero" / "optimizer_state.pt").unlink(), "has nothing"),
        (lambda: (tmp_path / "u" / deepspeed.LATEST).write_text("../x"), "no tag"),
    ):
        damage()
        with pytest.raises(ConfigError) as caught:
            deepspeed.read(tmp_path / "u")
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="not a universal checkpoint"):
        deepspeed.read(tmp_path)


def test_a_folder_of_no_tensor_and_moments_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    weights, moments, steps = made(tmp_path)
    place = deepspeed.write(weights, moments, steps, tmp_path / "u")
    name = "decoder.final_layernorm.bias"
    torch.save({"param": torch.full((16,), torch.inf)}, place / "zero" / name / "exp_avg.pt")
    with pytest.raises(ConfigError, match=f"exp_avg of {name} = NaN or inf in 16 of 16"):
        deepspeed.read(place).full(name, "exp_avg")
    (place / "zero" / "extra.weight").mkdir()
    with pytest.raises(ConfigError, match=r"zero/extra\.weight has no fp32\.pt"):
        deepspeed.read(place)


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    weights, moments, steps = made(tmp_path)
    place = deepspeed.write(weights, moments, steps, tmp_path / "u")
    name = "decoder.final_layernorm.bias"
    torch.save({"param": torch.ones(3)}, place / "zero" / name / "exp_avg.pt")
    found = deepspeed.read(place)
    assert isinstance(found.full(name, "weight"), Tensor)
    with pytest.raises(ConfigError, match="exp_avg"):
        found.full(name, "exp_avg")


@pytest.mark.parametrize("place", ["fp32.pt", "step.pt", "optimizer_state.pt", "mp_rank_00_model_states.pt"])
def test_nothing_is_executed(payload: Any, place: str, tmp_path: Path, refused: Any) -> None:
    weights, moments, steps = made(tmp_path)
    folder = deepspeed.write(weights, moments, steps, tmp_path / "u")
    for path in folder.rglob(place):
        torch.save({"param": payload}, path)
    refused(lambda: deepspeed.read(folder))


def test_a_config_of_no_use_is_refused(tmp_path: Path) -> None:
    weights, moments, steps = made(tmp_path)
    folder = deepspeed.write(weights, moments, steps, tmp_path / "u")
    for name in deepspeed.MODEL_STATES:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="config must be given"):
        deepspeed.read(folder)
    assert deepspeed.read(folder, weights.config).weights.step == 0
    other = loading.from_tree(tree(tmp_path, kind="low_rank"))
    with pytest.raises(ConfigError, match="has nothing for"):
        deepspeed.read(folder, other)
