"""Phase boundaries on whatever ranks there are: what goes on, what is freed; called inside the ranks of a pool."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sffn_dist.training import engine as engines
from sffn_dist.training import phases, state

_spec = importlib.util.spec_from_file_location("training_cases", Path(__file__).with_name("training_cases.py"))
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def live_bytes() -> int:
    """Bytes of every tensor that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def persistent_bytes(tree: dict[str, Any], steps: int) -> int:
    """What a run holds between two steps, after ``steps`` of them: parameters, gradients, optimizer state, DeepSpeed's buffers."""
    before = live_bytes()
    with training.parted():
        run = training.begin(tree)
        while run.step < steps:
            training.take(run)
            phases.enter(run)
        held = live_bytes() - before
        engines.destroy(run.engine)
    return held


def boundary(tree: dict[str, Any], at: int) -> dict[str, Any]:
    """A boundary before step ``at``: state on both sides, what is left of the old engine, the most memory of the step before and of it."""
    with training.parted():
        run = training.begin(tree)
        while run.step < at - 1:
            training.take(run)
        old = [weakref.ref(run.engine), weakref.ref(run.model), weakref.ref(run.engine.optimizer)]
        guides = [weakref.ref(p) for name, p in run.model.named_parameters() if name.endswith(".guide")]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepping:
            training.take(run)
        before, counts = training.state_digests(run.engine), state.step_counts(run.engine)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as crossing:
            phases.enter(run)
        result = {
            "before": before,
            "after": training.state_digests(run.engine),
            "counts": (counts, state.step_counts(run.engine)),
            "alive": sum(ref() is not None for ref in [*old, *guides]),
            "peaks": (peak(stepping), peak(crossing)),
        }
        gc.collect()
        engines.destroy(run.engine)
    return result


def peak(recorded: Any) -> int:
    """The most bytes allocated at once while it was recorded, above those at its start."""
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now, most = 0, 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
