"""Variants of a comparison: their names, sizes, steps and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.comparison import variants
from sffn_dist.comparison.variants import PlannedVariant, Variant, ffn_parameters, parse, with_ffn
from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.validation import problems

TREE: dict[str, Any] = {
    "model": {"layers": 3, "width": 48, "heads": 4, "sequence": 32, "vocab": 512},
    "ffn": {"kind": "low_rank", "width": 192, "rank": 12},
    "train": {"steps": 200, "global_batch_size": 8, "micro_batch_size": 8},
}
ALL = (
    "dense,dense_narrow,low_rank,low_rank+guide,"
    "block_dense,block_dense+guide,block_shuffle,block_shuffle+guide"
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(TREE), encoding="utf-8")
    return str(file)


def made(path: str, text: str, *overrides: str, equal: variants.Equal = "flops") -> dict[str, PlannedVariant]:
    return {entry.label: entry for entry in variants.planned_variants(path, overrides, parse(text), equal)}


def refused(path: str, text: str, *overrides: str, equal: variants.Equal = "flops") -> str:
    with pytest.raises(ConfigError) as caught:
        variants.planned_variants(path, overrides, parse(text), equal)
    return "\n".join(caught.value.problems)


# ------------------------------------------------------------------------------------------------------ names


def test_names_are_read_and_written_the_same() -> None:
    text = (
        "dense,dense_narrow:width=100,low_rank+guide,"
        "block_dense:rank=96:blocks=4+guide,block_shuffle:blocks=2"
    )
    assert ",".join(variant.label for variant in parse(text)) == text
    assert parse("block_dense:blocks=4:rank=96")[0] == Variant("block_dense", (("rank", 96), ("blocks", 4)))
    assert len({variant.folder for variant in parse(text)}) == 5
    assert not any(set(variant.folder) & set(":/, ") for variant in parse(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("monarch", "variant 'monarch': must read kind[:size=number ...][+guide]"),
        ("", "variant '': must read"),
        ("dense,,low_rank", "variant '': must read"),
        ("low_rank+guided", "variant 'low_rank+guided': must read"),
        ("low_rank+guide:rank=3", "must read"),
        ("dense+guide", "nothing to guide"),
        ("dense_narrow+guide", "nothing to guide"),
        ("dense:width=3", "dense takes no size"),
        ("low_rank:blocks=3", "low_rank takes rank, not 'blocks'"),
        ("low_rank:rank=0", "not '0'"),
        ("low_rank:rank", "not ''"),
        ("low_rank:rank=3:rank=4", "rank must be given once"),
        ("low_rank,low_rank", "variant low_rank: named twice"),
    ],
)
def test_other_names_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        parse(text)
    assert says in str(caught.value)


def test_seeds() -> None:
    assert variants.seeds("0, 7,2") == [0, 7, 2]
    for wrong in ("", "a", "-1", "1,1", "1.5", "1,"):
        with pytest.raises(ConfigError, match="--seeds"):
            variants.seeds(wrong)


# ------------------------------------------------------------------------------------------------------ sizes


def miss(config: Config, target: int, **values: Any) -> int:
    return abs(ffn_parameters(with_ffn(config, **values)) - target)


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([32, 48, 64, 96]),
    factor=st.sampled_from([2, 3, 4]),
    share=st.floats(0.05, 1.0),
    activation=st.sampled_from(["gelu", "swiglu"]),
    bias=st.booleans(),
    dense_layers=st.sampled_from([[], [0], [0, 2]]),
    tensor=st.sampled_from([1, 2]),
)
def test_sizes_are_the_nearest_by_trying_all(
    width: int, factor: int, share: float, activation: str, bias: bool, dense_layers: list[int], tensor: int
) -> None:
    tree = json.loads(json.dumps(TREE)) | {"parallel": {"tensor": tensor}}
    tree["model"] |= {"width": width, "activation": activation, "bias": bias}
    tree["ffn"] |= {
        "width": factor * width,
        "rank": max(1, round(share * width)),
        "dense_layers": dense_layers,
    }
    config = from_tree(tree)
    target = ffn_parameters(config)

    narrow = variants.sizes_of(Variant("dense_narrow"), config)["width"]
    dense = with_ffn(config, kind="dense")
    assert narrow % tensor == 0
    assert miss(dense, target, width=narrow) == min(
        miss(dense, target, width=w) for w in range(tensor, 2 * factor * width + 1, tensor)
    )

    block_dense = with_ffn(config, kind="block_dense", blocks=4)
    sizes = variants.sizes_of(Variant("block_dense"), config)
    tried = {rank: miss(block_dense, target, rank=rank) for rank in range(4, width + 1, 4)}
    assert sizes["blocks"] == 4
    if sizes["rank"] % 8:
        assert tried[sizes["rank"]] == min(tried.values())
    else:
        assert tried[sizes["rank"]] <= max(min(tried.values()), 0.01 * target)

    shuffled = with_ffn(config, kind="block_shuffle", rank=None)
    allowed = {
        blocks: miss(shuffled, target, blocks=blocks)
        for blocks in range(1, width + 1)
        if not list(problems(with_ffn(shuffled, blocks=blocks)))
    }
    assert allowed[variants.sizes_of(Variant("block_shuffle"), config)["blocks"]] == min(allowed.values())


def test_own_and_written_sizes_win(path: str) -> None:
    found = made(
        path,
        "low_rank,low_rank:rank=20,block_dense:blocks=2,block_dense:rank=24:blocks=2,"
        "dense_narrow:width=40,dense",
    )
    assert found["low_rank"].sizes == {"rank": 12}
    assert found["low_rank:rank=20"].sizes == {"rank": 20}
    assert found["block_dense:blocks=2"].sizes["blocks"] == 2
    assert found["block_dense:rank=24:blocks=2"].sizes == {"rank": 24, "blocks": 2}
    assert found["dense_narrow:width=40"].sizes == {"width": 40}
    assert found["dense"].sizes == {"width": 192}
    own = made(path, "block_dense", "ffn.kind=block_dense", "ffn.rank=10", "ffn.blocks=2")["block_dense"]
    assert own.sizes == {"rank": 10, "blocks": 2}
    assert made(path, "block_dense", "ffn.blocks=2")["block_dense"].sizes["blocks"] == 2


def test_a_narrow_dense_model_has_as_many_ffn_parameters(path: str) -> None:
    found = made(path, ALL)
    target = ffn_parameters(found["low_rank"].config)
    row = 2 * 48 + 1  # parameters of one more inner feature, in each of 3 layers
    assert abs(ffn_parameters(found["dense_narrow"].config) - target) <= 3 * row / 2
    assert found["dense_narrow"].config.kind_of_layer(2) == "dense"
    assert ffn_parameters(found["dense"].config) > 1.5 * target


# ------------------------------------------------------------------------------------------------------ steps


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["low_rank", "block_dense", "block_shuffle"]),
    rank=st.sampled_from([4, 8, 12, 20]),
    steps=st.integers(200, 5000),
    stochastic=st.booleans(),
    tied=st.booleans(),
)
def test_equal_flops_to_half_a_percent(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rank: int, steps: int, stochastic: bool, tied: bool
) -> None:
    path = tmp_path_factory.mktemp("equal") / "c.json"
    path.write_text(json.dumps(TREE), encoding="utf-8")
    overrides = [f"ffn.kind={kind}", f"ffn.rank={rank}", "ffn.blocks=4", f"train.steps={steps}"]
    overrides += [f"guide.stochastic={json.dumps(stochastic)}", f"model.tie_embeddings={json.dumps(tied)}"]
    found = made(str(path), ALL, *overrides)
    spent = {label: schedule.flops(entry.config) for label, entry in found.items()}
    assert found["dense"].steps == steps
    assert all(abs(flops / spent["dense"] - 1) < 0.005 for flops in spent.values()), spent
    for label, entry in found.items():
        assert (schedule.build_schedule(entry.config).guided_steps > 0) == label.endswith("+guide")
        assert entry.steps == schedule.build_schedule(entry.config).total_steps
        assert entry.config.guide.stochastic == stochastic


def test_equal_steps(path: str) -> None:
    found = made(path, ALL, "guide.fraction=0.3", equal="steps")
    assert {entry.steps for entry in found.values()} == {200}
    assert schedule.build_schedule(found["low_rank+guide"].config).guided_steps == 60
    assert found["low_rank"].flops < found["low_rank+guide"].flops < found["dense"].flops * 1.2


def test_all_are_evaluated_on_as_many_sequences(path: str) -> None:
    """A run of few steps is evaluated on few sequences: then all are."""
    found = made(path, ALL, "train.steps=9", "evaluation.sequences=128")
    assert {entry.config.evaluation_sequences for entry in found.values()} == {72}
    assert len({entry.steps for entry in found.values()}) > 1


def test_a_dense_model_keeps_no_bottleneck(path: str) -> None:
    found = made(path, "dense,dense_narrow,low_rank", "recompute=bottleneck")
    assert [entry.config.recompute for entry in found.values()] == ["none", "none", "bottleneck"]


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("low_rank:rank=49", (), "variant low_rank:rank=49: ffn.rank = 49: must not exceed"),
        (
            "dense,block_dense:rank=10",
            (),
            "variant block_dense:rank=10: ffn.blocks = 4: must divide ffn.rank = 10",
        ),
        (
            "block_dense:blocks=5",
            (),
            "variant block_dense:blocks=5: ffn.blocks = 5: must divide model.width = 48",
        ),
        ("block_dense:blocks=500", (), "blocks = 500: must not exceed 48"),
        (
            "dense_narrow:width=33",
            ("parallel.tensor=2",),
            "ffn.width = 33: must be divisible by parallel.tensor = 2",
        ),
        (
            "dense,low_rank",
            ("ffn.kind=dense",),
            "variant low_rank: ffn.kind = 'dense' has no structured layer",
        ),
        (
            "dense_narrow",
            ("ffn.dense_layers=[0,1,2]",),
            "variant dense_narrow: ffn.kind = 'low_rank' has no structured layer",
        ),
        ("low_rank,low_rank:rank=12", (), "variant low_rank:rank=12: is the same run as variant low_rank"),
        ("low_rank+guide", ("ffn.rank=48",), "variant low_rank+guide: guide.mode"),
        ("low_rank+guide", ("train.steps=1",), "guides no step"),
        ("dense", ("train.seed=3",), "train.seed: a comparison sets it by --seeds"),
        ("dense", ("run.dir=x",), "run.dir: a comparison sets it by --out"),
        ("low_rank", ("guide.mode=window",), "guide.mode: a comparison sets it by +guide and --equal"),
        ("dense", ("train.step=3",), "train.step: unknown key"),
        ("dense", ("model.heads=5",), "model.heads = 5: must divide"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    path: str, text: str, overrides: tuple[str, ...], says: str
) -> None:
    assert says in refused(path, text, *overrides)


def test_problems_of_all_variants_come_together(path: str) -> None:
    said = refused(path, "low_rank:rank=49,dense,block_dense:rank=10")
    assert "variant low_rank:rank=49" in said
    assert "variant block_dense:rank=10" in said


def test_written_sizes_need_no_structured_config(path: str) -> None:
    found = made(
        path, "dense,low_rank:rank=8,block_dense:rank=8:blocks=2,dense_narrow:width=50", "ffn.kind=dense"
    )
    assert [entry.config.ffn.kind for entry in found.values()] == [
        "dense",
        "low_rank",
        "block_dense",
        "dense",
    ]
