"""The command line of pretrain.py: what is refused and who says so, the plan, the run lock, exit codes.

No torch before the run itself.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sffn_dist import strict_json
from sffn_dist.data import overview
from sffn_dist.launch import (
    checks,
    environment,
    exit_codes,
    launcher_watch,
    ports,
    run_changes,
    run_identity,
    run_lock,
)
from sffn_dist.launch.error_output import print_errors
from sffn_dist.launch.signals import SignalHandler, StopRequested, flush_stdout, write_stderr
from sffn_dist.spec import loading, micro_batch
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.disk_errors import DiskError

if TYPE_CHECKING:
    from sffn_dist.health.watchdog import Watchdog

# seconds that other ranks wait before they end: a launcher ends all ranks once one has; rank 0 reports first
REFUSAL_DELAY = 3.0


def main(argv: Sequence[str] | None, pretrain: Callable[[Config, Watchdog, SignalHandler], int]) -> int:
    """Read the command line, refuse bad input, then ``pretrain``; returns the exit code (exit_codes.py)."""
    main_rank, watchdog, signals = environment.is_rank_zero(), None, SignalHandler()
    try:
        environment.set_rank_variables()
        signals.catch()
        launcher_watch.watch_launcher(signals.launcher_gone)
        options = arguments(argv)
        config = load_config(options)
        if main_rank and options.plan:
            size = options.device_memory
            device_memory = None if size is None else int(size * 2**30)
            print_plan(overview.resolve_prepared(config), as_json=options.json, device_memory=device_memory)
        elif main_rank and config.train.steps:  # else train.epochs: pretrain prints it, once data are there
            print_plan(config)
        if options.plan:
            return exit_codes.DONE
        ports.check_port()
        lock = run_lock.RunLock(Path(config.run.dir))
        if main_rank and not options.preflight:
            lock.acquire()
        _prepare_process()
        from sffn_dist.health.watchdog import Watchdog

        watchdog = Watchdog(signals)
        if options.preflight:
            return preflight_only(config, watchdog)
        return pretrain(config, watchdog, signals)
    except ConfigError as error:
        signals.ignore()
        if not main_rank:
            time.sleep(REFUSAL_DELAY)
        return end_refused(error, watchdog, main_rank)
    except (StopRequested, DiskError) as error:
        signals.ignore()
        return watchdog.fail(error) if watchdog else report_end(error, main_rank)
    except Exception as error:
        signals.ignore()
        if watchdog is None:
            raise
        return watchdog.fail(error)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; raises ConfigError where it cannot be read."""
    parser = _Parser(
        prog="pretrain.py",
        description="Pre-train a language model with structured feed-forward layers.",
        epilog="Overrides name keys of the config tree: train.steps=100 ffn.kind=low_rank parallel.tensor=2.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON config of the run")
    parser.add_argument("--plan", action="store_true", help="print what the run will be, and stop")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="with --plan: of the CUDA devices that the plan is for, where this machine has others or none",
    )
    parser.add_argument(
        "--preflight", action="store_true", help="compare all ranks, try every collective, and stop"
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="'key.path=value ...'",
        help="settings that this run goes on with, from its newest checkpoint on; recorded in run.dir",
    )
    # launchers add it
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(argv)
    if options.json and not options.plan:
        parser.error("--json goes with --plan")
    if options.device_memory is not None and not options.plan:
        parser.error("--device-memory goes with --plan")
    if options.device_memory is not None and not 0 < options.device_memory < 2**20:
        parser.error(f"--device-memory {options.device_memory:g}: must be GiB, greater than 0")
    return options


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors: one rank reports for all."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; see --help"])


def started_ranks(default: int) -> int:
    """Ranks that the launcher started; ``default`` without one.

    Raises ConfigError if WORLD_SIZE is no number of ranks.
    """
    text = os.environ.get("WORLD_SIZE", str(default))
    if not text.isdecimal() or not int(text):
        raise ConfigError([f"environment variable WORLD_SIZE = {text!r}: must be the number of ranks"])
    return int(text)


def load_config(options: argparse.Namespace) -> Config:
    """The config, with everything that can be wrong and is cheap to see checked; raises ConfigError."""
    if not options.plan:  # there WORLD_SIZE alone says for how many ranks
        environment.check_variables()
    change = run_changes.overrides(options.change)
    config = loading.load(options.config, [*options.overrides, *change])
    config = run_identity.continue_run(config, change)
    environment.set_driver_variables(config)
    # --plan assumes one data-parallel replica where nothing was started
    ranks = started_ranks(config.parallel.tensor if options.plan else 1)
    checks.check_run(config, ranks, starts=not options.plan)
    if not options.plan:
        checks.check_machine(config)
    return config


def print_plan(config: Config, *, as_json: bool = False, device_memory: int | None = None) -> None:
    """The plan on standard output, as text or as JSON.

    ``device_memory``: bytes of the CUDA devices that it is for, instead of this machine's.
    """
    from sffn_dist.spec.plan import plan, render

    world = started_ranks(config.parallel.tensor)
    target = micro_batch.target_of(config, world, device_memory)
    config, reason = run_identity.choose_micro_batch(config, target)
    numbers = {**plan(config, world, device_memory, reason), "data": overview.overview(config)}
    print(strict_json.dumps(numbers, indent=1) if as_json else render(numbers), flush=True)


def resolve_epochs(config: Config, tokens: int) -> Config:
    """The config with the steps that train.epochs are, now that the data's ``tokens`` are known."""
    if config.train.steps:
        return config
    config = overview.resolve_epochs(config, tokens)
    if environment.is_rank_zero():
        print_plan(config)
    return config


def end_process(code: int) -> NoReturn:
    """Leave with this exit code, after what is registered for the end.

    Without the interpreter's own end, which aborts the process where a daemon thread is in C++ code then
    ("terminate called without an active exception", exit code 134, with everything saved).
    """
    atexit._run_exitfuncs()
    flush_stdout()
    sys.stderr.flush()
    os._exit(code)


def end_refused(error: ConfigError, watchdog: Watchdog | None, main_rank: bool) -> int:
    """The ranks find the same up to the comparison that precedes the watch: one speaks for all.

    Later a rank may have a fault of its own, e.g. a folder that its node does not see; and so may one that
    does not find the others.
    """
    alone = watchdog and (watchdog.started or isinstance(error, ports.RendezvousError))
    return watchdog.fail(error) if watchdog and alone else refuse(error, main_rank)


def refuse(error: ConfigError, main_rank: bool) -> int:
    """Print the problems, once for all ranks, and record the end.

    Another node may see other files: its first rank reports too, unless rank 0's report has ended it by now.
    """
    rank_prefix = "" if main_rank else f"rank {os.environ.get('RANK')} on {platform.node()}: "
    if main_rank or os.environ.get("LOCAL_RANK") == "0":
        print_errors("pretrain.py", (f"{rank_prefix}{problem}" for problem in error.problems))
    code = int(getattr(error, "exit_code", exit_codes.REFUSED))
    exit_codes.record(code, error.problems[0])
    return code


def report_end(error: StopRequested | DiskError, main_rank: bool) -> int:
    """A signal or a failing disk before the ranks had met: say so, once for all ranks, and record the end."""
    if main_rank:
        kind = "" if isinstance(error, StopRequested) else "error: "
        write_stderr(f"pretrain.py: {kind}{error}\n")
    exit_codes.record(error.exit_code, str(error))
    return error.exit_code


def preflight_only(config: Config, watchdog: Watchdog) -> int:
    """Compare all ranks, try every collective, and stop; returns the exit code."""
    from sffn_dist.health import preflight

    preflight.preflight_only(config, watchdog)
    return exit_codes.DONE


def _prepare_process() -> None:
    """Keep a run's page readable: progress of our own at INFO, warnings that no user can act on left out."""
    faulthandler.enable()  # a crash in C code shows where in Python it came from
    # c10d logs each broken connection of a rank that has gone, with its C++ stack; errors it still logs
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        for package in ("sffn_dist", "sffn_kernels"):
            logging.getLogger(package).setLevel(logging.INFO)
    for module in ("megatron", "torch", "deepspeed"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|transformer_engine|Transformer Engine|flash).*")
