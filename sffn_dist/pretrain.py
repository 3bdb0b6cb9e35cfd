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
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sffn_dist import config as configs
from sffn_dist.config import Config, ConfigError
from sffn_dist.training import guards

REFUSED = 2


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pre-train a language model with structured feed-forward layers.",
        epilog="Overrides name keys of the config tree: train.steps=100 ffn.kind=low_rank parallel.tensor=2.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON config of the run")
    parser.add_argument("--plan", action="store_true", help="print what the run will be, and stop")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_args(argv)


def ranks(config: Config) -> int:
    """Ranks that were started, or that --plan assumes: one data-parallel replica."""
    return int(os.environ.get("WORLD_SIZE", "0")) or config.parallel.tensor


def refuse_bad_input(options: argparse.Namespace) -> Config:
    """Everything that can be wrong and is cheap to see, before torch is imported; raises ConfigError."""
    config = configs.load(options.config, options.overrides)
    configs.check_world(config, ranks(config) if options.plan else int(os.environ.get("WORLD_SIZE", "1")))
    from sffn_dist.checkpoint.manifest import find, missing_tensors
    from sffn_dist.data import store
    from sffn_dist.shapes import is_guide, model_tensors
    from sffn_dist.telemetry.trackers import check_trackers
    from sffn_dist.training import identity

    store.check_source(config.data, config.model.vocab)
    check_trackers(config.logging)
    if config.init_from:
        wanted = {name: spec.shape for name, spec in model_tensors(config).items() if not is_guide(name)}
        problems = list(missing_tensors(find("init_from", config.init_from), wanted))
        if problems:
            raise ConfigError([f"init_from = {config.init_from!r}: {problem}" for problem in problems[:5]])
    if not options.plan:
        prepared = store.locate(config)
        fingerprint = store.read_meta(prepared).fingerprint if store.is_usable(prepared) else None
        identity.check(config, fingerprint)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    guards.watch_launcher()
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = refuse_bad_input(options)
        from sffn_dist.telemetry.plan import plan, render

        if options.plan or main_rank:
            numbers = plan(config, ranks(config))
            print(json.dumps(numbers, indent=1) if options.plan and options.json else render(numbers), flush=True)
        if options.plan:
            return 0
        lock = guards.RunLock(Path(config.run.dir))
        if main_rank:
            lock.acquire()
        return pretrain(config)
    except ConfigError as error:
        if main_rank:
            for problem in error.problems:
                print(f"pretrain.py: error: {problem}", file=sys.stderr)
            sys.stderr.flush()
        elif not options.plan:
            # a launcher ends all ranks once one has gone: let the one that speaks be the first
            time.sleep(4.0)
        return REFUSED


def pretrain(config: Config) -> int:
    """The run itself."""
    _quieten()
    import numpy as np

    from sffn_dist import machine, schedule
    from sffn_dist import model as models
    from sffn_dist.data import prepare, shards
    from sffn_dist.data.batches import Batches, heldout_batches
    from sffn_dist.parallel import host, topology
    from sffn_dist.telemetry.trackers import Trackers, open_trackers
    from sffn_dist.training import engine, identity, loop, resume

    precision = machine.precision(config.precision)
    corpus = shards.open_corpus(prepare.prepare(config))
    identity.check(config, corpus.meta.fingerprint)

    ranks = topology.start(config)
    host.seed(config.train.seed)
    run_dir = Path(config.run.dir)
    if ranks.main:
        resume.write_json(run_dir / identity.NAME, identity.record(config, corpus.meta.fingerprint))

    gpt = models.build(config, precision, ranks)
    continued = resume.prepare_weights(gpt, config, ranks)
    deepspeed_engine = engine.create(gpt, config, precision, ranks)
    step = resume.restore(deepspeed_engine, continued, config, ranks) if continued else 0

    train = config.train
    run = loop.Run(
        config=config,
        precision=precision,
        schedule=schedule.of(config),
        topology=ranks,
        engine=deepspeed_engine,
        batches=Batches(corpus.train, config.model.sequence, train.global_batch_size, train.seed),
        heldout=loop.Heldout(
            np.concatenate(list(heldout_batches(corpus.heldout, config.model.sequence, config.evaluation_sequences, 64))),
            corpus.token_bytes,
        ),
        data_fingerprint=corpus.meta.fingerprint,
        step=step,
    )
    if ranks.main:
        trackers = open_trackers(config.logging, run_dir, configs.flatten(config), step) if step < train.steps else Trackers()
        run.reports = loop.open_reports(config, ranks, trackers, step)
        if continued:
            run.reports.progress.note(f"continuing at step {step} of {train.steps} from {continued.folder}")
    loop.train(run)
    finish(run, corpus)
    topology.stop()
    return 0


def finish(run: Any, corpus: Any) -> None:
    """Evaluation of the finished model, a sample of its text, the table, summary.json."""
    from sffn_dist import model as models
    from sffn_dist.inference.generation import sample
    from sffn_dist.telemetry import metrics
    from sffn_dist.training import loop, resume

    config = run.config
    result = loop.evaluate_now(run)
    prompt = corpus.tokenizer.encode(config.sample.prompt, add_special_tokens=False).ids or [corpus.meta.end_of_text]
    models.unset_guide(run.model)
    ids = sample(
        run.model,
        models.token_logits,
        prompt,
        config.sample.tokens,
        context=config.model.sequence,
        vocab=corpus.meta.vocab,
        temperature=config.sample.temperature,
        seed=config.train.seed,
        topology=run.topology,
        stop=corpus.meta.end_of_text,
    )
    if run.reports is None:
        return
    run.reports.close()
    numbers = loop.summary(run, result, corpus.meta.unigram_entropy, metrics.read(run.dir / "metrics.jsonl"))
    numbers["sample"] = corpus.tokenizer.decode(ids)
    resume.write_json(run.dir / "summary.json", numbers)
    run.reports.trackers.finish(numbers)
    print(_table(numbers, run), flush=True)


def _table(numbers: dict[str, Any], run: Any) -> str:
    from sffn_dist.telemetry.progress import format_duration

    rows = [
        ("held-out loss", f"{numbers['heldout_loss']:.4f} nats a token"),
        ("unigram entropy", f"{numbers['unigram_entropy']:.4f} nats a token, of the held-out tokens"),
        ("perplexity", f"{numbers['perplexity']:.2f}"),
        ("bits per byte", f"{numbers['bits_per_byte']:.4f}"),
        ("steps", f"{numbers['steps']}, {numbers['tokens']:,} tokens"),
        ("speed", f"{numbers['tokens_per_s']:,.0f} tokens/s, {format_duration(numbers['seconds'])} of training steps"),
        ("written to", f"{run.dir}/ (metrics.jsonl, evaluations.jsonl, summary.json, checkpoints/)"),
    ]
    table = "\n".join(f"  {name:<16} {text}" for name, text in rows)
    return f"\n{table}\n\nsample:\n{numbers['sample']}"


def _quieten() -> None:
    """Keep a run's page readable: progress of our own at INFO, warnings that no user can act on left out."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("sffn_dist").setLevel(logging.INFO)
    for module in ("megatron", "torch", "deepspeed"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|transformer_engine|Transformer Engine|flash).*")


if __name__ == "__main__":
    sys.exit(main())
