"""--change: what a run may be given anew, from which step on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.launch import run_changes
from sffn_dist.spec import changes
from sffn_dist.spec.config import Change, Config, ConfigError
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.plan import plan, render
from sffn_dist.spec.schedule import build_schedule

TREE = {
    "run": {"dir": "none"},
    "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 256},
    "ffn": {"kind": "low_rank", "rank": 8},
    "guide": {"mode": "fixed_step", "fraction": 0.5},
    "train": {"steps": 100, "global_batch_size": 4, "micro_batch_size": 4},
}


def config_with(**over: Any) -> Config:
    tree = json.loads(json.dumps(TREE))
    for key, value in over.items():
        section, _, leaf = key.partition("__")
        tree[section][leaf] = value
    return from_tree(tree)


def changed(before: Config, after: Config, step: int, *keys: str) -> Config:
    values = {key: changes.flatten(before)[key] for key in keys}
    return after.model_copy(update={"changes": (*before.changes, Change(step=step, before=values))})


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 100), steps=st.integers(100, 300), rate=st.floats(1e-5, 1e-2))
def test_what_came_before_stays(step: int, steps: int, rate: float) -> None:
    """Before the change every step is what it was; after it guided steps are the recorded ones and the
    learning rate is that of a run that had the new settings all along.
    """
    old = config_with()
    new = config_with(train__steps=steps, train__learning_rate=rate)
    run = changed(old, new, step, "train.steps", "train.learning_rate")
    clock, before, after = build_schedule(run), build_schedule(old), build_schedule(new)
    assert (clock.guide_begin, clock.guide_end, clock.total_steps) == (0, 50, steps)
    for at in range(steps):
        recipe, factor = clock.recipe(at, run.train), clock.learning_rate_factor(at)
        expected = before if at < step else after
        assert factor == expected.learning_rate_factor(at)
        assert recipe.learning_rate == (old if at < step else new).train.learning_rate
        if at < 100:
            assert (clock.guided(at), clock.alpha(at)) == (before.guided(at), before.alpha(at))
            assert clock.at(at).data_step == at
        else:
            assert not clock.guided(at)


def test_a_change_of_the_guide_moves_its_end() -> None:
    """Two changes, one after the other; the config can be written and read."""
    first = changed(config_with(), config_with(train__steps=200), 20, "train.steps")
    second = changed(
        first, config_with(train__steps=200, guide__fraction=0.4).model_copy(), 30, "guide.fraction"
    )
    again = from_tree(json.loads(second.model_dump_json()))
    assert again == second
    assert (build_schedule(first).guide_end, build_schedule(again).guide_end) == (50, 80)
    assert [settings.train.steps for _, settings in changes.history(again)] == [100, 200, 200]
    page = render(plan(again, 1))
    assert "from step 20 on: train.steps 100 -> 200" in page
    assert "from step 30 on: guide.fraction 0.5 -> 0.4" in page


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("model.width=64", "cannot change in a run; possible are"),
        ("train.seed=1", "cannot change in a run"),
        ("train.global_batch_size=8", "cannot change in a run"),
        ("data.heldout_share=0.5", "cannot change in a run"),
        ("data.tokenizer=x", "cannot change in a run"),
        ("zero.stage=2", "may differ at every restart; give it without --change"),
        ("train.steps='2", "No closing quotation"),
    ],
)
def test_what_cannot_be_changed(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        run_changes.overrides([text])


@pytest.mark.parametrize(
    ("held", "over", "step", "rule"),
    [
        ({}, {"train__steps": 60}, 80, "the run has done 80 steps, and would end after 60"),
        ({}, {"guide__fraction": 0.9}, 70, "steps 0 to 49 were guided; guided steps cannot be added"),
        ({}, {"guide__mode": "off"}, 20, "steps 0 to 19 were guided"),
        ({"guide__mode": "off"}, {"guide__mode": "fixed_step"}, 20, "no step was guided"),
        (
            {"guide__mode": "fixed_flop", "guide__stochastic": False},
            {"train__steps": 200},
            "repeat",
            "lies among the steps that repeat data",
        ),
        (
            {"guide__mode": "window", "guide__begin": 10},
            {"guide__end": 120, "train__steps": 120},
            100,
            "a guided phase that was left is not entered again",
        ),
    ],
)
def test_what_would_change_the_past(
    held: dict[str, Any], over: dict[str, Any], step: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = config_with(**held)
    step = build_schedule(old).first_pass + 1 if step == "repeat" else step
    checkpoint = type("Checkpoint", (), {"step": step})
    monkeypatch.setattr(run_changes.run_folder, "latest_checkpoint", lambda folder: checkpoint)
    keys = [f"{key.replace('__', '.')}={value}" for key, value in over.items()]
    with pytest.raises(ConfigError, match=rule):
        run_changes.take_over(config_with(**{**held, **over}), old, keys)


def test_a_guide_for_later_and_an_earlier_end(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = type("Checkpoint", (), {"step": 20})
    monkeypatch.setattr(run_changes.run_folder, "latest_checkpoint", lambda folder: checkpoint)
    plain, window = config_with(guide__mode="off"), {"guide__mode": "window", "guide__begin": 30}
    later = run_changes.take_over(config_with(**window), plain, ["guide.mode=window", "guide.begin=30"])
    assert (build_schedule(later).guide_begin, build_schedule(later).guide_end) == (30, 100)
    ended = config_with(guide__mode="window", guide__end=20)
    sooner = run_changes.take_over(ended, config_with(), ["guide.mode=window", "guide.end=20"])
    assert [build_schedule(sooner).guided(step) for step in (19, 20)] == [True, False]
    assert run_changes.take_over(ended, sooner, ["guide.end=20"]).changes == sooner.changes, "nothing is new"


@pytest.fixture(scope="module")
def outcome(nursery: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Real runs on one and two ranks, changed, killed, resumed."""
    return nursery(
        Path(__file__).with_name("change_cases.py"), "runs", folder=str(tmp_path_factory.mktemp("changes"))
    )


def test_a_changed_run_is_resumed_as_it_is(outcome: dict[str, Any]) -> None:
    """Steps before the change as before; killed after it and gone on with, on two ranks too: the same."""
    plain, once, twice = outcome["plain"], outcome["once"], outcome["twice"]
    assert once["codes"] == [0, 0], once["log"]
    assert [row[1:] for row in once["curve"][:6]] == [row[1:] for row in plain["curve"][:6]]
    assert len(once["curve"]) == 14
    assert once["curve"][6][1:] != plain["curve"][6][1:]
    assert [row["lr"] for row in twice["rows"]] == [row["lr"] for row in once["rows"]]
    for one, two in zip(once["rows"], twice["rows"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
    record = once["record"]["config"]
    assert record["changes"] == [{"step": 6, "before": {"train.learning_rate": 3e-3, "train.steps": 8}}]
    assert once["events"].count("changed") == 1


def test_what_a_restart_is_told(outcome: dict[str, Any]) -> None:
    """Without --change the old settings are refused, naming the door; with the new ones it goes on."""
    code, log = outcome["refused"]
    assert code == 2
    assert "train.steps = 8: run.dir = " in log
    assert 'to go on with the new value: --change "train.steps=8"' in log
    assert outcome["in the config"] == 0


def test_only_checkpoints_were_copied(outcome: dict[str, Any]) -> None:
    """The newest checkpoint stands for run.json."""
    assert outcome["copied"][0] == 0, outcome["copied"][1]
    for key in ("model.rope_base", "train.learning_rate", "guide.mode", "data"):
        code, log = outcome[f"copied, other {key}"]
        assert code == 2, (key, log)
        assert (f"{key} = " if key != "data" else "was trained on other data") in log
    code, log = outcome["copied, fewer steps"]
    assert code == 2
    assert "train.steps = 4" in log


def test_planned_stops(outcome: dict[str, Any]) -> None:
    """A save, exit code 0, and the schedule of the whole run."""
    for name, reason in (
        ("at step", "train.stop_at_step = 3"),
        ("minutes", "train.stop_after_minutes = 1e-06"),
    ):
        stopped = outcome[f"stopped {name}"]
        assert stopped["code"] == 0, stopped["log"]
        assert f"stopped by {reason} after step" in stopped["log"]
        assert stopped["saved"][-1] == (3 if name == "at step" else 1)
    assert outcome["stopped and gone on"] == outcome["plain"]["curve"]


def test_a_second_stage(outcome: dict[str, Any]) -> None:
    """init_from.optimizer and init_from.data: with the same schedule it is the first run going on."""
    assert outcome["second stage"] == [row[1:] for row in outcome["constant"]["curve"][4:]]
    assert outcome["weights alone"] != outcome["second stage"]
    code, log = outcome["other seed"]
    assert code == 2
    assert "init_from.data = true: train.seed is 7 here and 0 in" in log


def test_initial_weights_are_compared_by_content(outcome: dict[str, Any]) -> None:
    code, log = outcome["weights moved"]
    assert code == 0, log
    code, log = outcome["other weights"]
    assert code == 2
    assert 'moved/checkpoints/step_00000002": run.dir = ' in log


def test_saves_too_slow_for_a_stop_are_told_once(outcome: dict[str, Any]) -> None:
    assert (
        outcome["short stop"].count("too long for a stop by SIGTERM or Ctrl-C (guards.stop_seconds = 1)") == 1
    )
    assert "too long for a stop" not in outcome["plain"]["log"]
