"""Whole runs by ``loop.train`` some of whose steps are bad; called inside the ranks of a pool."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, loop
from sffn_dist.training import step as steps
from sffn_dist.training.bad_steps import NAME, DivergedError

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def trained(
    tree: dict[str, Any],
    bad: dict[int, str],
    precision: str = "fp32",
    passed: list[int] | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train to the end, or to the signal that the last rank gets at ``stop_at``; what happened on the way and
    what came of it.

    ``bad``: step -> "spike" (the loss times 30 on every rank) or "nan" (a gradient of the last rank).
    ``passed``: steps that the run is told to pass over from its start.
    """
    if passed is not None:
        Path(tree["run"]["dir"]).mkdir(parents=True, exist_ok=True)
        told_before = json.dumps({"steps": passed, "returns": [], "trouble": -1})
        (Path(tree["run"]["dir"]) / NAME).write_text(told_before)
    run = training.begin(tree, precision)
    last = run.topology.rank == run.topology.world_size - 1
    told: list[Any] = []
    taken: list[int] = []
    unchanged: dict[int, bool] = {}
    run.tell = lambda event, text, **facts: told.append((event, facts))
    usual_step, usual_loss = loop.train_step, steps._loss

    def loss_of(it: Any) -> Any:
        plain = usual_loss(it)

        def loss(batch: Tensor) -> Tensor:
            return plain(batch) * (30.0 if bad.get(it.step) == "spike" else 1.0)

        return loss

    def step(it: Any) -> Any:
        at = it.step
        taken.append(at)
        if at == stop_at and last:
            it.signals.note(signal.SIGTERM)
        before = training.state_digests(it.engine), engine_state.step_counts(it.engine)[0]
        hook = None
        if bad.get(at) == "nan" and last:
            hook = next(it.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        result = usual_step(it)
        if hook:
            hook.remove()
        unchanged[at] = before == (training.state_digests(it.engine), engine_state.step_counts(it.engine)[0])
        return result

    loop.train_step, steps._loss = step, loss_of
    error, stopped = "", None
    try:
        stopped = loop.train(run)
    except DivergedError as problem:
        error = str(problem)
    finally:
        loop.train_step, steps._loss = usual_step, usual_loss
    run.saver.wait()
    result = {
        "told": told,
        "taken": taken,
        "unchanged": sorted(at for at, same in unchanged.items() if same),
        "error": error,
        "stopped": stopped,
        "state": training.state_digests(run.engine),
        "losses": list(run.bad_steps.losses.recent),
        "passed": sorted(run.bad_steps.excluded),
    }
    engines.destroy(run.engine)
    return result


def begun(tree: dict[str, Any]) -> dict[str, Any]:
    """What a start finds."""
    run = training.begin(tree)
    found = {
        "step": run.step,
        "losses": list(run.bad_steps.losses.recent),
        "passed": sorted(run.bad_steps.excluded),
    }
    engines.destroy(run.engine)
    return found
