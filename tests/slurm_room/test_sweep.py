"""What a sweep file comes to, and what is refused of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.cluster import sweep
from sffn_dist.spec.config import ConfigError


def write(folder: Path, tree: Any) -> Path:
    path = folder / "sweep.json"
    path.write_text(json.dumps(tree) if not isinstance(tree, str) else tree)
    return path


def test_every_combination_but_those_left_out(root: Path, tmp_path: Path) -> None:
    tree = {
        "name": "try",
        "configs": [str(root / "configs/demo.json")],
        "overrides": {"train.steps": 50, "data.source": "stdlib"},
        "grid": {
            "structure": {"dense": {"ffn.kind": "dense"}, "low": {"ffn.kind": "low_rank", "ffn.rank": 64}},
            "train.learning_rate": [1e-3, 2e-3],
            "parallel.tensor": [1, 2],
        },
        "exclude": [{"structure": "dense", "train.learning_rate": [2e-3, 3e-3]}, {"config": "other"}],
    }
    runs = sweep.expand(sweep.read(write(tmp_path, tree)), ["train.seed=7", "train.steps=60"], 2)
    labels = ["dense-learning_rate_0.001", "low-learning_rate_0.001", "low-learning_rate_0.002"]
    assert [run.name for run in runs] == [f"{label}-tensor_{tensor}" for label in labels for tensor in (1, 2)]
    last = runs[-1].config
    assert (last.ffn.kind, last.ffn.rank, last.train.learning_rate, last.parallel.tensor) == (
        "low_rank",
        64,
        2e-3,
        2,
    )
    assert (last.train.steps, last.train.seed) == (60, 7), "the command line wins over the file"
    assert last.run.dir == f"runs/try/{runs[-1].name}"


GOOD = {"name": "x", "configs": ["demo.json"], "grid": {"train.seed": [1, 2]}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        (
            '{"name": "x", "grid": {"train.seed": [1], "train.seed": [2]}}',
            "holds grid.train.seed twice in one object",
        ),
        (
            {"grid": {"train.seed": [1], "s": {"a": {"train.seed": 2}}}},
            "train.seed = 2: was given before, as 1",
        ),
        ({"nmae": "x"}, "nmae: unknown key"),
        ({"name": "a/b"}, 'name = "a/b"'),
        ({"configs": []}, "configs = []"),
        ({"configs": None}, "configs: missing"),
        ({"configs": ["none.json"]}, "no such file"),
        ({"grid": {"train.seed": []}}, "grid.train.seed = []"),
        ({"grid": {"train.sead": [1]}}, "train.sead: unknown key"),
        ({"grid": {"s": {"a b": {}}}}, "label 'a b'"),
        ({"grid": {"s": {"a": 3}}}, "a must be an object"),
        ({"grid": {"train.seed": [1, 1]}}, "two runs would be called"),
        ({"grid": {"train.steps": [10, -1]}}, "train.steps = -1"),
        ({"exclude": [{"train.sed": 1}]}, "train.sed, which is no axis"),
        ({"exclude": [{"config": "demo"}]}, "leaves no run"),
        ({"overrides": {"train.seed": 3}}, "train.seed: is an axis"),
        ({"overrides": {"run.dir": "x"}}, "run.dir: is set for each run"),
        ({"grid": {"s": {"a": {"run.dir": "x"}}}}, "run.dir: is set for each run"),
        (
            {"overrides": {"parallel.tensor": 1}, "grid": {"train.micro_batch_size": [8, 16]}},
            "(run micro_batch_size_16)",
        ),
    ],
)
def test_sweeps_are_refused_whole(root: Path, tmp_path: Path, change: Any, says: str) -> None:
    shutil.copy(root / "configs/demo.json", tmp_path / "demo.json")
    if isinstance(change, dict):
        change = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(ConfigError) as error:
        sweep.expand(sweep.read(write(tmp_path, change)), [], 2)
    assert says in str(error.value)
