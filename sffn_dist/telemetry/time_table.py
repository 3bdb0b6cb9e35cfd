"""The table of time by cause, for the reader and as JSON. Standard library only."""

from __future__ import annotations

from typing import Any

from sffn_dist.telemetry.time_by_cause import PARTS_OF_MODEL, Cause, Share, TimeByCause

_HIDDEN = "communication, hidden"


def as_json(times: TimeByCause, rank: int, device: str) -> dict[str, Any]:
    """Milliseconds, means over the steps; ``rows`` sum to ``step_ms``."""
    steps = len(times.steps)

    def ms(time: float) -> float:
        return time / steps / 1e6

    rows = []
    for cause in Cause:
        forward, backward = (times.shares.get(Share(cause, part), 0) for part in (False, True))
        row: dict[str, Any] = {"cause": cause.value, "ms": ms(forward + backward)}
        if cause in PARTS_OF_MODEL:
            row |= {"forward_ms": ms(forward), "backward_ms": ms(backward)}
        rows.append(row)
    return {
        "rank": rank,
        "device": device,
        "steps": list(times.steps),
        "steps_ms": [time / 1e6 for time in times.step_times],
        "step_ms": ms(sum(times.step_times)),
        "rows": rows,
        "communication_hidden_ms": ms(times.hidden),
    }


def render(table: dict[str, Any]) -> str:
    """What :func:`as_json` gave, as a page for a terminal."""
    steps, step_ms = table["steps"], table["step_ms"]
    span = f"steps {steps[0]}..{steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    lines = [
        f"time by cause, rank {table['rank']} on {table['device']}, {span}, ms a step",
        f"{'':<24}{'forward':>10}{'backward':>10}{'all':>10}{'share':>8}",
    ]
    lines += [
        f"{row['cause']:<24}{_cell(row.get('forward_ms'))}{_cell(row.get('backward_ms'))}"
        f"{_cell(row['ms'])}{row['ms'] / step_ms:>8.1%}"
        for row in table["rows"]
    ]
    lines.append(f"{'step':<24}{'':>20}{_cell(step_ms)}{1:>8.1%}")
    hidden = table["communication_hidden_ms"]
    lines.append(f"{_HIDDEN:<24}{'':>20}{_cell(hidden)}{hidden / step_ms:>8.1%}  beside what is above")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return f"{value:>10.2f}" if value is not None else f"{'':>10}"
