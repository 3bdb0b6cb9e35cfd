"""What a step asks of a CUDA device, counted on a fake one (fake_cuda/): kernels, collectives, waits.

The written counts (fake_cuda/expected.json) are those of the small model there; ``fake_cuda/sweep.py
--write`` writes them anew, for a reader to judge.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "fake_cuda"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"fake_cuda_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


device, sweep = _load("device"), _load("sweep")
# of both phases, tensor parallelism always with sequence parallelism: sweep.py counts the rest too
CASES = [case for case in sweep.CASES if case.layout != "tp2"]
# the first test counts for all: two minutes of a free core
pytestmark = [pytest.mark.sweeps, pytest.mark.timeout(1800)]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if device.compiler() is None:
        pytest.skip("needs a C++ compiler for the fake device's guard")
    library = device.compile_guard(tmp_path_factory.mktemp("guard"))
    return sweep.count(CASES, sweep.SMALL, library)


def expected(case: Any) -> dict[str, Any]:
    return dict(json.loads((HERE / "expected.json").read_text())[str(case)])


@by_case
def test_no_micro_step_waits_for_the_device(case: Any, counted: Any) -> None:
    for part in counted[case]["micro"]:
        assert part["synchronize"] == {}


@by_case
def test_collectives_are_the_written_ones(case: Any, counted: Any) -> None:
    written = expected(case)
    assert sweep.written(counted[case])["collectives"] == written["collectives"]


@by_case
def test_no_more_kernels_than_written(case: Any, counted: Any) -> None:
    written = expected(case)["kernels"]
    for part, launched in sweep.written(counted[case])["kernels"].items():
        assert launched <= written[part], part


@by_case
def test_the_host_waits_where_it_is_written(case: Any, counted: Any) -> None:
    """In a whole step, by caller."""
    assert sweep.written(counted[case])["waits"] == expected(case)["waits"]
