"""A run, read top to bottom: config -> topology -> model -> data -> engine -> loop.

    deepspeed sffn_dist/pretrain.py --config configs/demo.json [key.path=value ...]
    python sffn_dist/pretrain.py --config configs/demo.json --plan [--json]

Bad input is refused before torch is imported, by one rank, with exit code 2.
"""

from __future__ import annotations

import os
import sys

# Started as a script, Python puts this folder first on the path, where `data`, `config` or `model` would shadow others' modules.
if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

import argparse
import faulthandler
import json
import logging
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sffn_dist.launch import environment, exit_codes, launcher_watch, run_lock
from sffn_dist.spec import loading, machine, validation
from sffn_dist.spec.config import Config, ConfigError

if TYPE_CHECKING:
    from sffn_dist.health.watchdog import Watchdog


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
    parser.add_argument("--preflight", action="store_true", help="compare all ranks, try every collective, and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(argv)
    if options.json and not options.plan:
        parser.error("--json goes with --plan")
    return options


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors: one rank speaks for all."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; see --help"])


def started_ranks(otherwise: int) -> int:
    """Ranks that the launcher started; ``otherwise`` without one. Raises ConfigError if WORLD_SIZE is no number of ranks."""
    text = os.environ.get("WORLD_SIZE", str(otherwise))
    if not text.isdecimal() or not int(text):
        raise ConfigError([f"environment variable WORLD_SIZE = {text!r}: must be the number of ranks"])
    return int(text)


def refuse_bad_input(options: argparse.Namespace) -> Config:
    """Everything that can be wrong and is cheap to see, before torch is imported; raises ConfigError."""
    config = loading.load(options.config, options.overrides)
    # --plan assumes one data-parallel replica where nothing was started
    validation.check_world(config, started_ranks(config.parallel.tensor if options.plan else 1))
    from sffn_dist.checkpoint import manifest
    from sffn_dist.data import metadata
    from sffn_dist.launch import run_identity
    from sffn_dist.telemetry.trackers import check_trackers

    metadata.check_source(config.data, config.model.vocab)
    check_trackers(config.logging)
    if not options.plan:
        reason = machine.triton_unavailable() if config.kernels == "triton" else None
        if reason:
            raise ConfigError([f"kernels = triton: {reason}"])
        prepared = metadata.locate(config)
        run_identity.check_identity(config, metadata.read_meta(prepared).fingerprint if metadata.is_usable(prepared) else None)
    if config.init_from and manifest.latest_checkpoint(Path(config.run.dir)) is None:
        run_identity.check_source_of_weights(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; launch/exit_codes.py says what each means."""
    main_rank, watch = environment.is_rank_zero(), None
    try:
        environment.set_rank_variables()
        launcher_watch.watch_launcher()
        options = arguments(argv)
        config = refuse_bad_input(options)
        if config.parallel.tensor > 1:
            # Megatron's linears count on one queue: a collective started before a product then runs before it, and overlaps.
            # The driver reads it once, when the plan first asks for devices.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        from sffn_dist.spec.plan import plan, render

        if options.plan or main_rank:
            numbers = plan(config, started_ranks(config.parallel.tensor))
            print(json.dumps(numbers, indent=1) if options.plan and options.json else render(numbers), flush=True)
        if options.plan:
            return exit_codes.DONE
        lock = run_lock.RunLock(Path(config.run.dir))
        if main_rank and not options.preflight:
            lock.acquire()
        _quieten()
        faulthandler.enable()  # a crash in C code shows where in Python it came from
        from sffn_dist.health.watchdog import Watchdog

        watch = Watchdog()
        return preflight_alone(config, watch) if options.preflight else pretrain(config, watch)
    except ConfigError as error:
        if not main_rank:
            # a launcher ends all ranks once one has gone: rank 0 speaks first, and for all
            time.sleep(3.0)
        if watch:  # a rank may have a fault of its own now: a folder that its node does not see, say
            return watch.fail(error)
        # another node may see other files: its first rank speaks too, unless rank 0's word has ended it by now
        where = "" if main_rank else f"rank {os.environ.get('RANK')} on {platform.node()}: "
        for problem in error.problems if main_rank or os.environ.get("LOCAL_RANK") == "0" else ():
            print(f"pretrain.py: error: {where}{problem}", file=sys.stderr)
        sys.stderr.flush()
        exit_codes.record(exit_codes.REFUSED, error.problems[0])
        return exit_codes.REFUSED
    except Exception as error:
        if watch is None:
            raise
        return watch.fail(error)


def preflight_alone(config: Config, watch: Watchdog) -> int:
    """Compare all ranks, try every collective, and stop; returns the exit code."""
    from sffn_dist.health import preflight

    preflight.preflight_only(config, watch)
    return exit_codes.DONE


def pretrain(config: Config, watch: Watchdog) -> int:
    """The run itself; returns its exit code."""
    import numpy as np

    from sffn_dist.checkpoint import manifest
    from sffn_dist.checkpoint.writer import Saver
    from sffn_dist.data import prepare, shards
    from sffn_dist.data.batches import Batches, heldout_batches
    from sffn_dist.health import preflight
    from sffn_dist.launch import run_identity
    from sffn_dist.parallel import cpu_compat, kernel_choice, topology
    from sffn_dist.spec import schedule
    from sffn_dist.training import finalize, loop, reporting, resume
    from sffn_dist.training.bad_steps import BadSteps
    from sffn_dist.training.run import Heldout, Run

    precision, train, run_dir = machine.precision(config.precision), config.train, Path(config.run.dir)
    metadata = topology.init_process_group(max(1800.0, 2 * config.guards.hang_seconds))
    agreed = preflight.check_ranks(config, precision)
    corpus = shards.open_corpus(prepare.prepare(config))
    run_identity.check_identity(config, corpus.meta.fingerprint)
    batches = Batches(corpus.train, config.model.sequence, train.global_batch_size, train.seed)
    windows = list(heldout_batches(corpus.heldout, config.model.sequence, config.evaluation_sequences, 64))

    here = topology.init_parallel(config)
    watch.start(metadata, here.rank, here.world, config.guards, run_dir)
    tried = agreed.report() if here.world == 1 or not config.guards.preflight else preflight.measure(agreed, here, precision)
    kernel_choice.start(config.kernels, here)
    cpu_compat.seed(train.seed)
    seen, bad_steps = manifest.latest_checkpoint(run_dir), BadSteps(config.guards, run_dir)
    topology.require_equal(
        {
            "data fingerprint": corpus.meta.fingerprint,
            "step of the newest checkpoint": seen.step if seen else None,
            "steps to pass over": sorted(bad_steps.passed),
        }
    )
    run = Run(
        config=config,
        precision=precision,
        schedule=schedule.build_schedule(config),
        topology=here,
        batches=batches,
        heldout=Heldout(np.concatenate(windows), corpus.token_bytes),
        data_fingerprint=corpus.meta.fingerprint,
        saver=Saver(run_dir, config, here, corpus.folder / "tokenizer.json"),
        bad_steps=bad_steps,
        watch=watch,
    )
    found = resume.newest(run_dir, here)
    resume.start(run, found)
    if here.main:
        reporting.begin(run, found.folder if found else None, tried)
    run.signals.catch()
    try:
        stop = loop.train(run)
    finally:
        run.saver.wait(10.0)  # whatever ends the training, a save that is being written may still be finished
    if stop:
        finalize.finalize_stopped(run, stop)
    else:
        finalize.finalize(run, corpus)
    watch.stop()
    topology.destroy()
    return exit_codes.for_signal(stop) if stop else exit_codes.DONE


def _quieten() -> None:
    """Keep a run's page readable: progress of our own at INFO, warnings that no user can act on left out."""
    # c10d tells each broken connection of a rank that has gone, with its C++ stack; errors it still tells
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("sffn_dist").setLevel(logging.INFO)
    for module in ("megatron", "torch", "deepspeed"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|transformer_engine|Transformer Engine|flash).*")


if __name__ == "__main__":
    sys.exit(main())
