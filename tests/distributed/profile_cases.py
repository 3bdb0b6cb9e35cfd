"""Whole runs by ``loop.train``, some steps of them under the profiler; called inside the ranks of a pool."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from sffn_dist.spec import loading
from sffn_dist.telemetry import profiler
from sffn_dist.training import engine as engines
from sffn_dist.training import loop, profiling

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def trained(
    tree: dict[str, Any], fault: str = "", stop_at: int | None = None, excluded: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Train to the end, or to the SIGTERM that this rank gets in ``stop_at``, and say what came of it.

    ``fault``: "disk" (no file may grow beyond 20 kB while a profile is written), "start", "ranges", "export".
    """
    run = training.begin(tree)
    run.bad_steps.excluded.update(excluded)
    told: list[str] = []
    run.tell = lambda event, text, **facts: told.append(text)
    usual, marks, wait = loop.train_step, [], dist.Work.wait

    def step(it: Any) -> Any:
        marks.append((it.step, _marked(it)))
        if it.step == stop_at:
            it.signals.received, it.signals.cause = signal.SIGTERM, "SIGTERM"
        return usual(it)

    loop.train_step = step
    warnings = _Warnings()
    logging.getLogger(profiling.__name__).addHandler(warnings)
    try:
        with _broken(fault):
            stop = loop.train(run)
    finally:
        loop.train_step = usual
        logging.getLogger(profiling.__name__).removeHandler(warnings)
    folder = Path(tree["run"]["dir"])
    result = {
        "losses": list(run.bad_steps.losses.recent),
        "state": training.state_digests(run.engine),
        "told": told,
        "warnings": warnings.texts,
        "marks": marks,
        "left": _marked(run) or (dist.Work.wait is not wait and dist.Work.wait.__name__ == "wrapper"),
        "files": sorted(str(path.relative_to(folder)) for path in folder.glob("profile/*/*")),
        "tables": {
            str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.glob("profile/*/*.json")
        },
        "stop": stop and (stop.name, stop.exit_code, run.step),
        "saved": sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")),
    }
    engines.destroy(run.engine)
    return result


def opened(tree: dict[str, Any], start: int, rank: int) -> dict[str, Any]:
    """What a start of the run at step ``start`` makes of ``profile.steps`` on a rank, before any step."""
    notes: list[str] = []
    run: Any = SimpleNamespace(
        config=loading.from_tree(tree),
        schedule=SimpleNamespace(total_steps=tree["train"]["steps"]),
        step=start,
        reports=SimpleNamespace(progress=SimpleNamespace(note=notes.append)),
        topology=SimpleNamespace(rank=rank),
    )
    with profiling.profiled(run, loop.train_step) as step:
        return {"untouched": step is loop.train_step, "notes": notes}


def _marked(run: Any) -> bool:
    """Whether something of a profile is on the run's model or engine."""
    hooked = any(
        getattr(hook, "__module__", "") == profiling.__name__
        for module in run.model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )
    return hooked or "step" in vars(run.engine) or "data" in vars(run.timers)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def _broken(fault: str) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no permission")

    owner, name = {
        "start": (profiler, "profile"),
        "ranges": (profiling, "record_function"),
        "export": (profiler, "read_events"),
        "disk": (profiler, "write_trace"),
        "": (profiler, "write_trace"),
    }[fault]
    usual = getattr(owner, name)
    if fault == "disk":

        def fail(*arguments: Any) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
            try:
                usual(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if fault:
        setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, usual)
