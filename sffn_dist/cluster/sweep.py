"""A sweep file -> its runs: every config with every combination of the grid, each in a folder of its own.

Imports no torch.

    {
      "name": "sizes",
      "configs": ["../configs/paper/s_dense.json", ...],
      "overrides": {"train.steps": 1000},
      "grid": {
        "structure": {"dense": {}, "low_rank_32": {"ffn.kind": "low_rank", "ffn.rank": 192}},
        "train.learning_rate": [3e-4, 6e-4]
      },
      "exclude": [{"structure": "dense", "train.learning_rate": 6e-4}]
    }

Paths of configs start from the sweep file's folder. An axis of the grid is a key with a list of values, or a
word with an object of labelled settings. A combination that has everything an entry of "exclude" names (axes,
and "config" for a config's name; of a list any one) is left out. A run writes to runs/<name>/<label>, the
label being put together from the config's name and what the axes say.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist.cluster import runs
from sffn_dist.cluster.runs import JobRun
from sffn_dist.launch import checks
from sffn_dist.spec import loading, unique_keys
from sffn_dist.spec.config import ConfigError

KEYS = ("name", "configs", "overrides", "grid", "exclude")
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"


@dataclass(frozen=True)
class Choice:
    """One value of an axis: what exclude calls it, its part of the label, the settings that it makes."""

    axis: str
    value: Any
    label: str
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read."""

    name: str
    configs: tuple[str, ...]
    overrides: tuple[tuple[str, Any], ...]
    axes: tuple[tuple[Choice, ...], ...]
    exclude: tuple[dict[str, Any], ...]


def read(path: Path, config: str | None = None) -> Sweep:
    """Read a sweep file; ``config`` is the file to use where it names none.

    Raises ConfigError with every problem.
    """
    prefix = f"sweep file {str(path)!r}"
    try:
        tree = unique_keys.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{prefix}: cannot be read: {error.strerror}"]) from None
    except unique_keys.RepeatedKeyError as error:
        raise ConfigError([f"{prefix}: {error}"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{prefix}: not valid JSON: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{prefix}: must hold an object"])
    problems = [f"{prefix}: {problem}" for problem in _shape(tree, config)]
    if problems:
        raise ConfigError(problems)
    configs = (
        tuple(str(path.parent / name) for name in tree["configs"]) if "configs" in tree else (str(config),)
    )
    grid = tree.get("grid", {})
    axes = tuple(tuple(_choices(axis, values)) for axis, values in grid.items())
    return Sweep(
        tree["name"], configs, tuple(tree.get("overrides", {}).items()), axes, tuple(tree.get("exclude", ()))
    )


def _shape(tree: Mapping[str, Any], config: str | None) -> Iterator[str]:
    """What is wrong with the form of a sweep file."""
    for key in tree:
        if key not in KEYS:
            yield f"{key}: unknown key; known are {', '.join(KEYS)}"
    name, configs, grid = tree.get("name"), tree.get("configs"), tree.get("grid", {})
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        yield f"name = {json.dumps(name)}: must be a word of letters, digits and _.+-, for folder and job"
    if configs is not None and config is not None:
        yield "configs: the file names configs, and --config another; leave one out"
    if configs is None and config is None:
        yield "configs: missing; name them here, or one with --config"
    if configs is not None and not (_is_list(configs) and all(isinstance(item, str) for item in configs)):
        yield f"configs = {json.dumps(configs)}: must be a list of config files"
    if not isinstance(tree.get("overrides", {}), dict):
        yield f"overrides = {json.dumps(tree['overrides'])}: must be an object of key.path: value"
    exclude = tree.get("exclude", [])
    axes = {*grid, "config"} if isinstance(grid, dict) else {"config"}
    if not isinstance(exclude, list) or not all(isinstance(item, dict) and item for item in exclude):
        yield f"exclude = {json.dumps(exclude)}: must be a list of objects, axis: value"
    else:
        yield from (
            f"exclude names {axis}, which is no axis" for item in exclude for axis in item if axis not in axes
        )
    if not isinstance(grid, dict):
        yield f"grid = {json.dumps(grid)}: must be an object of axes"
        return
    for axis, values in grid.items():
        yield from (f"grid.{axis} = {json.dumps(values)}: {problem}" for problem in _axis_problems(values))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _axis_problems(values: Any) -> Iterator[str]:
    if isinstance(values, dict) and values:
        for label, settings in values.items():
            if not re.fullmatch(_NAME, label):
                yield f"label {label!r} must be a word of letters, digits and _.+-"
            if not isinstance(settings, dict):
                yield f"{label} must be an object of key.path: value"
    elif not _is_list(values):
        yield "must be a list of values, or an object of labelled settings"


def _choices(axis: str, values: Any) -> Iterator[Choice]:
    if isinstance(values, dict):
        for label, settings in values.items():
            yield Choice(axis, label, label, tuple(settings.items()))
    else:
        for value in values:
            label = re.sub(r"[^A-Za-z0-9_.+-]", "_", _text(value).strip('"'))
            yield Choice(axis, value, f"{axis.rsplit('.', 1)[-1]}_{label}", ((axis, value),))


def _text(value: Any) -> str:
    """A value as an override takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def combinations(sweep: Sweep) -> Iterator[tuple[str, str, tuple[Choice, ...]]]:
    """(label, config file, choices) of every run, those left out being left out."""
    for file in sweep.configs:
        for choices in itertools.product(*sweep.axes):
            axis_values = {"config": Path(file).stem, **{choice.axis: choice.value for choice in choices}}
            if any(
                all(_is_one(axis_values[axis], value) for axis, value in item.items())
                for item in sweep.exclude
            ):
                continue
            parts = [Path(file).stem] if len(sweep.configs) > 1 or not choices else []
            yield "-".join([*parts, *(choice.label for choice in choices)]), file, choices


def _is_one(value: Any, wanted: Any) -> bool:
    return value == wanted or (isinstance(wanted, list) and value in wanted)


def expand(sweep: Sweep, overrides: Sequence[str], world: int, folder: str = "runs") -> list[JobRun]:
    """The runs, each checked; raises ConfigError with what is wrong in any of them.

    ``overrides`` are the command line's, for all runs; ``world``: ranks of each.
    """
    axis_keys = {key for axis in sweep.axes for choice in axis for key, _ in choice.settings}
    fixed = loading.merge_overrides((f"{key}={_text(value)}" for key, value in sweep.overrides), overrides)
    for key in [text.partition("=")[0] for text in fixed] + sorted(axis_keys & {"run.dir"}):
        if key == "run.dir":
            raise ConfigError(["run.dir: is set for each run of a sweep, and cannot be given"])
        if key in axis_keys:
            raise ConfigError([f"{key}: is an axis of the grid, and cannot be set for all runs too"])
    job_runs: dict[str, JobRun] = {}
    problems: dict[str, list[str]] = {}
    for label, file, choices in combinations(sweep):
        if label in job_runs:
            raise ConfigError([f"two runs would be called {label}: give the values labels that differ"])
        settings = [f"{key}={_text(value)}" for choice in choices for key, value in choice.settings]
        try:
            job_runs[label] = runs.read(
                label, file, [*fixed, *settings, f"run.dir={folder}/{sweep.name}/{label}"]
            )
            checks.check_run(job_runs[label].config, world)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(label)
    if problems:
        raise ConfigError([f"{problem} (run {_some(labels)})" for problem, labels in problems.items()])
    if not job_runs:
        raise ConfigError(["exclude: leaves no run of the sweep"])
    return list(job_runs.values())


def _some(labels: Sequence[str]) -> str:
    return labels[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")
