"""Draw a comparison: held-out loss against training FLOPs. matplotlib is imported when something is drawn."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sffn_dist.comparison.summary import Point

SHOWN_FROM = 0.25  # of the FLOPs: the early fall of the loss, far above, would leave no room for what differs


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(curves: Mapping[str, Sequence[Point]], path: Path, title: str) -> None:
    """Write a PNG: a line for each variant, the range over its seeds as a band, a marker at its end.

    Variants that share a kind share a colour, guided ones are dashed. Raises OSError where ``path`` cannot be
    written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.0, 5.0), layout="constrained")
    colours = {
        base: f"C{i}"
        for i, base in enumerate(dict.fromkeys(label.removesuffix("+guide") for label in curves))
    }
    for label, points in curves.items():
        drawn = [point for point in points if math.isfinite(point.low) and math.isfinite(point.high)]
        if not drawn:
            continue
        flops, colour = [point.flops for point in drawn], colours[label.removesuffix("+guide")]
        style = "--" if label.endswith("+guide") else "-"
        axes.plot(
            flops,
            [point.loss for point in drawn],
            style,
            color=colour,
            label=f"{label}  {drawn[-1].loss:.4f}",
        )
        low, high = [point.low for point in drawn], [point.high for point in drawn]
        axes.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(flops[-1], drawn[-1].loss, "s" if style == "--" else "o", color=colour)
    limits = loss_limits(curves.values())
    if limits:
        axes.set_ylim(*limits)
    axes.set(xlabel="training FLOPs", ylabel="held-out loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def loss_limits(curves: Iterable[Sequence[Point]]) -> tuple[float, float] | None:
    """Lowest and highest loss shown: of all points past SHOWN_FROM of the most FLOPs, with a margin.

    None where that is no range.
    """
    points = [point for curve in curves for point in curve if math.isfinite(point.high)]
    most = max((point.flops for point in points), default=0.0)
    late = [point for point in points if point.flops >= SHOWN_FROM * most]
    low, high = (
        min((point.low for point in late), default=0.0),
        max((point.high for point in late), default=0.0),
    )
    margin = 0.05 * (high - low)
    return (low - margin, high + margin) if margin > 0 else None
