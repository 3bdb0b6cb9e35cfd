"""Train variants of one config on the same data to the same FLOPs, or the same steps; a table and a plot of
what they came to.

python tools/compare.py --config configs/compare.json --variants dense,dense_narrow,low_rank,low_rank+guide
--seeds 0,1,2

A variant reads kind[:size=number ...][+guide]: dense, dense_narrow (as few feed-forward parameters as the
structured one), low_rank, block_dense, block_shuffle; sizes not written are the config's own, or those of as
many feed-forward parameters. The same command continues a comparison that was stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sffn_dist
from sffn_dist import atomic_io, strict_json
from sffn_dist.comparison import curves, summary, variants
from sffn_dist.launch import checks
from sffn_dist.launch.error_output import print_errors
from sffn_dist.launch.ports import free_port
from sffn_dist.spec import loading, machine, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.disk_errors import DiskError, explained
from sffn_dist.telemetry.progress import format_duration

PRETRAIN = Path(sffn_dist.__file__).absolute().parent / "pretrain.py"
FAILED, REFUSED = 1, 2  # exit codes
LAST_LINES = 15  # of a failed run's log
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ComparisonRun:
    """A variant with a seed, in its folder."""

    entry: variants.PlannedVariant
    seed: int
    config: Config
    overrides: tuple[str, ...]

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def name(self) -> str:
        return f"{self.entry.label} seed {self.seed}"

    def result(self) -> summary.Result:
        return summary.read(self.entry, self.seed, self.dir)


@dataclass
class RunningProcess:
    """A run under way: its process, the place it takes among the jobs, when it began."""

    run: ComparisonRun
    process: subprocess.Popen[bytes]
    place: int
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


# ------------------------------------------------------------------------------------------- before the first


def planned(args: argparse.Namespace) -> tuple[list[variants.PlannedVariant], list[ComparisonRun]]:
    """What will be trained; raises ConfigError with whatever is wrong in any variant, run or option."""
    seeds = variants.seeds(args.seeds)
    entries = variants.planned_variants(
        args.config, args.overrides, variants.parse(args.variants), args.equal
    )
    problems: list[str] = []
    runs = []
    for seed in seeds:
        for entry in entries:
            folder = args.out / entry.variant.folder / f"seed_{seed}"
            own = (f"train.seed={seed}", f"run.dir={folder}")
            overrides = loading.merge_overrides(entry.overrides, own)
            run = ComparisonRun(entry, seed, loading.load(args.config, overrides), overrides)
            try:
                check(run.config, max(1, args.gpus))
            except ConfigError as error:
                problems += [f"variant {run.name}: {problem}" for problem in error.problems]
            runs.append(run)
    if problems:
        raise ConfigError(problems)
    return entries, runs


def check(config: Config, ranks: int) -> None:
    """What pretrain.py refuses on this machine before it imports torch; raises ConfigError."""
    try:
        validation.check_world(config, ranks)
    except ConfigError as error:
        raise ConfigError(
            [f"{problem}; --gpus sets the ranks of a run" for problem in error.problems]
        ) from None
    checks.check_run(config, ranks)


def origin(world: int) -> dict[str, str]:
    """Where a run's figures come from."""
    revision = subprocess.run(
        ["git", "-C", str(PRETRAIN.parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    device, torch = machine.device_name(world), importlib.metadata.version("torch")
    return {"device": device, "torch": torch, "revision": revision.stdout.strip()}


# ---------------------------------------------------------------------------------------------------- running


def command(run: ComparisonRun, args: argparse.Namespace, place: int) -> list[str]:
    """The run as it is started: by itself, or by deepspeed on devices of its own where there are enough
    for all jobs.
    """
    script = [str(PRETRAIN), "--config", args.config, *run.overrides]
    if not args.gpus:
        return [sys.executable, *script]
    launcher = Path(sys.executable).with_name("deepspeed")
    cuda = machine.cuda()
    devices = ",".join(str(place * args.gpus + i) for i in range(args.gpus))
    apart = args.jobs > 1 and cuda is not None and cuda[0] >= args.jobs * args.gpus
    placement = ["--include", f"localhost:{devices}"] if apart else ["--num_gpus", str(args.gpus)]
    port = free_port()
    return [
        str(launcher) if launcher.exists() else "deepspeed",
        *placement,
        "--master_port",
        str(port),
        *script,
    ]


def environment(args: argparse.Namespace) -> dict[str, str]:
    """A run's: the cores shared among jobs and ranks, no launcher but this one."""
    variables = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // (args.jobs * max(1, args.gpus)))))
    if not args.gpus:
        variables["LOCAL_RANK"] = "0"  # a run started by a launcher ends with it, also where that was killed
    return variables


def start(run: ComparisonRun, args: argparse.Namespace, place: int) -> RunningProcess:
    """Start a run; its output goes to log.txt in its folder, after what an earlier start wrote there."""
    run.dir.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(run.dir / summary.ORIGIN, strict_json.dumps(origin(max(1, args.gpus))) + "\n")
    with (run.dir / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command(run, args, place), stdout=log, stderr=subprocess.STDOUT, env=environment(args)
        )
    return RunningProcess(run, process, place, time.monotonic())


def train_all(runs: Sequence[ComparisonRun], args: argparse.Namespace) -> list[ComparisonRun]:
    """Train ``runs``, ``args.jobs`` at a time, with a line for each that ends; returns those that failed."""
    waiting, under_way, failed = list(runs), list[RunningProcess](), list[ComparisonRun]()
    places, done = list(range(args.jobs)), list[tuple[int, float]]()
    try:
        while waiting or under_way:
            while waiting and places:
                try:
                    under_way.append(start(waiting[0], args, places[0]))
                    places.pop(0)
                except OSError as error:
                    print(f"{waiting[0].name}: FAILED, cannot be started: {error}", flush=True)
                    failed.append(waiting[0])
                waiting.pop(0)
            job = next((job for job in under_way if job.process.poll() is not None), None)
            if job is None:
                time.sleep(0.1)
                continue
            under_way.remove(job)
            places.append(job.place)
            if tell(job, f"[{len(runs) - len(waiting) - len(under_way)}/{len(runs)}]"):
                done.append((job.run.entry.flops, job.seconds))
            else:
                failed.append(job.run)
            if done and (waiting or under_way):
                running = [(other.run.entry.flops, other.seconds) for other in under_way]
                left = summary.seconds_left(done, [run.entry.flops for run in waiting], running, args.jobs)
                print(f"    about {format_duration(left)} left", flush=True)
    finally:
        stop(under_way)
    return failed


def stop(under_way: Sequence[RunningProcess]) -> None:
    """End what still runs; each can be continued from its last checkpoint."""
    for job in under_way:
        job.process.terminate()
    for job in under_way:
        job.process.wait()


def tell(job: RunningProcess, count: str) -> bool:
    """Print what a run that ended came to; False if it failed."""
    run, code = job.run, job.process.returncode
    problem = f"ended with exit code {code}"
    if code == 0:
        try:
            result = run.result()
            print(
                f"{count} {run.name}: held-out loss {result.loss:.4f}, {format_duration(job.seconds)}",
                flush=True,
            )
            return True
        except (OSError, ValueError, KeyError) as error:
            problem = f"left no readable result: {error}"
    log = run.dir / "log.txt"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    print(f"{count} {run.name}: FAILED, {problem}; the end of {log}:")
    print("\n".join(f"    {line}" for line in last), flush=True)
    return False


# ---------------------------------------------------------------------------------------------------- results


def report(
    entries: Sequence[variants.PlannedVariant], runs: Sequence[ComparisonRun], args: argparse.Namespace
) -> None:
    """Table, rows, curves and plot of the runs that there are, variants in the order asked for."""
    results = [run.result() for entry in entries for run in runs if run.entry is entry]
    table = summary.markdown(summary.table_rows(results))
    atomic_io.write_text(args.out / "comparison.md", table + "\n")
    atomic_io.write_text(
        args.out / "comparison.csv", summary.csv_text([summary.run_row(result) for result in results])
    )
    atomic_io.write_text(args.out / "curves.csv", summary.csv_text(summary.curve_rows(results)))
    if args.plot:
        title = f"{Path(args.config).stem}, equal {args.equal}, seeds {args.seeds}"
        curves.draw(summary.curves(results), args.out / "comparison.png", title)
    print(
        f"\n{table}\n\nwritten to {args.out}/ (comparison.md, comparison.csv, "
        f"curves.csv{', comparison.png' * args.plot})"
    )


def compare(args: argparse.Namespace) -> int:
    """The comparison; the exit code. Raises ConfigError for bad input."""
    entries, runs = planned(args)
    base = loading.load(args.config, args.overrides)
    print(
        summary.markdown([summary.plan_row(entry, variants.reference_flops(base)) for entry in entries]),
        flush=True,
    )
    if args.plan:
        return 0
    if args.plot and not curves.can_draw():
        raise ConfigError(["the plot needs matplotlib: pip install 'sffn_dist[plot]', or say --no-plot"])
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--out {args.out}: cannot be made: {error.strerror}"]) from None
    todo = [run for run in runs if not summary.finished(run.dir, run.config)]
    print(f"\n{len(todo)} of {len(runs)} runs to train, {args.jobs} at a time, into {args.out}/", flush=True)
    failed = train_all(todo, args)
    good = [run for run in runs if run not in failed]
    if good:
        with explained("--out", args.out):
            report(entries, good, args)
    if failed:
        print_errors(
            "compare.py",
            [f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.name for run in failed)}"],
        )
    return FAILED if failed else 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON config; its ffn section gives the sizes"
    )
    parser.add_argument("--variants", required=True, metavar="V,V", help=variants.GRAMMAR)
    parser.add_argument(
        "--equal",
        choices=("flops", "steps"),
        default="flops",
        help="what variants have in common with dense (default %(default)s)",
    )
    parser.add_argument(
        "--seeds", default="0", metavar="N,N", help="values of train.seed (default %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default %(default)s)"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="ranks a run, by deepspeed (default: one, without)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default runs/<name of the config file>_comparison"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be trained, and stop")
    parser.add_argument(
        "--no-plot", dest="plot", action="store_false", help="draw nothing, matplotlib is not needed"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="of the config, for all variants"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where runs failed; 2 where the input is refused, before the first run."""
    # so that runs under way are ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = arguments()
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1 or args.gpus < 0:
        parser.error(f"--jobs {args.jobs} --gpus {args.gpus}: must be at least 1 and 0")
    args.out = args.out or Path("runs") / f"{Path(args.config).stem}_comparison"
    try:
        return compare(args)
    except ConfigError as error:
        print_errors("compare.py", error.problems)
        return REFUSED
    except DiskError as error:
        print_errors("compare.py", [str(error)])
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
