"""Every record is strict JSON; what earlier versions wrote is read."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from sffn_dist import strict_json
from sffn_dist.comparison import summary
from sffn_dist.launch import run_identity
from sffn_dist.spec.loading import from_tree


def _refuse(word: str) -> NoReturn:
    raise AssertionError(f"{word} is no JSON")


def test_what_is_not_finite_is_a_string_and_comes_back() -> None:
    rows = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": np.float32("nan"), "d": "text", "e": None}
    text = strict_json.dumps(rows)
    tree = json.loads(text, parse_constant=_refuse)
    assert tree == {"a": "nan", "b": ["inf", ["-inf", 1.5]], "c": "nan", "d": "text", "e": None}
    back = strict_json.floats(tree)
    assert math.isnan(back["a"])
    assert back["b"] == [math.inf, [-math.inf, 1.5]]
    assert json.loads(strict_json.dumps({"path": Path("x")}, default=lambda _: math.nan)) == {"path": "nan"}


@pytest.mark.parametrize("number", ["NaN", '"nan"'], ids=["older", "strict"])
def test_a_summary_of_either_kind_is_read(tmp_path: Path, number: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(f'{{"tokens_per_s": {number}}}')
    assert math.isnan(summary.read_object(path)["tokens_per_s"])


def test_no_record_is_written_but_through_the_helper(root: Path) -> None:
    """``json.dumps`` is for keys and messages: what ends a line or is indented is a record."""
    record = re.compile(r'(?<!strict_)json\.dumps?\((?=[^\n]*(\+ "\\n"|indent=))')
    files = [path for top in ("sffn_dist", "tools", "benchmarks") for path in (root / top).rglob("*.py")]
    found = {path.relative_to(root).as_posix() for path in files if record.search(path.read_text())}
    # the helper; a meta.json is checked to hold finite numbers alone; two of strings and whole numbers
    allowed = {"strict_json.py", "data/meta_file.py", "launch/claim.py", "launch/run_lock.py"}
    assert found <= {f"sffn_dist/{name}" for name in allowed}


def test_a_removed_run_dir_is_made_anew_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {"layers": 1, "width": 8, "heads": 2, "vocab": 300, "sequence": 16}
    config = from_tree({"model": model, "run": {"dir": str(tmp_path / "run")}, "train": {"steps": 1}})
    (tmp_path / "run").mkdir()
    run_identity.write_record(config, "f" * 64)
    before = (tmp_path / "run" / "run.json").read_text()
    shutil.rmtree(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run_identity.restore_record(config, "f" * 64)
    assert (tmp_path / "run" / "run.json").read_text() == before
    assert caplog.text.count("was removed while the run goes on") == 1
    run_identity.check_identity(config, "f" * 64)
