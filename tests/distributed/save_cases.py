"""Whole runs by ``loop.train`` whose saves are slow or fail; called inside the ranks of a pool."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sffn_dist.checkpoint import run_folder
from sffn_dist.training import engine as engines
from sffn_dist.training import loop
from sffn_dist.training.hooks.checkpoint import LostWeightsError

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def trained(
    tree: dict[str, Any], slow: bool = False, failures: dict[int, int] | None = None
) -> dict[str, Any]:
    """Train to the end; what came of it, and of its saves in the order in which it happened.

    ``slow``: each write lasts until the next step is taken, but not for ever. ``failures``: how often the
    last rank cannot write, by step.
    """
    run = training.begin(tree)
    events, news, failing = [], [], dict(failures or {})
    usual_write: Callable[..., Any] = run.saver._write
    usual_news, usual_step = run.saver.pop_failures, engines.train_batch

    def write(folder: Path, job: Any) -> Any:
        step = job.position.step
        events.append(f"writing {step}")
        deadline = time.monotonic() + 10.0
        while (
            slow
            and step < run.schedule.total_steps
            and f"step {step + 1}" not in events
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        if run.topology.rank == run.topology.world_size - 1 and failing.get(step, 0):
            failing[step] -= 1
            raise OSError(28, "No space left on device")
        result = usual_write(folder, job)
        events.append(f"written {step}")
        return result

    def heard() -> list[str]:
        news.extend(found := usual_news())
        return found

    def step(*arguments: Any) -> Any:
        result = usual_step(*arguments)
        events.append(f"step {run.step + 1}")
        return result

    run.saver._write, run.saver.pop_failures, engines.train_batch = write, heard, step  # type: ignore[method-assign]
    lost = ""
    try:
        loop.train(run)
    except LostWeightsError as error:
        lost = str(error)
    finally:
        engines.train_batch = usual_step
    names = [path.name for path in run_folder.checkpoints(run.dir)]
    result = {
        "state": training.state_digests(run.engine),
        "events": events,
        "news": news,
        "lost": lost,
        "names": names,
    }
    engines.destroy(run.engine)
    return result
