"""What is made of the records of a comparison's runs: table, rows, curves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from sffn_dist.comparison import curves, summary, variants
from sffn_dist.comparison.variants import PlannedVariant

TREE = {
    "model": {"layers": 3, "width": 48, "heads": 4, "sequence": 32, "vocab": 512},
    "ffn": {"kind": "low_rank", "width": 192, "rank": 12},
    "train": {"steps": 200, "global_batch_size": 8, "micro_batch_size": 8},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(TREE), encoding="utf-8")
    return str(file)


def made(path: str, text: str, *overrides: str) -> dict[str, PlannedVariant]:
    return {
        entry.label: entry
        for entry in variants.planned_variants(path, overrides, variants.parse(text), "flops")
    }


def write_run(folder: Path, entry: PlannedVariant, losses: list[float], steps: int = 4) -> None:
    """The files of a run: ``losses`` at its evaluations, the last one at its end."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "flops": 10.0}) + "\n" for i in range(steps))
    )
    at = [steps * (i + 1) // len(losses) for i in range(len(losses))]
    rows = [
        json.dumps({"step": step, "heldout_loss": loss}) + "\n" for step, loss in zip(at, losses, strict=True)
    ]
    (folder / "evaluations.jsonl").write_text("".join(rows))
    summary = {
        "heldout_loss": losses[-1],
        "perplexity": 1.0,
        "bits_per_byte": 2.0,
        "unigram_entropy": 3.0,
        "steps": steps,
    }
    summary |= {
        "tokens": 1000,
        "tokens_per_s": 50.0,
        "seconds": 20.0,
        "precision": "fp32",
        "ranks": {"world": 1},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"config": entry.config.model_dump(mode="json")}))


def test_a_row_says_whether_bits_per_byte_are_an_estimate(path: str, tmp_path: Path) -> None:
    """Of a run by an earlier version that is unknown."""
    entry = made(path, "dense")["dense"]
    write_run(tmp_path / "run", entry, [5.0])
    assert summary.run_row(summary.read(entry, 0, tmp_path / "run"))["bits_per_byte_estimated"] == "unknown"
    tree = json.loads((tmp_path / "run/summary.json").read_text())
    (tmp_path / "run/summary.json").write_text(json.dumps({**tree, "bits_per_byte_estimated": True}))
    assert summary.run_row(summary.read(entry, 0, tmp_path / "run"))["bits_per_byte_estimated"] is True


@pytest.fixture
def results(path: str, tmp_path: Path) -> list[summary.Result]:
    found = made(path, "dense,low_rank+guide")
    losses = {"dense": [[5.0, 4.0], [5.2, 4.1]], "low_rank+guide": [[6.0, 4.1], [5.8, 4.4]]}
    read = []
    for label, entry in found.items():
        for seed in (0, 1):
            folder = tmp_path / entry.variant.folder / str(seed)
            write_run(folder, entry, losses[label][seed])
            read.append(summary.read(entry, seed, folder))
    return read


def test_table_has_mean_spread_and_paired_difference(results: list[summary.Result]) -> None:
    dense, guided = summary.table_rows(results)
    assert dense["held-out loss"] == f"4.0500 ± {0.1 / math.sqrt(2):.4f}"
    assert dense["minus dense"] == "-"
    assert guided["minus dense"] == f"+0.2000 ± {0.2 / math.sqrt(2):.4f}"
    assert guided["by seed"] == "4.1000, 4.4000"
    assert dense["perplexity"] == f"{math.exp(4.05):.2f}"
    assert dense["FLOPs"] == "40"
    text = summary.markdown([dense, guided])
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "minus dense" not in summary.table_rows(results[2:])[0]
    assert summary.with_spread([4.0]) == "4.0000"
    assert summary.with_spread([math.nan, 4.0]) == "nan"


def test_rows_say_what_was_run_and_measured(results: list[summary.Result]) -> None:
    rows = list(
        csv.DictReader(summary.csv_text([summary.run_row(result) for result in results]).splitlines())
    )
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("dense", "0"),
        ("dense", "1"),
        ("low_rank+guide", "0"),
        ("low_rank+guide", "1"),
    ]
    assert (rows[0]["width"], rows[0]["rank"], rows[2]["rank"], rows[2]["guide"]) == (
        "192",
        "",
        "12",
        "fixed_flop",
    )
    assert (rows[3]["heldout_loss"], rows[3]["flops"]) == ("4.4", "40")


def test_curves_average_over_seeds_by_flops_spent(results: list[summary.Result]) -> None:
    found = summary.curves(results)
    assert found["dense"] == [summary.Point(20.0, 5.1, 5.0, 5.2), summary.Point(40.0, 4.05, 4.0, 4.1)]
    assert [point.flops for point in found["low_rank+guide"]] == [20.0, 40.0]
    low, high = curves.loss_limits(found.values()) or (0, 0)
    assert low < 4.0 < 6.0 < high
    assert curves.loss_limits([]) is None
    assert len(summary.curve_rows(results)) == 8


def test_a_run_is_finished_once_it_has_all_its_steps_and_the_evaluation_asked_for(
    path: str, tmp_path: Path
) -> None:
    config = made(path, "dense")["dense"].config
    entry = made(path, "dense")["dense"]
    write_run(tmp_path / "whole", entry, [4.0], steps=200)
    write_run(tmp_path / "part", entry, [4.0], steps=150)
    assert summary.finished(tmp_path / "whole", config)
    assert not summary.finished(tmp_path / "part", config)
    assert not summary.finished(tmp_path / "nowhere", config)
    other = made(path, "dense", "evaluation.sequences=64")["dense"].config
    assert not summary.finished(tmp_path / "whole", other)
    (tmp_path / "whole" / "summary.json").write_text("[]")
    assert not summary.finished(tmp_path / "whole", config)


def test_time_left() -> None:
    assert summary.seconds_left([(100, 10.0)], [100, 200], [(100, 4.0)], jobs=2) == pytest.approx(20.0)
    assert summary.seconds_left([(100, 10.0)], [200], [], jobs=1) == 20.0
    assert summary.seconds_left([(100, 10.0)], [], [(100, 30.0)], jobs=2) == 0.0
    assert math.isinf(summary.seconds_left([], [1], [], jobs=1))
