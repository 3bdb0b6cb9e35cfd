"""Write a run as a batch script for Slurm, or several as an array or a chain; with --submit hand it to
sbatch.

python tools/submit.py --config configs/wide_lowrank_l.json --nodes 2 --gpus-per-node 8 --time 1-00:00:00
[key.path=value ...] python tools/submit.py --sweep slurm/sweep.json --max-parallel 4 --nodes 1
--gpus-per-node 8 --time 8:00:00 --submit

Without --submit nothing is written or sent: the script goes to standard output, what it means to standard
error. Every run is checked first. slurm/README.md tells of the rest.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import sffn_dist
from sffn_dist.cluster import job, runs, sweep
from sffn_dist.launch import checks
from sffn_dist.launch.error_output import print_errors
from sffn_dist.spec.config import ConfigError

REPOSITORY = Path(sffn_dist.__file__).resolve().parents[1]
FAILED, REFUSED = 1, 2  # exit codes


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="JSON config of the run")
    parser.add_argument(
        "--sweep", type=Path, metavar="FILE", help="JSON file of many runs: one array of jobs"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="of each run (default %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="G", help="one rank each; 0: ranks on CPUs"
    )
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="default: the GPUs")
    parser.add_argument(
        "--cpus-per-rank", type=int, metavar="C", help="default: 8 with GPUs, else the cluster's"
    )
    parser.add_argument(
        "--time", required=True, metavar="T", help="limit of one start: minutes, H:M:S or D-H:M:S"
    )
    for name in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{name}", help="as sbatch takes it")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other: --sbatch=--exclusive"
    )
    parser.add_argument(
        "--launcher",
        choices=job.LAUNCHERS,
        default="srun",
        help="what starts the ranks (default %(default)s)",
    )
    parser.add_argument("--container", metavar="IMAGE", help="a .sif file: by apptainer; else by pyxis")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="DIR",
        help="for the container, besides what runs need",
    )
    parser.add_argument(
        "--interface", metavar="IF", help="of NCCL and gloo (default: the one that leads to the other nodes)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="warning before the limit (default %(default)s)",
    )
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each going on where the one before stopped"
    )
    parser.add_argument("--max-parallel", type=int, metavar="K", help="runs of a sweep at a time")
    parser.add_argument("--submit", action="store_true", help="submit it")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="of the config; in a sweep of all of them"
    )
    return parser


def options_of(args: argparse.Namespace) -> job.Options:
    """The options, checked; raises ConfigError."""
    container = args.container
    if container and container.endswith(".sif"):
        container = str(Path(container).absolute())
    options = job.Options(
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        ranks=args.ranks_per_node,
        cpus=args.cpus_per_rank,
        time=args.time,
        launcher=args.launcher,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        container=container,
        mounts=tuple(args.mount),
        interface=args.interface,
        grace=args.grace,
        chain=args.chain,
        max_parallel=args.max_parallel,
        more=tuple(args.sbatch),
    )
    job.check(options, arrays=args.sweep is not None)
    return options


def runs_of(args: argparse.Namespace, options: job.Options) -> tuple[str, list[runs.JobRun], Path]:
    """(name of the job, its runs, folder of its own logs); every run is checked. Raises ConfigError."""
    if args.sweep:
        plan = sweep.read(args.sweep, args.config)
        return (
            plan.name,
            sweep.expand(plan, args.overrides, options.world),
            Path("runs", plan.name, "logs").absolute(),
        )
    if not args.config:
        raise ConfigError(["--config: missing; name the run's config, or a sweep with --sweep"])
    run = runs.read(Path(args.config).stem, args.config, args.overrides)
    checks.check_run(run.config, options.world)
    return run.name, [run], Path(run.run_dir, "logs").absolute()


def describe(options: job.Options, job_runs: Sequence[runs.JobRun], log: Path) -> None:
    """What the script will do, to standard error."""
    devices = "GPU" if options.gpus else "CPU"
    allocation = (
        f"{options.nodes} node(s) x {options.ranks_per_node} {devices} ranks by {options.launcher}, "
        f"{options.time} a start"
    )
    prefix = f"{len(job_runs)} runs, " if len(job_runs) > 1 else ""
    print(f"{prefix}{allocation}; job logs in {log}", file=sys.stderr)
    for run in job_runs:
        print(f"  {run.name}: run.dir {run.run_dir}", file=sys.stderr)
    tensor = job_runs[0].config.parallel.tensor
    if options.ranks_per_node % tensor and options.nodes > 1:
        print(
            f"  note: parallel.tensor = {tensor} spans nodes of {options.ranks_per_node} ranks",
            file=sys.stderr,
        )


def submit(text: str, options: job.Options, chain: Path | None) -> int:
    """Hand the script to sbatch, once for each job of a chain; the exit code."""
    ids: list[str] = []
    for number in range(options.chain):
        # a chain's next job starts when this one ends before its run does
        dependency = [f"--dependency=afternotok:{ids[-1]}"] if ids else []
        try:
            completed = subprocess.run(
                ["sbatch", "--parsable", *dependency], input=text, capture_output=True, text=True, check=False
            )
        except OSError as error:
            print_errors(
                "submit.py", [f"sbatch cannot be run: {error.strerror}; submit where Slurm's commands are"]
            )
            return FAILED
        if completed.returncode:
            prefix = f"job {number + 1} of {options.chain}: " if options.chain > 1 else ""
            reasons = [
                f"{prefix}{line}" for line in completed.stderr.strip().splitlines() or ["no reason given"]
            ]
            submitted = [f"already submitted: {' '.join(ids)}"] if ids else []
            print_errors("submit.py", [*reasons, *submitted])
            return FAILED
        ids.append(completed.stdout.strip().split(";")[0])
        if chain:
            chain.write_text(" ".join(ids) + "\n", encoding="utf-8")
        print(ids[-1], flush=True)
    return 0


def write(args: argparse.Namespace) -> int:
    """Print or submit; the exit code. Raises ConfigError for bad input."""
    options = options_of(args)
    name, job_runs, log = runs_of(args, options)
    chain = log / f"chain_{secrets.token_hex(4)}.txt" if options.chain > 1 else None
    place = job.Place(REPOSITORY, Path(sys.prefix), Path(os.getcwd()))
    body = (REPOSITORY / "slurm" / "pretrain.sbatch").read_text(encoding="utf-8")
    text = job.script(options, name, job_runs, place, log, body, chain)
    describe(options, job_runs, log)
    if not args.submit:
        print(text, end="")
        jobs = f", {options.chain} times with --dependency=afternotok:<the one before>" if chain else ""
        print(
            f"nothing was submitted: --submit does mkdir -p {shlex.quote(str(log))} and sbatch{jobs}",
            file=sys.stderr,
        )
        return 0
    try:
        log.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"run.dir: {log} cannot be made: {error.strerror}"]) from None
    return submit(text, options, chain)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where sbatch refused; 2 where the input is refused, before anything is
    submitted.
    """
    args = arguments().parse_intermixed_args(argv)
    try:
        return write(args)
    except ConfigError as error:
        print_errors("submit.py", error.problems)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
