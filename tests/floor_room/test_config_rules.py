"""Rules that join several keys of the config, the number of ranks, unused settings, and what makes a run
the same run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.spec.validation import FREE, check_world, identity, unused_settings

SMALL: dict[str, Any] = {
    "model": {"layers": 4, "width": 64, "heads": 8, "kv_heads": 4, "sequence": 32, "vocab": 512},
    "ffn": {"kind": "block_dense", "width": 256, "rank": 32, "blocks": 4},
    "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 4},
}
LOW_RANK = {"ffn.kind": "low_rank", "ffn.blocks": None}
SHUFFLE = {"ffn.kind": "block_shuffle", "ffn.rank": None}


def config(over: dict[str, Any] | None = None) -> Config:
    """SMALL with dotted keys set."""
    tree = json.loads(json.dumps(SMALL))
    for key, value in (over or {}).items():
        section, _, leaf = key.partition(".")
        if leaf:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[section] = value
    return from_tree(tree)


def problems(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


@pytest.mark.parametrize(
    ("over", "key", "rule"),
    [
        ({"model.heads": 12}, "model.heads = 12", "must divide model.width = 64"),
        ({"model.attention_dim": 60}, "model.heads = 8", "must divide model.attention_dim = 60"),
        ({"model.kv_heads": 3}, "model.kv_heads = 3", "must divide model.heads = 8"),
        ({"model.attention_dim": 24}, "model.attention_dim = 24", "must be even"),
        ({"ffn.dense_layers": [0, 4]}, "ffn.dense_layers holds 4", "below model.layers = 4"),
        ({"ffn.rank": None}, "ffn.rank", "missing"),
        ({"ffn.blocks": None}, "ffn.blocks", "missing"),
        ({**LOW_RANK, "ffn.rank": None}, "ffn.rank", '"low_rank" needs it'),
        ({**SHUFFLE, "ffn.blocks": None}, "ffn.blocks", '"block_shuffle" needs it'),
        ({**LOW_RANK, "ffn.rank": 65}, "ffn.rank = 65", "must not exceed min(model.width, ffn.width) = 64"),
        (
            {"ffn.blocks": 3, "ffn.width": 192, "ffn.rank": 33},
            "ffn.blocks = 3",
            "must divide model.width = 64",
        ),
        ({"ffn.width": 254}, "ffn.blocks = 4", "must divide ffn.width = 254"),
        ({"ffn.rank": 30}, "ffn.blocks = 4", "must divide ffn.rank = 30"),
        (
            {"train.micro_batch_size": 5},
            "train.micro_batch_size = 5",
            "must divide train.global_batch_size = 16",
        ),
    ],
)
def test_a_broken_rule_names_key_value_and_rule(over: dict[str, Any], key: str, rule: str) -> None:
    (problem,) = problems(lambda: config(over))
    assert problem.startswith(f"{key}: ")
    assert rule in problem


@pytest.mark.parametrize(
    ("over", "key"),
    [
        (
            {"model.heads": 6, "model.width": 48, "model.kv_heads": 2, "ffn.width": 192},
            ["model.heads = 6"],
        ),
        ({"model.vocab": 510}, ["model.vocab = 510"]),
        ({**LOW_RANK, "ffn.width": 254}, ["ffn.width = 254"]),
        ({"model.sequence": 30, "parallel.sequence": True}, ["model.sequence = 30"]),
    ],
)
def test_sizes_that_four_tensor_parallel_ranks_do_not_divide(over: dict[str, Any], key: list[str]) -> None:
    config({**over, "parallel.tensor": 1})  # with one rank the same sizes are fine
    found = problems(lambda: config({**over, "parallel.tensor": 4}))
    assert found == tuple(f"{name}: must be divisible by parallel.tensor = 4" for name in key)


def test_fewer_key_value_heads_than_ranks_must_divide_them() -> None:
    for kv_heads in (1, 2):
        config({"model.kv_heads": kv_heads, "parallel.tensor": 4})
    sizes = {"model.heads": 12, "model.attention_dim": 96, "parallel.tensor": 4}
    for kv_heads in (3, 6):
        assert problems(lambda: config({**sizes, "model.kv_heads": kv_heads})) == (  # noqa: B023
            f"model.kv_heads = {kv_heads}: must be a multiple or a divisor of parallel.tensor = 4",
        )
    (problem,) = problems(
        lambda: config({"model.kv_heads": 1, "model.attention_dim": 16, "parallel.tensor": 8})
    )
    assert "the keys' and values' rows, 2 x 1 heads of 2, must be divisible by parallel.tensor = 8" in problem


def test_the_rank_is_cut_nowhere() -> None:
    config({**LOW_RANK, "ffn.rank": 30, "parallel.tensor": 4})


def test_a_bottleneck_is_kept_only_where_there_is_one() -> None:
    config({"recompute": "bottleneck"})
    for over in ({"ffn.kind": "dense"}, {"ffn.dense_layers": list(range(config().model.layers))}):
        assert problems(lambda over=over: config({**over, "recompute": "bottleneck"}))[0].startswith(
            "recompute = bottleneck: "
        )


def test_the_sequence_is_split_only_with_sequence_parallelism() -> None:
    config({"model.sequence": 30, "parallel.tensor": 4})


@pytest.mark.parametrize("kind", ["block_shuffle", "block_dense"])
@pytest.mark.parametrize(
    ("blocks", "p", "fits"),
    [(4, 2, True), (4, 4, True), (2, 4, True), (1, 4, True), (6, 4, True), (3, 2, True), (2, 64, False)],
)
def test_ranks_share_blocks_and_what_is_inside_them(kind: str, blocks: int, p: int, fits: bool) -> None:
    # 96 and 288 hold every block count, 288 = 2^5 3^2 also its square
    sizes = {"model.width": 96, "ffn.width": 288, "ffn.rank": 48 if kind == "block_dense" else None}
    over = {**sizes, "ffn.kind": kind, "ffn.blocks": blocks, "parallel.tensor": p}
    if fits:
        config(over)
    else:
        assert any(text.startswith("ffn.width / ffn.blocks") for text in problems(lambda: config(over)))


def test_the_square_of_the_blocks_divides_the_width_for_block_shuffle_under_tensor_parallelism_only() -> None:
    narrow = {"ffn.width": 264}  # divisible by 4 and 8, not by 16
    assert config({**SHUFFLE, **narrow}).ffn.blocks == 4
    assert config({**narrow, "parallel.tensor": 2}).ffn.kind == "block_dense"
    (problem,) = problems(lambda: config({**SHUFFLE, **narrow, "parallel.tensor": 2}))
    assert problem.startswith("ffn.blocks = 4: its square must divide ffn.width = 264")
    assert config({**SHUFFLE, "ffn.width": 272, "parallel.tensor": 2}).parallel.tensor == 2


def test_defaults_are_derived() -> None:
    got = config({"model.kv_heads": None, "ffn.width": None})
    assert (got.kv_heads, got.attention_dim, got.head_dim, got.ffn_width) == (8, 64, 8, 256)
    assert [got.kind_of_layer(i) for i in range(4)] == ["dense", "block_dense", "block_dense", "block_dense"]


@pytest.mark.parametrize(
    ("tensor", "world", "fits"),
    [(1, 1, True), (1, 4, True), (2, 8, True), (2, 1, False), (2, 3, False), (1, 3, False), (1, 8, False)],
)
def test_the_number_of_ranks(tensor: int, world: int, fits: bool) -> None:
    got = config({"parallel.tensor": tensor})
    if fits:
        check_world(got, world)
        return
    (problem,) = problems(lambda: check_world(got, world))
    key = f"parallel.tensor = {tensor}" if world % tensor else "train.global_batch_size = 16"
    assert problem.startswith(f"{key}: must ")
    assert str(world) in problem


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        (
            {"guide.mode": "window", "guide.begin": 5, "guide.end": 5},
            "guide.begin = 5: must be below guide.end = 5",
        ),
        ({"guide.mode": "window", "guide.begin": 10}, "guide.begin = 10: must be below train.steps = 10"),
        ({"guide.mode": "window", "guide.end": 11}, "guide.end = 11: must not exceed train.steps = 10"),
        (
            {"guide.mode": "fixed_flop", "ffn.kind": "low_rank", "ffn.rank": 64},
            'guide.mode = "fixed_flop": the structured model costs',
        ),
        (
            {
                "guide.mode": "fixed_flop",
                "guide.stochastic": True,
                "ffn.width": 8192,
                "ffn.rank": 4,
                "ffn.dense_layers": [],
            },
            'guide.mode = "fixed_flop": what the structured model saves guides 1.',
        ),
    ],
)
def test_the_guides_steps_fit_the_run(over: dict[str, Any], problem: str) -> None:
    (found,) = problems(lambda: config(over))
    assert found.startswith(problem)
    assert config({**over, "guide.mode": "off"}).guide.mode == "off", "an unused setting is no error"


def test_unused_settings_are_told_and_are_no_errors() -> None:
    def keys(over: dict[str, Any]) -> set[str]:
        return set(unused_settings(config(over)))

    assert keys({}) == set()
    assert keys({"ffn.kind": "dense", "guide.mode": "fixed_step", "guide.stochastic": True}) == {
        *("ffn.rank", "ffn.blocks", "guide.mode", "guide.stochastic")
    }
    assert keys({"ffn.kind": "low_rank"}) == {"ffn.blocks"}
    assert keys({"ffn.kind": "block_shuffle"}) == {"ffn.rank"}
    assert keys({"guide.stochastic": True}) == {"guide.stochastic"}
    assert keys({"guide.mode": "fixed_step", "guide.fraction": 0.01}) == {"guide.mode", "guide.fraction"}
    assert keys({"guide.mode": "window", "guide.fraction": 0.2, "guide.begin": 1}) == {"guide.fraction"}
    assert keys({"guide.mode": "fixed_flop", "guide.begin": 1, "guide.end": 4}) == {
        "guide.begin",
        "guide.end",
    }
    assert keys({"guide.stochastic": True, "guide.mode": "fixed_step"}) == set()
    assert keys({"parallel.sequence": True}) == {"parallel.sequence"}
    # values that would be refused were they used
    assert keys({"ffn.kind": "dense", "ffn.rank": 9999, "ffn.blocks": 7}) == {"ffn.rank", "ffn.blocks"}
    assert keys({"ffn.kind": "low_rank", "ffn.blocks": 7, "parallel.tensor": 4}) == {"ffn.blocks"}


@pytest.mark.parametrize(
    "over",
    [
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"zero.stage": 3},
        {"precision": "fp32"},
        {"recompute": "full"},
        {"recompute": "bottleneck"},
        {"train.micro_batch_size": 2},
        {"run.dir": "elsewhere"},
        {"data.dir": "elsewhere"},
        {"checkpoint.interval": 3, "checkpoint.keep": 9},
        {"evaluation.interval": 1, "sample.tokens": 3, "logging.wandb": True},
    ],
)
def test_identity_leaves_out_layout(over: dict[str, Any]) -> None:
    assert identity(config(over)) == identity(config())


@pytest.mark.parametrize(
    ("over", "unlooked_at"),
    [
        ({"ffn.kind": "low_rank", "ffn.blocks": None}, {"ffn.blocks": 4}),
        ({"ffn.kind": "dense", "ffn.rank": None}, {"ffn.rank": 4}),
        ({"ffn.kind": "dense"}, {"guide.mode": "fixed_step"}),
        ({}, {"guide.stochastic": True, "guide.schedule": "linear"}),
        ({"guide.mode": "fixed_step"}, {"guide.begin": 3, "guide.end": 5}),
        ({"guide.mode": "fixed_flop"}, {"guide.fraction": 0.3, "guide.begin": 3}),
        ({"guide.mode": "window"}, {"guide.fraction": 0.3, "guide.end": 10}),
        ({}, {"guide.mode": "fixed_step", "guide.fraction": 0.0}),
    ],
)
def test_identity_leaves_out_what_is_unused(over: dict[str, Any], unlooked_at: dict[str, Any]) -> None:
    """A key that is not in it and a key that is None say the same (launch/run_identity.py compares so)."""
    before, after = identity(config(over)), identity(config({**over, **unlooked_at}))
    assert {key for key in before | after if before.get(key) != after.get(key)} == set()


@pytest.mark.parametrize(
    "over",
    [
        {"model.layers": 3},
        {"model.norm": "rmsnorm"},
        {"ffn.rank": 16},
        {"ffn.dense_layers": []},
        {"guide.mode": "fixed_step"},
        {"guide.mode": "fixed_flop", "guide.schedule": "linear", "guide.stochastic": True},
        {"guide.mode": "window", "guide.begin": 2, "guide.end": 5},
        {"data.source": "other.txt"},
        {"data.heldout_share": 0.5},
        {"train.seed": 1},
        {"train.steps": 11},
        {"train.global_batch_size": 32},
        {"train.learning_rate": 1e-3},
        {"init_from.path": "runs/other"},
    ],
)
def test_identity_changes_with_what_makes_the_run(over: dict[str, Any]) -> None:
    before, after = identity(config()), identity(config(over))
    assert {key for key in before | after if before.get(key) != after.get(key)} == set(over)
    assert json.loads(json.dumps(after)) == after, "it is kept as JSON"


def test_identity_covers_the_sections_that_matter() -> None:
    held, flat = identity(config()), flatten(config())
    missing = {key for key in flat if key.split(".")[0] in {"model", "ffn", "train", "data"}} - held.keys()
    assert missing == {key for key in FREE if not key.startswith("init_from.")}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_the_rules_accept_the_split_table_can_cut(data: st.DataObject) -> None:
    def one_of(*values: object) -> Any:
        return data.draw(st.sampled_from(values))

    over = {
        "model.width": one_of(48, 96),
        "model.heads": 24,
        "model.kv_heads": None,
        "model.vocab": 768,
        "model.activation": one_of("gelu", "swiglu"),
        "guide.mode": "fixed_step",
        "parallel.tensor": one_of(2, 3, 4, 6, 8, 12),
        "ffn.kind": one_of("dense", "low_rank", "block_shuffle", "block_dense"),
        "ffn.width": one_of(36, 48, 60, 72, 100, 144, 160),
        "ffn.rank": one_of(8, 12, 24),
        "ffn.blocks": one_of(1, 2, 3, 4, 6),
    }
    try:
        accepted = config(over)
    except ConfigError:
        return
    tensor = accepted.parallel.tensor
    for name, spec in model_tensors(accepted, guide=True).items():
        whole = tensor if spec.cut else 1
        assert math.prod(spec.local_shape(tensor)) * whole == spec.numel, name
