"""What a comparison's runs came to: read from their folders, put into a table, rows and curves.

Standard library only.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.comparison.variants import PlannedVariant, ffn_parameters
from sffn_dist.spec import counts, schedule
from sffn_dist.spec.config import Config
from sffn_dist.spec.plan import si
from sffn_dist.spec.renamed_keys import translate
from sffn_dist.telemetry import metrics

ORIGIN = "origin.json"  # in a run's folder: the device, versions and revision that it started with
BASELINE = "dense"


@dataclass(frozen=True)
class Result:
    """A finished run.

    ``flops``: of all its training steps, guides as drawn; ``curve``: (step, FLOPs until then, held-out loss).
    """

    entry: PlannedVariant
    seed: int
    dir: Path
    summary: Mapping[str, Any]
    origin: Mapping[str, Any]
    flops: float
    curve: tuple[tuple[int, float, float], ...]

    @property
    def loss(self) -> float:
        """Held-out loss of the finished model, nats a token."""
        return float(self.summary["heldout_loss"])


@dataclass(frozen=True)
class Point:
    """Held-out loss at a step: FLOPs spent and loss averaged over seeds, and the lowest and highest loss."""

    flops: float
    loss: float
    low: float
    high: float


def finished(run_dir: Path, config: Config) -> bool:
    """True if the run in ``run_dir`` has ended, all its steps taken, evaluated on as many sequences as
    ``config`` asks for.

    That the folder holds this run at all launch/run_identity.py checks.
    """
    try:
        summary = read_object(run_dir / "summary.json")
        recorded_config = translate(read_object(run_dir / "run.json")["config"])
        return bool(
            summary["steps"] == schedule.build_schedule(config).total_steps
            and recorded_config["evaluation"]["sequences"] == config.evaluation.sequences
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with "nan" and the like as floats. Raises OSError or ValueError."""
    tree = strict_json.floats(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds no object")
    return tree


def read(entry: PlannedVariant, seed: int, run_dir: Path) -> Result:
    """A finished run's result.

    Raises OSError, ValueError or KeyError where its files are not what a run writes.
    """
    steps = metrics.read(run_dir / "metrics.jsonl")
    cumulative_flops = [0.0, *itertools.accumulate(float(row["flops"]) for row in steps)]
    curve = [
        (int(row["step"]), cumulative_flops[row["step"]], float(row["heldout_loss"]))
        for row in metrics.read(run_dir / "evaluations.jsonl")
        if row["step"] < len(cumulative_flops)
    ]
    origin = read_object(run_dir / ORIGIN) if (run_dir / ORIGIN).exists() else {}
    summary = read_object(run_dir / "summary.json")
    return Result(entry, seed, run_dir, summary, origin, cumulative_flops[-1], tuple(curve))


# ------------------------------------------------------------------------------------------------------- rows


def run_row(result: Result) -> dict[str, Any]:
    """A run as a row of the CSV: what it was, what was measured, where."""
    entry, config, summary = result.entry, result.entry.config, result.summary
    guide = entry.variant.guide
    return {
        "variant": entry.label,
        "seed": result.seed,
        "kind": config.ffn.kind,
        **{key: entry.sizes.get(key, "") for key in ("width", "rank", "blocks")},
        "guide": config.guide.mode,
        "guide_alpha": config.guide.schedule if guide else "",
        "guide_stochastic": config.guide.stochastic if guide else "",
        "parameters": counts.parameters(config),
        "ffn_parameters": ffn_parameters(config),
        **{key: summary[key] for key in ("steps", "tokens")},
        "flops": round(result.flops),
        **{key: summary[key] for key in ("heldout_loss", "perplexity", "bits_per_byte", "unigram_entropy")},
        # earlier runs do not say
        "bits_per_byte_estimated": summary.get("bits_per_byte_estimated", "unknown"),
        **{key: summary[key] for key in ("tokens_per_s", "seconds", "precision")},
        "ranks": summary["ranks"]["world"],
        "learning_rate": config.train.learning_rate,
        **{key: result.origin.get(key, "") for key in ("device", "torch", "revision")},
        "run_dir": "/".join(result.dir.parts[-2:]),  # below --out
    }


def curve_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each evaluation of each run."""
    return [
        {
            "variant": result.entry.label,
            "seed": result.seed,
            "step": step,
            "flops": round(flops),
            "heldout_loss": loss,
        }
        for result in results
        for step, flops, loss in result.curve
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, at least one, as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plan_row(entry: PlannedVariant, reference: int) -> dict[str, str]:
    """What will be trained, as a row for a reader; ``reference``: FLOPs of the dense model's run."""
    return {
        **_what(entry),
        "steps": f"{entry.steps:,}",
        "tokens": si(entry.steps * entry.config.tokens_per_step),
        "FLOPs": si(entry.flops),
        "of dense": f"{entry.flops / reference:.1%}",
    }


def _what(entry: PlannedVariant) -> dict[str, str]:
    return {
        "variant": f"`{entry.label}`",
        "sizes": ", ".join(f"{key} {value}" for key, value in entry.sizes.items()),
        "parameters": si(counts.parameters(entry.config)),
        "FFN parameters": si(ffn_parameters(entry.config)),
    }


def table_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """A row for each variant that has a finished run, seeds averaged.

    Spreads are sample standard deviations over seeds. The difference to dense is taken seed by seed (both saw
    the same batches in the same order), then averaged. Perplexity is that of the mean loss.
    """
    by_label: dict[str, list[Result]] = {}
    for result in results:
        by_label.setdefault(result.entry.label, []).append(result)
    dense = {result.seed: result.loss for result in by_label.get(BASELINE, [])}
    rows = []
    for label, runs in by_label.items():
        losses = [run.loss for run in runs]
        pairs = [run.loss - dense[run.seed] for run in runs if run.seed in dense and label != BASELINE]
        loss = statistics.fmean(losses)
        row = {
            **_what(runs[0].entry),
            "steps": f"{runs[0].summary['steps']:,}",
            "tokens": si(runs[0].summary["tokens"]),
            "FLOPs": si(statistics.fmean(run.flops for run in runs)),
            "held-out loss": with_spread(losses),
            "by seed": ", ".join(f"{value:.4f}" for value in losses),
            "minus dense": with_spread(pairs, "+") if pairs else "-",
            "perplexity": f"{math.exp(min(loss, 700.0)):.2f}",
            "tokens/s": f"{statistics.fmean(float(run.summary['tokens_per_s']) for run in runs):,.0f}",
        }
        if not dense:
            del row["minus dense"]
        rows.append(row)
    return rows


def with_spread(values: Sequence[float], sign: str = "") -> str:
    """'mean ± sample standard deviation', of one value the value alone."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean
    return f"{mean} ± {statistics.stdev(values):.4f}"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a Markdown table: text to the left, numbers to the right."""
    columns = list(rows[0])
    left = {"variant", "sizes"}
    lines = [columns, ["---" if column in left else "---:" for column in columns]]
    lines += [[row[column] for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def cell(text: str, i: int) -> str:
        return text.ljust(widths[i]) if columns[i] in left else text.rjust(widths[i])

    return "\n".join("| " + " | ".join(cell(text, i) for i, text in enumerate(line)) + " |" for line in lines)


def seconds_left(
    done: Sequence[tuple[int, float]], waiting: Sequence[int], running: Sequence[tuple[int, float]], jobs: int
) -> float:
    """Seconds until all runs have ended, ``jobs`` at a time, by the time that a FLOP took in those that are
    ``done``.

    ``done`` and ``running``: FLOPs of a run, seconds since it was started; ``waiting``: FLOPs. Not finite
    before a run is done.
    """
    done_flops = sum(flops for flops, _ in done)
    rate = sum(seconds for _, seconds in done) / done_flops if done_flops else math.inf
    rest = [flops * rate for flops in waiting] + [
        max(0.0, flops * rate - seconds) for flops, seconds in running
    ]
    return max(sum(rest) / jobs, max(rest, default=0.0))


def curves(results: Sequence[Result]) -> dict[str, list[Point]]:
    """Variant -> its held-out loss along the run, over seeds, at the steps that every seed was evaluated
    at.
    """
    by_variant: dict[str, list[Point]] = {}
    for label in dict.fromkeys(result.entry.label for result in results):
        seeds = [
            {step: (flops, loss) for step, flops, loss in result.curve}
            for result in results
            if result.entry.label == label
        ]
        points = []
        for step in sorted(set.intersection(*(set(seed) for seed in seeds))):
            flops, losses = zip(*(seed[step] for seed in seeds), strict=True)
            points.append(Point(statistics.fmean(flops), statistics.fmean(losses), min(losses), max(losses)))
        by_variant[label] = points
    return by_variant
