"""Which steps of a run ``profile.steps`` records, and how that is said."""

from __future__ import annotations

from pathlib import Path

from sffn_dist.spec.config import Config
from sffn_dist.spec.config_profile import step_range


def profiled_steps(config: Config, total_steps: int, start: int = 0) -> range:
    """The steps of ``profile.steps`` that are taken by a start at step ``start``; empty if none is asked for.

    ``total_steps`` = 0: not known yet (train.epochs).
    """
    if config.profile.steps is None:
        return range(0)
    asked = step_range(config.profile.steps)
    end = min(asked.stop, total_steps) if total_steps else asked.stop
    return range(max(asked.start, start), max(end, start))


def describe(config: Config, total_steps: int, start: int = 0) -> str | None:
    """One line of what is profiled, and why steps that are asked for are not; None if none is asked for."""
    if config.profile.steps is None:
        return None
    asked, taken = step_range(config.profile.steps), profiled_steps(config, total_steps, start)
    limits = []
    if total_steps and asked.stop > total_steps:
        limits.append(f"the run ends after step {total_steps - 1}")
    if asked.start < start:
        limits.append(f"this start begins with step {start}")
    reason = f" (profile.steps = {config.profile.steps}: {', '.join(limits)})" if limits else ""
    if not taken:
        return f"no step{reason}"
    ranks = ", ".join(map(str, sorted(set(config.profile.ranks))))
    return (
        f"{spelled(taken)} on rank{'s' if ',' in ranks else ''} {ranks}{reason}, into "
        f"{folder(config.run.dir, taken)}"
    )


def spelled(steps: range) -> str:
    """ "step 10", "steps 10..12"."""
    return f"steps {steps[0]}..{steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"


def folder(run_dir: str, steps: range) -> Path:
    """Where the ranks' files of these steps lie."""
    return Path(run_dir) / "profile" / f"step_{steps[0]:08d}-{steps[-1]:08d}"
