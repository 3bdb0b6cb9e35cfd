"""The section ``profile`` of the config: its rules, what the plan says of it; it makes no other run."""

from __future__ import annotations

from typing import Any

import pytest

from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.plan import plan, render
from sffn_dist.spec.profiled_steps import describe, profiled_steps
from sffn_dist.spec.validation import check_world, identity, unused_settings

FORM = (
    "must read FIRST:END with whole numbers FIRST < END; END is not profiled: 10:13 are steps 10, 11 and 12"
)


def config(**profile: Any) -> Config:
    return from_tree(
        {
            "run": {"dir": "runs/it"},
            "model": {"layers": 2, "width": 64, "heads": 4, "vocab": 512},
            "train": {"steps": 40, "global_batch_size": 16, "micro_batch_size": 4},
            "profile": profile,
        }
    )


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({"steps": "10"}, f'profile.steps = "10": {FORM}'),
        ({"steps": "13:10"}, f'profile.steps = "13:10": {FORM}'),
        ({"steps": "10:10"}, f'profile.steps = "10:10": {FORM}'),
        ({"steps": "-1:3"}, f'profile.steps = "-1:3": {FORM}'),
        ({"steps": "1:2:3"}, f'profile.steps = "1:2:3": {FORM}'),
        (
            {"steps": "0:101"},
            'profile.steps = "0:101": must be at most 100 steps, whose events are held in memory',
        ),
        ({"steps": 10}, "profile.steps = 10: must be a string"),
        ({"ranks": [0, -1]}, "profile.ranks.1 = -1: must be greater than or equal to 0"),
        ({"ranks": []}, "profile.ranks = []: Tuple should have at least 1 item"),
    ],
)
def test_bad_values_are_refused_with_key_value_and_rule(profile: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**profile)
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_ranks_must_exist() -> None:
    check_world(config(steps="1:2", ranks=[0, 3]), 4)
    check_world(config(ranks=[4]), 4)  # nothing is profiled
    with pytest.raises(ConfigError, match=r"profile\.ranks holds 4: must be below the number of ranks, 4"):
        check_world(config(steps="1:2", ranks=[0, 4]), 4)
    assert unused_settings(config(ranks=[4])) == {"profile.ranks": "profile.steps = null profiles nothing"}


def test_a_profile_makes_no_other_run() -> None:
    assert identity(config(steps="10:13", ranks=[1])) == identity(config())


INTO = "into runs/it/profile/step_"


@pytest.mark.parametrize(
    ("steps", "start", "taken", "text"),
    [
        ("10:13", 0, (10, 13), f"steps 10..12 on ranks 0, 1, {INTO}00000010-00000012"),
        ("39:50", 0, (39, 40), "step 39 on ranks 0, 1 (profile.steps = 39:50: the run ends after step 39), "),
        ("40:50", 0, None, "no step (profile.steps = 40:50: the run ends after step 39)"),
        ("10:13", 11, (11, 13), "steps 11..12 on ranks 0, 1 (profile.steps = 10:13: this start begins with "),
        ("10:13", 20, None, "no step (profile.steps = 10:13: this start begins with step 20)"),
    ],
)
def test_what_is_profiled_is_said(steps: str, start: int, taken: tuple[int, int] | None, text: str) -> None:
    own = config(steps=steps, ranks=[1, 0])
    assert profiled_steps(own, 40, start) == (range(*taken) if taken else range(0))
    said = describe(own, 40, start)
    assert said
    assert said.startswith(text)
    if not start:
        assert f"profile        {said}\n" in render(plan(own, 2))


def test_without_a_profile_nothing_is_said() -> None:
    assert describe(config(), 40) is None
    assert "profile" not in render(plan(config(), 1))
    assert profiled_steps(config(), 40) == range(0)
    assert profiled_steps(config(steps="50:60"), 0) == range(50, 60), (
        "of train.epochs the steps are not known"
    )
