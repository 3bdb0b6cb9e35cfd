"""A run, read top to bottom: ranks -> data -> start -> model -> engine -> resume -> train -> finalize.

    deepspeed sffn_dist/pretrain.py --config configs/demo.json [key.path=value ...]
    python sffn_dist/pretrain.py --config configs/demo.json --plan [--json]

Bad input is refused before torch is imported, by one rank, with exit code 2 (launch/cli.py).
"""

from __future__ import annotations

import os
import sys

# Started as a script, Python puts this folder first on the path, where `data` or `model` would shadow others'
# modules.
if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sffn_dist.launch import cli, exit_codes
from sffn_dist.spec import machine, schedule
from sffn_dist.spec.config import Config

if TYPE_CHECKING:
    from sffn_dist.health.watchdog import Watchdog
    from sffn_dist.launch.signals import SignalHandler


def pretrain(config: Config, watchdog: Watchdog, signals: SignalHandler) -> int:
    """The run itself, on every rank; returns its exit code."""
    from sffn_dist import model as models
    from sffn_dist.checkpoint.writer import Saver
    from sffn_dist.data import prepare, shards
    from sffn_dist.data.batches import Batches
    from sffn_dist.data.ranks import Ranks
    from sffn_dist.health import preflight
    from sffn_dist.launch import run_identity
    from sffn_dist.parallel import cpu_compat, kernel_choice
    from sffn_dist.parallel import topology as topologies
    from sffn_dist.training import engine as engines
    from sffn_dist.training import finalize, loop, micro_batch, reporting, resume
    from sffn_dist.training.bad_steps import BadSteps
    from sffn_dist.training.run import TrainingRun

    train, run_dir, precision = config.train, Path(config.run.dir), machine.precision(config.precision)

    # ranks
    store = topologies.init_process_group(topologies.collective_timeout(config))
    rank_facts = preflight.check_ranks(config, precision)
    config = micro_batch.resolve(config)
    ranks = Ranks(store, *topologies.rank_and_world())
    watchdog.start(store, ranks.rank, ranks.world, config.guards, run_dir)

    # data: prepared by the first rank of each file system where they are not
    with watchdog.waiving_hangs("preparing data"):
        corpus = shards.open_corpus(prepare.prepare(config, ranks))
    config = cli.resolve_epochs(config, corpus.meta.train.tokens)
    run_schedule = schedule.build_schedule(config)
    run_identity.check_identity(config, corpus.meta.fingerprint)
    heldout = corpus.heldout_sample(config.model.sequence, config.evaluation_sequences)

    # groups, and whether all ranks work
    topology = topologies.init_parallel(config)
    preflight_report = preflight.run(rank_facts, topology, precision, measures=config.guards.preflight)
    kernel_choice.start(config.kernels, topology)
    cpu_compat.seed(train.seed)

    # where the weights come from: a checkpoint of the run, another model's, the seed
    bad_steps = BadSteps(config.guards, run_dir)
    resume.require_equal_records(run_dir, corpus.meta.fingerprint, bad_steps)
    checkpoint, tokenizer = resume.latest_good_checkpoint(run_dir, topology), corpus.folder / "tokenizer.json"
    start = resume.find_start(config, topology, tokenizer, checkpoint)
    bad_steps.reset(start.recent_losses)
    config = resume.continue_data(config, start, corpus.meta.fingerprint)
    saver, first_sample = Saver(run_dir, config, topology, tokenizer), config.init_from.first_sample
    batches = Batches(corpus.train, config.model.sequence, train.global_batch_size, train.seed, first_sample)

    # model, engine, weights and optimizer state
    model = models.build(config, precision, topology, guide=run_schedule.guided(start.step))
    if start.from_seed:
        models.initialise(model, config, topology, watchdog.tick)
    engine = engines.create(model, config, precision, topology)
    resume.load_state(engine, config, topology, start)
    del model  # the run owns its engine alone: a phase boundary frees both

    reports = reporting.open_reports(config, precision, topology, start.step, corpus.meta.fingerprint)
    run = TrainingRun(
        config=config,
        precision=precision,
        schedule=run_schedule,
        topology=topology,
        batches=batches,
        heldout=heldout,
        data_fingerprint=corpus.meta.fingerprint,
        saver=saver,
        bad_steps=bad_steps,
        engine=engine,
        step=start.step,
        reports=reports,
        watchdog=watchdog,
        signals=signals,
    )
    del engine
    reporting.report_start(run, checkpoint.folder if checkpoint else None, preflight_report)

    finalize.stop_in_time(run, store)
    try:
        stop = loop.train(run)
    finally:
        run.saver.wait(10.0)  # whatever ends the training, a save that is being written may still be finished

    if stop:
        finalize.finalize_stopped(run, stop)
    else:
        finalize.finalize(run, corpus)
    watchdog.stop()
    topologies.destroy()
    return stop.exit_code if stop else exit_codes.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.main(argv, pretrain)


if __name__ == "__main__":
    cli.end_process(main())
