"""Options of a job -> its batch script: #SBATCH lines and settings from here, the body of
slurm/pretrain.sbatch. Imports no torch.

The body is the same in every script: :func:`script` takes it from the file as it stands, from the line that
begins with BODY on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sffn_dist.cluster.runs import JobRun
from sffn_dist.spec.config import ConfigError

BODY = "# ---- the job:"
LAUNCHERS = ("srun", "torchrun", "deepspeed")
MOST_GRACE = 65535  # seconds; what Slurm takes
# cores of a rank with a GPU, where nothing is said: many clusters give one, which the main thread,
# autograd, the reader and the saver would share
CORES = 8
SWEEP_SECONDS = 60  # Slurm may send the warning so much earlier
_TIME = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<rest>\d{1,7}(?::\d{1,2}){0,2})", re.ASCII)


@dataclass(frozen=True)
class Options:
    """What is asked of Slurm for each run. ``gpus`` and ``ranks`` are of one node; ``grace`` in seconds."""

    nodes: int
    gpus: int
    time: str
    ranks: int | None = None  # None: one a GPU
    launcher: Literal["srun", "torchrun", "deepspeed"] = "srun"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int | None = None  # None: CORES with GPUs, else the cluster's
    container: str | None = None
    mounts: tuple[str, ...] = ()
    interface: str | None = None
    grace: int = 300
    chain: int = 1
    max_parallel: int | None = None
    more: tuple[str, ...] = ()  # any other options of sbatch, as they are

    @property
    def ranks_per_node(self) -> int:
        return self.ranks if self.ranks is not None else self.gpus

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Place:
    """Where a job finds things: the project, its Python environment, the folder that relative paths start
    from.
    """

    repository: Path
    environment: Path
    folder: Path


def seconds(time: str) -> int | None:
    """A time limit as Slurm writes it (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; None: no limit.

    Raises ConfigError.
    """
    if time.lower() in ("infinite", "unlimited"):
        return None
    match = _TIME.fullmatch(time)
    if not match:
        raise ConfigError(
            [f"--time = {time!r}: must read like 90 (minutes), 1:30:00, 2-12 or 2-12:00:00, or be unlimited"]
        )
    parts = [int(part) for part in match["rest"].split(":")]
    units = 3600, 60, 1
    if match["days"] is None and len(parts) < 3:  # the first number is minutes
        parts.insert(0, 0)
    return int(match["days"] or 0) * 86400 + sum(
        part * unit for part, unit in zip(parts, units, strict=False)
    )


def check(options: Options, arrays: bool) -> None:
    """Refuse options that cannot be meant; raises ConfigError with every one.

    ``arrays``: a sweep is what they are for.
    """
    problems = list(_problems(options, arrays))
    try:
        limit = seconds(options.time)
        if limit is not None and limit <= options.grace + SWEEP_SECONDS:
            problems.append(
                f"--time = {options.time!r}: must be more than --grace = {options.grace} s and the "
                f"{SWEEP_SECONDS} s by which "
                "Slurm may send the warning too early"
            )
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def _problems(options: Options, arrays: bool) -> Iterator[str]:
    for name, value, least in (
        ("nodes", options.nodes, 1),
        ("gpus-per-node", options.gpus, 0),
        ("chain", options.chain, 1),
        ("cpus-per-rank", options.cpus, 1),
        ("max-parallel", options.max_parallel, 1),
        ("grace", options.grace, 1),
    ):
        if value is not None and value < least:
            yield f"--{name} = {value}: must be at least {least}"
    if options.grace > MOST_GRACE:
        yield f"--grace = {options.grace}: must be at most {MOST_GRACE} seconds"
    if options.ranks_per_node < 1:
        yield (
            f"--ranks-per-node = {options.ranks_per_node}: must be at least 1; without GPUs it says how "
            f"many ranks a node runs"
        )
    if options.launcher not in LAUNCHERS:
        yield f"--launcher = {options.launcher!r}: must be one of {', '.join(LAUNCHERS)}"
    if options.max_parallel is not None and not arrays:
        yield f"--max-parallel = {options.max_parallel}: goes with --sweep"
    if options.chain > 1 and arrays:
        yield (
            f"--chain = {options.chain}: does not go with --sweep, whose runs go back into the queue by "
            f"themselves"
        )
    for name in ("partition", "account", "qos", "constraint", "container", "interface"):
        text = getattr(options, name)
        if text is not None and not re.fullmatch(r"[^\s\"'\\]+", text):
            yield f"--{name} = {text!r}: must be a name without spaces and quotes"
    for text in options.more:
        if not re.fullmatch(r"-[^\n]+", text):
            yield f"--sbatch = {text!r}: must be an option of sbatch, such as --sbatch=--exclusive"


# -------------------------------------------------------------------------------------------------- rendering


def script(
    options: Options,
    name: str,
    runs: Sequence[JobRun],
    place: Place,
    log: Path,
    body: str,
    chain: Path | None,
) -> str:
    """The batch script of one run, or of an array of them.

    ``log``: the folder of the jobs' own logs, which must exist when they start; ``body``: text of
    slurm/pretrain.sbatch; ``chain``: file with the ids of a chain's jobs.
    """
    array = len(runs) > 1
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in _directives(options, name, runs, place, log))]
    lines += [
        f"# Written by tools/submit.py. Slurm makes no folders, and starts no job without: mkdir -p "
        f"{shlex.quote(str(log))}",
        "",
    ]
    lines += _settings(options, place, chain)
    lines += ["MOUNTS=({})".format(" ".join(shlex.quote(folder) for folder in _mounts(options, runs, place)))]
    lines += (
        ["# shellcheck disable=SC2034  # all are read below", "case ${SLURM_ARRAY_TASK_ID:-0} in"]
        if array
        else []
    )
    for number, run in enumerate(runs):
        setting = f"RUN_DIR={shlex.quote(run.run_dir)} ARGUMENTS=({shlex.join(run.arguments)})"
        lines.append(f"{number}) {setting} ;;" if array else setting)
    lines += ['*) echo "no run of number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"] if array else []
    start = body.find(f"\n{BODY}")
    if start < 0:
        raise ConfigError([f"slurm/pretrain.sbatch: has no line that begins with {BODY!r}"])
    return "\n".join(lines) + "\n" + body[start:]


def _directives(
    options: Options, name: str, runs: Sequence[JobRun], place: Place, log: Path
) -> Iterator[str]:
    array = len(runs) > 1
    yield f"--job-name={re.sub(r'[^A-Za-z0-9_.+-]', '_', name)}"
    yield f"--nodes={options.nodes}"
    yield f"--ntasks-per-node={options.ranks_per_node}"
    if options.gpus:
        yield f"--gpus-per-node={options.gpus}"
    cores = options.cpus or (CORES if options.gpus else None)
    if cores:
        yield f"--cpus-per-task={cores}"
    yield f"--time={options.time}"
    for key in ("partition", "account", "qos", "constraint"):
        if getattr(options, key):
            yield f"--{key}={getattr(options, key)}"
    yield f"--signal=B:USR1@{options.grace}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--chdir={_quoted(str(place.folder))}"
    yield f"--output={_quoted(str(log).replace('%', '%%') + ('/%A_%a.log' if array else '/%j.log'))}"
    if array:
        yield f"--array=0-{len(runs) - 1}" + (f"%{options.max_parallel}" if options.max_parallel else "")
    if options.chain > 1:
        yield "--kill-on-invalid-dep=yes"
    yield from options.more


def _quoted(path: str) -> str:
    """A path as a #SBATCH line takes it."""
    return f'"{path}"' if re.search(r"\s", path) else path


def _settings(options: Options, place: Place, chain: Path | None) -> Iterator[str]:
    for name, value in (
        ("LAUNCHER", options.launcher),
        ("REPOSITORY", str(place.repository)),
        ("VENV", str(place.environment)),
        ("INTERFACE", options.interface or ""),
        ("CONTAINER", options.container or ""),
        ("CHAIN", str(chain) if chain else ""),
    ):
        yield f"{name}={shlex.quote(value) if value else ''}"


def _mounts(options: Options, runs: Sequence[JobRun], place: Place) -> list[str]:
    """Folders that a container must see: the project, where the runs write and read, and those asked for.

    None inside another.
    """
    wanted = [place.repository, place.folder, *(place.folder / path for run in runs for path in run.folders)]
    wanted += [place.folder / mount for mount in options.mounts]
    mounts: list[Path] = []
    for path in sorted(set(wanted), key=lambda path: (len(path.parts), path)):
        if not any(path.is_relative_to(other) for other in mounts):
            mounts.append(path)
    return [str(path) for path in mounts]
