"""Config files, their bases, overrides; and whatever is in them, nothing but ConfigError comes out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import defaults, flatten, key_fields
from sffn_dist.spec.loading import from_tree, load, merge_overrides
from sffn_dist.spec.renamed_keys import RENAMED, translate, translate_flat

SMALL: dict[str, Any] = {
    "model": {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512},
    "ffn": {"kind": "block_dense", "width": 256, "rank": 32, "blocks": 4},
    "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 4},
}
Write = Callable[..., Path]


def problems(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_base_is_relative_to_the_file_and_says_only_what_differs(write: Write, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(SMALL, "base.json")
    write({"base": "../base.json", "ffn": {"rank": 16}, "train": {"seed": 3}}, "deep/middle.json")
    got = load(write({"base": "deep/middle.json", "ffn": {"rank": 8}}, "top.json"))
    assert (got.ffn.rank, got.ffn.blocks, got.train.seed, got.train.steps) == (8, 4, 3, 10)
    assert got.run.dir == "runs/top", "named after the file that was asked for, not after a base"


@pytest.mark.parametrize("chain", [["a.json"], ["b.json", "a.json"], ["b.json", "c.json", "b.json"]])
def test_a_circle_of_bases_is_refused(chain: list[str], write: Write) -> None:
    for name, base in zip(["a.json", "b.json", "c.json"], chain, strict=False):
        write({"base": base}, name)
    (problem,) = problems(lambda: load(write({"base": chain[0]}, "a.json")))
    assert "circle" in problem


def test_the_same_base_twice_is_no_circle(write: Write) -> None:
    write(SMALL, "root.json")
    write({"base": "root.json"}, "left.json")
    assert load(write({"base": "left.json"}, "top.json")).train.steps == 10


def test_a_missing_base_names_itself_and_who_named_it(write: Write) -> None:
    (problem,) = problems(lambda: load(write({"base": "gone.json"})))
    assert "gone.json" in problem
    assert "a.json" in problem
    assert "no such file" in problem


@pytest.mark.parametrize("base", [3, ["x"], {"x": 1}, True, "a\0b", "\ud800", "x" * 5000, ".", ""])
def test_a_base_that_is_no_file_is_refused(base: object, write: Write) -> None:
    problems(lambda: load(write({**SMALL, "base": base})))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", "null", "\ufeff{}", '{"a":' * 9999, '{"a": 1', "\x00", '{"a": ' + "9" * 5000 + "}"],
)
def test_a_file_that_is_no_object_is_refused(text: str, write: Write) -> None:
    assert "a.json" in problems(lambda: load(write(text)))[0]


def test_files_that_cannot_be_read_are_refused(write: Write, tmp_path: Path) -> None:
    assert "no such file" in problems(lambda: load(tmp_path / "none.json"))[0]
    assert "cannot be read" in problems(lambda: load(tmp_path))[0]
    (tmp_path / "latin.json").write_bytes(b'{"run": {"dir": "\xe9"}}')
    assert "latin.json" in problems(lambda: load(tmp_path / "latin.json"))[0]


def test_a_symbolic_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert "loop.json" in problems(lambda: load(tmp_path / "loop.json"))[0]


# ----------------------------------------------------------------------------------------- overrides and fuzz


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.dir=2024", "2024"),
        ("run.dir=1e3", "1e3"),
        ("run.dir=true", "true"),
        ("run.dir=null", "null"),
        ("run.dir=[1]", "[1]"),
        ('run.dir="quoted"', "quoted"),
        ("sample.prompt=a=b c", "a=b c"),
        ("sample.prompt=", ""),
        ("data.tokenizer=null", None),
        ("data.tokenizer=7", "7"),
        ("init_from.path=12", "12"),
        ("train.steps=20", 20),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.clip=1", 1.0),
        ("ffn.dense_layers=[0,1]", (0, 1)),
        ("ffn.dense_layers=[]", ()),
        ("model.bias=false", False),
        ("ffn.kind=low_rank", "low_rank"),
        ("ffn.rank=null", None),
        ("precision=fp32", "fp32"),
    ],
)
def test_overrides_read_json_or_text(override: str, value: object, write: Write) -> None:
    also = ["ffn.kind=dense"] if override == "ffn.rank=null" else []
    node: Any = load(write(SMALL), [override, *also])
    for part in override.partition("=")[0].split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_an_override_makes_absent_sections(write: Write) -> None:
    assert load(write(SMALL), ["zero.stage=2"]).zero.stage == 2


def test_a_key_given_twice_is_refused(write: Write) -> None:
    """In the overrides, and in one object of a file; the first value is not dropped in silence."""
    found = problems(lambda: load(write(SMALL), ["zero.stage=2", "train.seed=1", "zero.stage=3"]))
    assert found == ("zero.stage = 3: was given before, as 2; give it once",)
    path = write(SMALL)
    path.write_text('{"train": {"steps": 1, "seed": 1, "steps": 2}, "zero": {"stage": 1}, "zero": {}}')
    (problem,) = problems(lambda: load(path))
    assert problem == f"config file {str(path)!r}: holds zero, train.steps twice in one object; leave one out"
    over = path.with_name("over.json")
    over.write_text(json.dumps({"base": path.name}))
    assert str(path) in problems(lambda: load(over))[0]


def test_merged_overrides_hold_a_key_once() -> None:
    """The later hand wins; what one hand gives twice stays, and is refused."""
    merged = merge_overrides(["a=1", "b=2"], ["b=3", "c=4"], ["a=5"])
    assert merged == ("b=3", "c=4", "a=5")
    assert merge_overrides(["a=1"], ["b=1", "b=2"]) == ("a=1", "b=1", "b=2")


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "=3",
        "train.steps",
        "train=3",
        "train.steps.x=3",
        ".=1",
        "train.=1",
        "train.steps=x",
        "train.steps=" + "9" * 5000,
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(override: str, write: Write) -> None:
    problems(lambda: load(write(SMALL), [override]))


def test_an_override_below_a_section_that_is_no_object_is_refused(write: Write) -> None:
    assert problems(lambda: load(write({**SMALL, "ffn": 3}), ["ffn.rank=4"])) == (
        "ffn = 3: must be an object of settings",
    )


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["dense", "low_rank", "swiglu"])
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*key_fields(), *Config.model_fields, "base"])


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(KEYS, TREES), max_size=5), st.dictionaries(st.text(max_size=6), TREES, max_size=2))
def test_a_random_tree_gives_a_config_or_a_config_error(
    changes: list[tuple[str, Any]], more: dict[str, Any]
) -> None:
    tree = {**json.loads(json.dumps(SMALL)), **more}
    for key, value in changes:
        section, _, leaf = key.partition(".")
        if leaf and isinstance(tree.setdefault(section, {}), dict):
            tree[section][leaf] = value
        else:
            tree[section] = value
    with contextlib.suppress(ConfigError):
        from_tree(tree)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.text(max_size=12)
        | st.builds("{}={}".format, KEYS | st.text(max_size=8), TREES.map(json.dumps) | st.text(max_size=9)),
        max_size=4,
    )
)
def test_random_overrides_give_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    if not path.exists():
        path.write_text(json.dumps(SMALL), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load(path, overrides)


def test_all_problems_are_named_at_once(write: Write) -> None:
    """Unknown keys, refused values, and rules between keys that have nothing to do with these."""
    path = write({**SMALL, "parallel": {"tensor": 3}})
    got = problems(lambda: load(path, ["ffn.knid=3", "train.steps=-2", "train.seed=-1", "model.heads=5"]))
    text = "\n".join(got)
    for part in ("ffn.knid: unknown key", "train.seed = -1", "train.steps = -2"):
        assert text.count(part) == 1, text
    got = problems(lambda: load(path, ["train.seed=-1", "model.heads=5"]))
    assert [problem.split(" ")[0] for problem in got][:2] == ["train.seed", "model.heads"]
    assert sum("parallel.tensor = 3" in problem for problem in got) > 1
    got = problems(lambda: load(path, ["parallel.tensor=0"]))
    assert len(got) == 1, "a rule that reads a refused key is left for the next try"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_in_files_and_overrides(old: str, new: str, write: Write) -> None:
    """The message names the key to use; a start.json, which earlier versions wrote, is translated."""
    section, leaf = old.split(".")
    value = defaults()[new]
    for call in (
        lambda: load(write(SMALL), [f"{old}={value}"]),
        lambda: load(write({**SMALL, section: {leaf: value}})),
    ):
        assert problems(call) == (f"{old}: was renamed to {new}; use that name",)
    other = {"cosine": "linear"}.get(value, 1)
    tree = {**SMALL, section: {leaf: other}}
    config = load(write({"base": write(tree, "start.json").name, "train": {"seed": 7}}, "mine.json"))
    assert flatten(config)[new] == other
    assert translate({section: {leaf: other, "kept": 1}, "precision": "fp32"}) == {
        section: {new.split(".")[1]: other, "kept": 1},
        "precision": "fp32",
    }
    assert translate_flat({old: 1, "train.seed": 2}) == {new: 1, "train.seed": 2}
    assert new in key_fields()
    assert old not in key_fields()
