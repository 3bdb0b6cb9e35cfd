"""Reference cycles are collected between steps, and by nobody else while a run trains."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from sffn_dist.training import loop
from sffn_dist.training.hooks.collect_garbage import CollectGarbage


def test_the_collector_is_off_in_the_loop_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = []

    def step(run: Any) -> Any:
        enabled.append(gc.isenabled())
        run.step += 1
        if run.step == 3:
            raise RuntimeError("a step that fails")
        return SimpleNamespace(stop=None)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop.profiling, "profiled", lambda run, step: contextlib.nullcontext(step))
    monkeypatch.setattr(loop, "standard_hooks", lambda config: [])
    monkeypatch.setattr(loop.reporting, "announce_bound", lambda run: None)
    monkeypatch.setattr(loop, "evaluate_missed", lambda run: None)
    bad_steps, schedule = SimpleNamespace(excluded=()), SimpleNamespace(total_steps=9)
    run: Any = SimpleNamespace(config=None, step=0, bad_steps=bad_steps, schedule=schedule)
    with pytest.raises(RuntimeError, match="a step that fails"):
        loop.train(run)
    assert enabled == [False] * 3
    assert gc.isenabled()


def test_when_it_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, collected, result = CollectGarbage(), [], SimpleNamespace()
    monkeypatch.setattr(gc, "collect", lambda generation: collected.append(generation))
    for step in range(1, 1101):
        run: Any = SimpleNamespace(step=step)
        if hook.due(run, result):  # type: ignore[arg-type]
            hook(run, result)  # type: ignore[arg-type]
    assert collected == [1] * 19 + [2] + [1, 1]
