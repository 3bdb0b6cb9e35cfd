"""The config tree: every refusal says key, value and rule; whatever the input, nothing but ConfigError
comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten, key_fields
from sffn_dist.spec.loading import from_tree, load

SMALL: dict[str, Any] = {
    "model": {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512},
    "ffn": {"kind": "block_dense", "width": 256, "rank": 32, "blocks": 4},
    "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 4},
}
Write = Callable[..., Path]


def changed(**over: Any) -> dict[str, Any]:
    """SMALL with ``section__key=value`` set; None takes the key away."""
    tree = json.loads(json.dumps(SMALL))
    for dotted, value in over.items():
        section, _, leaf = dotted.partition("__")
        node = tree.setdefault(section, {}) if leaf else tree
        node[leaf or section] = value
    return {
        name: {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
        for name, part in tree.items()
    }


def problems(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def config(**over: Any) -> Config:
    return from_tree(changed(**over))


# ---------------------------------------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.steps", "10", "must be a"),
        ("train.steps", 0, "greater than 0"),
        ("train.steps", 2.5, "must be a"),
        ("train.steps", True, "must be a"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("train.warmup_share", 1.5, "less than or equal to 1"),
        ("train.beta2", 1.0, "less than 1"),
        ("train.learning_rate", "NaN", "must be a number"),
        ("model.bias", 1, "must be a boolean"),
        ("ffn.kind", "lowrank", "'low_rank'"),
        ("zero.stage", 4, "0, 1, 2 or 3"),
        ("precision", "fp16", "'bf16' or 'fp32'"),
        ("run.dir", [1], "must be a string"),
        ("ffn.dense_layers", 0, "must be"),
        ("model", 3, "must be an object"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_rule(key: str, value: object, rule: str) -> None:
    (problem,) = problems(lambda: config(**{key.replace(".", "__"): value}))
    assert problem.startswith(f"{key} = {json.dumps(value)}: ")
    assert rule in problem


@pytest.mark.parametrize("key", [key for key, kind in key_fields().items() if "float" in str(kind)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_nan_or_infinite(key: str, value: float) -> None:
    (problem,) = problems(lambda: config(**{key.replace(".", "__"): value}))
    assert problem.startswith(f"{key} = {json.dumps(value)}: must be ")


def test_an_element_of_a_list_is_named() -> None:
    (problem,) = problems(lambda: config(ffn__dense_layers=[0, "b"]))
    assert problem.startswith('ffn.dense_layers.1 = "b": ')


def test_an_int_stands_for_a_float_and_nothing_else_is_converted() -> None:
    assert config(train__clip=2).train.clip == 2.0


def test_all_problems_come_at_once(write: Write) -> None:
    found = problems(
        lambda: config(train__steps=-1, ffn__kind="x", zero__stage=9, model__heads=None, data__text_feild="t")
    )
    assert sorted(text.split(" ")[0].rstrip(":") for text in found) == sorted(
        ["train.steps", "ffn.kind", "zero.stage", "model.heads", "data.text_feild"]
    )
    rules = problems(
        lambda: config(model__heads=5, ffn__rank=30, ffn__dense_layers=[7], train__micro_batch_size=3)
    )
    assert {text.split(" ")[0] for text in rules} >= {
        "model.heads",
        "ffn.blocks",
        "ffn.dense_layers",
        "train.micro_batch_size",
    }
    overrides = problems(lambda: load(write(SMALL), ["train.step=1", "steps", "ffn.rank=4", "model.withd=3"]))
    assert len(overrides) == 3


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("train", "step", "train.steps"),
        ("ffn", "rnak", "ffn.rank"),
        ("model", "kv_head", "model.kv_heads"),
        ("zero", "stag", "zero.stage"),
    ],
)
def test_an_unknown_key_names_the_nearest(section: str, key: str, nearest: str, write: Write) -> None:
    expected = f"{section}.{key}: unknown key; the nearest known one is {nearest}"
    assert problems(lambda: config(**{f"{section}__{key}": 1})) == (expected,)
    assert problems(lambda: load(write(SMALL), [f"{section}.{key}=1"])) == (expected,)


def test_a_key_near_to_nothing_names_nothing(write: Write) -> None:
    assert problems(lambda: load(write(SMALL), ["qqqq.zzzz=1"])) == ("qqqq.zzzz: unknown key",)


def test_a_misplaced_key_is_shown_its_place(write: Write) -> None:
    assert problems(lambda: load(write(SMALL), ["rank=4"])) == (
        "rank: unknown key; the nearest known one is ffn.rank",
    )


def test_missing_sections_are_named() -> None:
    assert {text.split(":")[0] for text in problems(lambda: from_tree({}))} == {"model", "train"}


def test_a_config_is_frozen() -> None:
    got = config()
    with pytest.raises(ValidationError):
        got.precision = "fp32"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        got.train.steps = 3  # type: ignore[misc]
    assert isinstance(got.ffn.dense_layers, tuple)


def test_flatten_names_every_key() -> None:
    assert flatten(config()).keys() == key_fields().keys()
