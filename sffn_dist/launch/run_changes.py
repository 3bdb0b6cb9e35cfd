"""``--change "train.steps=2000 train.learning_rate=1e-4"``: what a run may be given anew at a restart.

A restart with other settings than ``run.dir`` holds is refused (run_identity.py). Settings named by
``--change`` are the exception: they hold from the newest checkpoint on and are recorded with its step, in
run.json and in every later checkpoint. What came before stays as it was. Given again, with the same values,
it changes nothing: a requeued job has the same command line. Standard library only.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from sffn_dist.checkpoint import run_folder
from sffn_dist.spec import validation
from sffn_dist.spec.changes import CHANGEABLE
from sffn_dist.spec.config import Change, Config, ConfigError
from sffn_dist.spec.config_keys import flatten
from sffn_dist.spec.schedule import Schedule, build_schedule


def overrides(texts: Iterable[str]) -> list[str]:
    """The single ``key=value`` of all ``--change`` options; raises ConfigError."""
    changes: list[str] = []
    for text in texts:
        try:
            changes += shlex.split(text)
        except ValueError as error:
            raise ConfigError([f"--change {text!r}: {error}"]) from None
    problems = [_refusal(key) for key in _keys(changes) if key not in CHANGEABLE]
    if problems:
        raise ConfigError(problems)
    return changes


def _keys(changes: Sequence[str]) -> list[str]:
    return [text.partition("=")[0] for text in changes]


def _refusal(key: str) -> str:
    section = key.partition(".")[0]
    if section not in validation.IDENTITY or key in validation.FREE:
        return f"--change {key}: may differ at every restart; give it without --change"
    return f"--change {key}: cannot change in a run; possible are {', '.join(sorted(CHANGEABLE))}"


def take_over(config: Config, held: Config, changes: Sequence[str]) -> Config:
    """The config with the run's earlier changes, and a new one where ``changes`` name other values than
    ``held``, the run's config so far, has.

    Raises ConfigError where what was done already would have been done otherwise.
    """
    before, after = flatten(held), flatten(config)
    changed = {key: before[key] for key in sorted(set(_keys(changes))) if before[key] != after[key]}
    config = config.model_copy(update={"changes": held.changes})
    if not changed:
        return config
    checkpoint = run_folder.latest_checkpoint(Path(config.run.dir))
    step = checkpoint.step if checkpoint else 0
    if held.changes and held.changes[-1].step > step:
        raise ConfigError(
            [
                f"--change {key}: the run was changed at step {held.changes[-1].step} already, and its "
                f"newest checkpoint is of step {step}; go on to a later one first"
                for key in changed
            ]
        )
    change = Change(step=step, before=changed)
    config = config.model_copy(update={"changes": (*held.changes, change)})
    text = " ".join(f"{key}={json.dumps(after[key])}" for key in changed)
    problems = list(_problems(step, build_schedule(held), build_schedule(config)))
    if problems:
        raise ConfigError([f"--change {text!r}: {problem}" for problem in problems])
    return config


def _problems(step: int, old: Schedule, new: Schedule) -> Iterable[str]:
    """What the steps before ``step`` would have been under the new schedule and were not."""
    if new.total_steps < step:
        yield f"the run has done {step} steps, and would end after {new.total_steps}"
    if min(step, old.first_pass) != min(step, new.first_pass):
        yield (
            f"step {step} lies among the steps that repeat data, and which they repeat would change; "
            "train.steps cannot change there"
        )
    spans = [_clip(schedule, step) for schedule in (old, new)]
    left = step > 0 and old.guided(step - 1) and not old.guided(step)
    if spans[0] != spans[1] or (left and new.guided(step)):
        was = f"steps {spans[0][0]} to {spans[0][1] - 1} were guided" if spans[0] else "no step was guided"
        yield (
            f"of the {step} steps that are done {was}; guided steps cannot be added or taken back there, and "
            f"a guided phase that was left is not entered again. An earlier end: guide.mode=window "
            f"guide.end={step}"
        )


def _clip(schedule: Schedule, step: int) -> tuple[int, int] | None:
    """The guided ones of the first ``step`` steps: first, and one after the last."""
    begin, end = schedule.guide_begin, min(schedule.guide_end, step)
    return (begin, end) if begin < end else None
