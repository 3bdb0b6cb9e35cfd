"""What watching a run costs of its steps: each guard's own time in a real run, as tools/bench.py starts its
ranks.

The run is pretrain.py's. What ranks wait for each other is no cost of a guard: before each exchange they
meet, untimed.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sffn_bench import rows
from sffn_dist import pretrain, strict_json
from sffn_dist.health import replica_check
from sffn_dist.health.stragglers import StepTimers
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.launch import environment
from sffn_dist.telemetry import metrics
from sffn_dist.training import reporting, step
from sffn_dist.training.bad_steps import BadSteps
from sffn_dist.training.loss_spikes import LossHistory
from sffn_dist.training.run import TrainingRun

# guard -> where its functions are, and whether they exchange something between ranks
GUARDS: dict[str, tuple[tuple[tuple[Any, str], ...], bool]] = {
    "agreement": (((step, "agree_on_step"),), True),
    "replicas": (((replica_check, "check_replicas"),), True),
    "spikes": (((LossHistory, "skip_reason"), (BadSteps, "record")), False),
    "watchdog": (((Watchdog, "tick"),), False),
    "timers": (
        (
            (StepTimers, "begin"),
            (StepTimers, "forwarded"),
            (StepTimers, "end"),
            (TrainingRun, "report_requested"),
        ),
        False,
    ),
    "telemetry": (((reporting, "report_step"),), False),
}


def instrument(spent: dict[str, list[float]]) -> None:
    """Have every call of a guard note its seconds."""

    def timed(function: Callable[..., Any], seconds: list[float], meet: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if meet and dist.get_world_size() > 1:
                dist.barrier()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return called

    for name, (places, meet) in GUARDS.items():
        for owner, attribute in places:
            setattr(owner, attribute, timed(getattr(owner, attribute), spent.setdefault(name, []), meet))


def keep_cpu_time(spent: dict[str, list[float]]) -> None:
    """What the threads beside the training have used, read before they end."""
    stop = Watchdog.stop

    def stopped(watch: Watchdog) -> None:
        for thread in (watch._thread, watch._heartbeat._thread if watch._heartbeat else None):
            if thread is not None and thread.is_alive():
                text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
                spent.setdefault(f"thread {thread.name}", []).append(int(text.split()[0]) / 1e9)
        stop(watch)

    Watchdog.stop = stopped  # type: ignore[method-assign,assignment]


def measured(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a guard, and their sum: milliseconds of a step, and the share of the median step."""
    spent: dict[str, list[float]] = {}
    instrument(spent)
    keep_cpu_time(spent)
    if pretrain.main(["--config", settings["config"], *settings["overrides"]]):
        sys.exit("the run failed")
    found = metrics.read(Path(settings["folder"]) / "metrics.jsonl")
    step_seconds = statistics.median(row["seconds"] for row in found)
    per_step = {}
    for name, seconds in spent.items():
        # of checks every n steps the n-th part; the first call, which warms up, counts like the others
        steps = len(seconds) * settings["replicas_interval"] if name == "replicas" else len(found)
        per_step[name] = sum(seconds) / steps
    shape = {
        "config": Path(settings["config"]).stem,
        "ranks": settings["ranks"],
        "steps": len(found),
        "step_ms": rows.figures(1e3 * step_seconds),
    }
    table = [
        rows.row(
            "guards",
            name,
            "step",
            shape,
            [value, value],
            calls=len(spent[name]),
            share=rows.figures(value / step_seconds),
        )
        for name, value in per_step.items()
    ]
    total = sum(per_step.values())
    table.append(
        rows.row(
            "guards", "all", "step", shape, [total, total], calls=0, share=rows.figures(total / step_seconds)
        )
    )
    for row in table:
        for name in ("p20_ms", "p80_ms", "repeats"):  # one mean a run
            del row[name]
    return table


if __name__ == "__main__":
    result = measured(json.loads(sys.argv[1]))
    if environment.is_rank_zero():
        print(strict_json.dumps(result))
