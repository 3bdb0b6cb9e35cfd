"""benchmarks/sffn_bench/plots.py as a user starts it."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def plots(root: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "sffn_bench" / "plots.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def measured(op: str, mode: str, width: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of a made-up benchmark."""
    for provider, kind, share in (
        ("dense", "dense", 1.0),
        ("ours", "low_rank", 0.3125),
        ("bmm", "block_dense", 0.293),
    ):
        median = share * width * tokens / 1e4
        times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.2 * median}
        shape = {"kind": kind, "share": share, "tokens": tokens, "width": width, "dtype": "float32"}
        yield {"op": op, "provider": provider, "mode": mode, **shape, **times, "device": "none"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_axis_that_was_measured_is_drawn(root: Path, tmp_path: Path) -> None:
    """Training against width, also where there is one alone; generation against tokens, and against width
    where there are several.
    """
    rows = [
        row
        for mode in ("forward", "forward_backward")
        for h in (64, 128)
        for row in measured("ffn", mode, h, 32)
    ]
    rows += measured("step", "training", 64, 32)
    rows += [
        row
        for width in (64, 128)
        for tokens in (1, 8)
        for row in measured("decode", "forward", width, tokens)
    ]
    done = plots(root, write(tmp_path / "rows.csv", rows), "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    drawn = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert drawn == sorted(
        [
            "ffn_forward_by_width_tokens_32.png",
            "ffn_forward_backward_by_width_tokens_32.png",
            "step_training_by_width_tokens_32.png",
            *[f"decode_forward_by_width_tokens_{tokens}.png" for tokens in (1, 8)],
            *[f"decode_forward_by_tokens_width_{width}.png" for width in (64, 128)],
        ]
    )
    assert sorted(Path(line).name for line in done.stdout.splitlines()) == drawn
    for path in (tmp_path / "new" / "folder").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_a_figure_holds_what_its_title_says(root: Path) -> None:
    """Of one op and mode, the other size fixed; its lines in the order of the axis."""
    here = runpy.run_path(str(root / "benchmarks" / "sffn_bench" / "plots.py"))
    rows = [
        row
        for width in (128, 64)
        for tokens in (8, 1)
        for row in measured("decode", "forward", width, tokens)
    ]
    rows += [row for mode in ("forward", "forward_backward") for row in measured("ffn", mode, 64, 8)]
    found = here["figures"](rows)
    assert len(found) == 2 + 2 + 2
    for figure in found:
        fixed = {"width": "tokens", "tokens": "width"}[figure.axis]
        assert {(row["op"], row["mode"], row[fixed]) for row in figure.rows} == {
            (figure.op, figure.mode, figure.fixed)
        }
        assert len(figure.rows) == (6 if figure.op == "decode" else 3)
        for line in here["lines"](figure.rows, figure.axis).values():
            sizes = [row[figure.axis] for row in line]
            assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": "wide"}, "line 2, column width: 'wide' is no number above 0"),
        ({"median_ms": ""}, "line 2, column median_ms: '' is no number above 0"),
        ({"p80_ms": "nan"}, "line 2, column p80_ms: 'nan' is no number above 0"),
        ({"mode": "backward"}, "line 2, column mode: 'backward' is none of ffn's"),
        ({"op": "checkpoint"}, "has no row whose op is ffn, step, decode"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_row_is_named(root: Path, tmp_path: Path, change: dict[str, str], says: str) -> None:
    rows = [next(measured("ffn", "forward", 64, 32)) | change]
    done = plots(root, write(tmp_path / "rows.csv", rows), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"{tmp_path / 'rows.csv'}" in done.stderr
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    """Columns of another benchmark, an empty file, none at all, and one that is no text."""
    path = tmp_path / "rows.csv"
    for content, says in (
        (
            b"op,provider,mode,kind,device,dtype\nffn_guided,ours,x,x,x,x\n",
            "has no column share, tokens, width",
        ),
        (b"", "has no column op, provider"),
        (b"\xff\xfe\x00", "is no text"),
    ):
        path.write_bytes(content)
        done = plots(root, path, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert f"{path}: {says}" in done.stderr
        assert "Traceback" not in done.stderr
    done = plots(root, tmp_path / "missing.csv", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "missing.csv" in done.stderr
