"""Draws what tools/bench.py ffn, step and decode wrote: ``python benchmarks/sffn_bench/plots.py FILE.csv
--out FOLDER``.

A PNG for each op, mode and fixed size: time against width at a number of tokens (ffn, step, decode), and time
against tokens at a width (decode); a panel for each structure, a line for each provider and share, the 20th
to 80th percentile as a band. A size that has but one value is no axis: where nothing would be drawn against
it, there is no such PNG.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist.structured.registry import DENSE

TEXT = ("op", "provider", "mode", "kind", "device", "dtype")
NUMBERS = ("share", "tokens", "width", "median_ms", "p20_ms", "p80_ms")
AXES = {"ffn": ("width",), "step": ("width",), "decode": ("width", "tokens")}
FIXED = {"width": "tokens", "tokens": "width"}
NAMES = {"width": "width h", "tokens": "tokens"}
TITLES = {
    ("ffn", "forward"): "One feed-forward layer, forward",
    ("ffn", "forward_backward"): "One feed-forward layer, forward + backward",
    ("step", "training"): "One feed-forward layer, forward + backward + AdamW",
    ("decode", "forward"): "One feed-forward layer in generation, forward",
}
COLOURS = {"dense": "black", "bmm": "C1", "torch": "C2", "ours": "C0", "ours_bottleneck": "C3"}
STYLES = ("-", "--", ":", "-.")

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What one PNG shows: ``rows`` of one op and mode with the other size fixed, against ``axis``."""

    op: str
    mode: str
    axis: str
    fixed: int
    rows: list[Row]

    @property
    def file(self) -> str:
        return f"{self.op}_{self.mode}_by_{self.axis}_{FIXED[self.axis]}_{self.fixed}.png"


def read(path: Path) -> list[Row]:
    """The file's rows of ffn, step and decode, numbers as such.

    Raises ValueError that names the file, and the line and column at fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 ({error})") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*TEXT, *NUMBERS) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}")
        found = [_checked(row, f"{path}, line {reader.line_num}") for row in reader if row["op"] in AXES]
    if not found:
        raise ValueError(f"{path}: has no row whose op is {', '.join(AXES)}")
    return found


def _checked(row: Row, where: str) -> Row:
    if (row["op"], row["mode"]) not in TITLES:
        raise ValueError(f"{where}, column mode: {row['mode']!r} is none of {row['op']}'s")
    for name in NUMBERS:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"{where}, column {name}: {row[name]!r} is no number above 0")
        row[name] = value
    return row


def figures(rows: Sequence[Row]) -> list[Figure]:
    """All that can be drawn of the rows.

    Those of a single size are drawn against the first axis of their op.
    """
    found = []
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in rows):
        here = [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
        axes = [axis for axis in AXES[op] if len({row[axis] for row in here}) > 1] or list(AXES[op][:1])
        for axis in axes:
            other = FIXED[axis]
            for fixed in sorted({row[other] for row in here}):
                found.append(Figure(op, mode, axis, int(fixed), [row for row in here if row[other] == fixed]))
    return found


def lines(rows: Iterable[Row], axis: str) -> dict[tuple[str, float], list[Row]]:
    """(provider, share) -> its rows along the axis."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        found.setdefault((row["provider"], row["share"]), []).append(row)
    return found


def draw(figure: Figure, path: Path) -> None:
    """Write the PNG. Raises OSError where that cannot be."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["kind"] for row in figure.rows if row["kind"] != DENSE)) or [DENSE]
    canvas, panels = pyplot.subplots(
        1, len(kinds), figsize=(1.0 + 4.0 * len(kinds), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        _panel(panel, figure, kind)
    panels[0][0].set_ylabel("time of one layer, ms")
    other, first = FIXED[figure.axis], figure.rows[0]
    title = f"{TITLES[figure.op, figure.mode]}; {NAMES[other]} = {figure.fixed}"
    canvas.suptitle(
        f"{title}\n{first['device']}, {first['dtype']}; median, 20th to 80th percentile", fontsize="medium"
    )
    canvas.savefig(path, format="png", dpi=150)
    pyplot.close(canvas)


def _panel(panel: Any, figure: Figure, kind: str) -> None:
    """One structure's lines beside the dense layer's, both axes logarithmic."""
    from matplotlib.ticker import LogLocator

    shown = [row for row in figure.rows if row["kind"] in (kind, DENSE)]
    shares = sorted({row["share"] for row in shown if row["kind"] != DENSE})
    styles = {share: STYLES[i % len(STYLES)] for i, share in enumerate(shares)}
    for (provider, share), line in lines(shown, figure.axis).items():
        across = [row[figure.axis] for row in line]
        colour = COLOURS.get(provider, "C4")
        label = provider if provider == "dense" else f"{provider}, {100 * share:.3g}%"
        style = styles.get(share, "-")
        panel.plot(
            across,
            [row["median_ms"] for row in line],
            style,
            marker="o",
            markersize=3,
            color=colour,
            label=label,
        )
        low, high = [row["p20_ms"] for row in line], [row["p80_ms"] for row in line]
        panel.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({int(row[figure.axis]) for row in shown})
    panel.set(xscale="log", yscale="log", xlabel=NAMES[figure.axis], title=kind)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="small")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw everything and print the files' names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, metavar="FILE.csv", help="what tools/bench.py wrote with --csv")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the PNGs go")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        parser.error("the plots need matplotlib: pip install 'sffn_dist[plot]'")
    try:
        found = figures(read(args.csv))
        args.out.mkdir(parents=True, exist_ok=True)
        for figure in found:
            draw(figure, args.out / figure.file)
            print(args.out / figure.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
