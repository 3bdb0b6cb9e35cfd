"""A run that changes its layout on the way, live and by the tool: the same bits, and the losses that
follow.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.run_folder import folder_of
from sffn_dist.checkpoint.weights import approximated
from sffn_dist.conversion.verification import differences

CASES = Path(__file__).with_name("training_cases.py")
FFN: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "rank": 12},
    "block_dense": {"kind": "block_dense", "rank": 16, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 4},
}
SAVED, END = 4, 9


def tree(kind: str, run: Path, *, tensor: int = 1, stage: int = 1, **extra: Any) -> dict[str, Any]:
    """``SAVED`` lies in the guided phase, whose end is at 6."""
    return {
        "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 64, "activation": "swiglu"},
        "ffn": {"width": 64, **FFN[kind]},
        "guide": {"mode": "fixed_step", "fraction": 0.5, "stochastic": True},
        "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        "parallel": {"tensor": tensor},
        "zero": {"stage": stage},
        "checkpoint": {"keep": 9},
        "run": {"dir": str(run)},
        **extra,
    }


@pytest.mark.parametrize("kind", FFN)
def test_there_and_back_again(ranks: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """TP 1 -> 2 -> 4 -> 1 under ZeRO 1 -> 3 -> 1 -> 0, each loading and saving at once: the same bits;
    then five equal losses.
    """

    def train(world: int, config: dict[str, Any], steps: int) -> dict[str, Any]:
        return ranks(world, config["parallel"]["tensor"]).run(CASES, "train", tree=config, steps=steps)[0]

    def saved(run: Path) -> Manifest:
        return Manifest.read(folder_of(run, SAVED))

    train(1, tree(kind, tmp_path / "a"), SAVED)
    first = saved(tmp_path / "a")
    assert first.guide_optimizer_steps == SAVED, "in the guided phase"
    travelled = tmp_path / "b"
    shutil.copytree(tmp_path / "a", travelled)
    for world, layout in ((2, {"tensor": 2, "stage": 3}), (4, {"tensor": 4}), (1, {"tensor": 1, "stage": 0})):
        train(world, tree(kind, travelled, **layout), SAVED)
        assert saved(travelled).tensor_parallel == layout["tensor"]
        assert list(differences(first, saved(travelled))) == [], layout
    # the same by the tool
    made = reshard.reshard(first, tmp_path / "two", tensor=2, data=2)
    made = reshard.reshard(made, tmp_path / "four", tensor=4)
    by_tool = tmp_path / "c"
    reshard.reshard(made, folder_of(by_tool, SAVED), tensor=1)
    assert list(differences(first, saved(by_tool))) == []
    curves = [train(1, tree(kind, run), END)["losses"] for run in (tmp_path / "a", travelled, by_tool)]
    assert len(curves[0]) == END - SAVED
    assert curves[0] == curves[1] == curves[2]
    four = tmp_path / "d"
    shutil.copytree(tmp_path / "four", folder_of(four, SAVED))
    assert np.abs(np.subtract(train(4, tree(kind, four, tensor=4), END)["losses"], curves[0])).max() < 2e-4


def test_an_import_starts_with_its_dense_matrices_as_guides(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """A dense model approximated: training starts at alpha 1, so at the dense model's own loss, on one
    rank and on two.
    """
    dense = {
        **tree("low_rank", tmp_path / "dense"),
        "ffn": {"width": 64, "kind": "dense"},
        "guide": {"mode": "off"},
    }
    losses = ranks(1).run(CASES, "train", tree=dense, steps=END)[0]["losses"]
    source = Reader(Manifest.read(folder_of(tmp_path / "dense", END))).weights()
    made = approximated(source, {"kind": "low_rank", "rank": 2}, guide=True)
    imported = reshard.write_weights(made, tmp_path / "imported")
    assert imported.kinds == ("weight",)
    start = {"init_from": str(imported.folder), "ffn": {"width": 64, "kind": "low_rank", "rank": 2}}
    still = {
        **dense,
        "run": {"dir": str(tmp_path / "on")},
        "init_from": str(folder_of(tmp_path / "dense", END)),
    }
    expected = ranks(1).run(CASES, "train", tree=still, steps=1)[0]["losses"][0]
    assert abs(expected - losses[0]) > 0.1, "it has learned"
    for world, tensor in ((1, 1), (2, 2)):
        here = tree("low_rank", tmp_path / f"here{tensor}", tensor=tensor, **start)
        here["guide"]["stochastic"] = False
        got = ranks(world, tensor).run(CASES, "train", tree=here, steps=1)[0]
        assert got["losses"][0] == pytest.approx(expected, abs=1e-5)
    without = {
        **here,
        "run": {"dir": str(tmp_path / "without")},
        "guide": {"mode": "off"},
        "parallel": {"tensor": 1},
    }
    assert abs(ranks(1).run(CASES, "train", tree=without, steps=1)[0]["losses"][0] - expected) > 1e-3, (
        "rank 2 is not the model"
    )
