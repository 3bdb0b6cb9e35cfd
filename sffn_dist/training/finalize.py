"""The end of a run: evaluation of the finished model, a sample of its text, the table, ``summary.json``."""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from typing import Any

from sffn_dist import model as models
from sffn_dist import strict_json
from sffn_dist.atomic_io import write_text
from sffn_dist.checkpoint import run_folder
from sffn_dist.data.shards import Corpus
from sffn_dist.inference.evaluation import EvaluationResult
from sffn_dist.inference.generation import sample
from sffn_dist.launch import exit_codes
from sffn_dist.launch.signals import Stop, flush_stdout
from sffn_dist.spec import counts, schedule
from sffn_dist.telemetry import metrics
from sffn_dist.telemetry.progress import format_duration
from sffn_dist.training.hooks.checkpoint import finished_save, save
from sffn_dist.training.hooks.evaluate import evaluate_run
from sffn_dist.training.run import TrainingRun

log = logging.getLogger(__name__)


def finalize(run: TrainingRun, corpus: Corpus) -> None:
    """Evaluate, sample, report; every rank must call it."""
    result = evaluate_run(run)
    with run.interruption.allowed(run.step, "a sample of its text"):
        text = sample_text(run, corpus)
    run.interruption.close()
    run.signals.finished = True
    if run.reports is None:
        return
    run.reports.close()
    numbers = {**summary(run, result, corpus.meta.unigram_entropy), "sample": text}
    print(table(numbers, run), flush=True)
    try:
        write_text(run.dir / "summary.json", strict_json.dumps(numbers, indent=1) + "\n")
    except OSError as error:  # the run is over and printed: a full disk takes only this file
        log.warning("summary.json not written: %s", error)
    run.watchdog.stop()  # a tracker may take minutes to send the rest, and nobody waits for it
    run.reports.trackers.finish(numbers)
    sys.stdout.flush()


def finalize_stopped(run: TrainingRun, stop: Stop) -> None:
    """The run stopped before its last step, its state is saved: the record of the end reports it to a job
    script, the trackers close.
    """
    reason = f"stopped by {stop.name} after step {run.step} of {run.schedule.total_steps}"
    if run.reports is None:
        return
    exit_codes.record(stop.exit_code, reason)
    run.reports.close()
    run.reports.trackers.finish({"stopped": reason})


def stop_in_time(run: TrainingRun, store: Any) -> None:
    """From here on stop signals are noted, and the state is saved before guards.stop_seconds are over.

    All ranks must call it.
    """
    run.signals.defer(run.config.guards.stop_seconds)
    run.interruption.start(
        store, run.topology, run.signals, functools.partial(end_interrupted, run), lambda: run.saver.seconds
    )


def end_interrupted(run: TrainingRun, stop: Stop, doing: str) -> None:
    """A stop within a step, an evaluation or a sample (interruption.py): save, report, end this process.

    Called beside the main thread, on every rank.
    """
    position, code = f"after step {run.step} of {run.schedule.total_steps}", stop.exit_code
    path = finished_save(run)
    if run.step > run.start_step and (path is None or run_folder.step_of(path) != run.step):
        save(run)
        path = finished_save(run)
    if path is None and run.step > run.start_step:
        code = exit_codes.FAILED
        reason = f"stopped by {stop.name} {position}, whose state could not be saved in {run.dir}"
    else:
        reason = f"stopped by {stop.name} {position}, within {doing}, which was given up; "
        reason += f"saved in {path}" if path else "nothing had been trained since this start"
    if run.reports:
        run.tell("stopped", reason, signal=stop.name)
        exit_codes.record(code, reason)
    run.watchdog.stop()
    if run.reports:
        run.reports.close()
        run.reports.trackers.finish({"stopped": reason})
    flush_stdout()
    os._exit(code)


def sample_text(run: TrainingRun, corpus: Corpus) -> str:
    """``sample.prompt`` and what the structure alone makes of it."""
    config = run.config
    models.unset_guide(run.model)
    begin = [] if corpus.meta.bos is None else [corpus.meta.bos]  # as training put it
    prompt = begin + corpus.tokenizer.encode(config.sample.prompt, add_special_tokens=False).ids
    prompt = prompt or [corpus.meta.end_of_text]
    ids = sample(
        run.model,
        run.watchdog.with_progress(models.token_logits, "sample", run.step),
        prompt,
        config.sample.tokens,
        context=config.model.sequence,
        vocab=corpus.meta.vocab,
        temperature=config.sample.temperature,
        seed=config.train.seed,
        topology=run.topology,
        stop=corpus.meta.end_of_text,
    )
    return str(corpus.tokenizer.decode(ids))


def summary(run: TrainingRun, evaluation: EvaluationResult, unigram_entropy: float) -> dict[str, Any]:
    """What the run came to; seconds and tokens/s over the steps of all its starts, by metrics.jsonl."""
    try:
        rows = metrics.read(run.dir / "metrics.jsonl")
    except OSError:
        rows = []
    seconds = sum(row["seconds"] for row in rows)
    tokens = run.config.tokens_per_step
    return {
        "heldout_loss": evaluation.loss,
        "unigram_entropy": unigram_entropy,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "bits_per_byte_estimated": evaluation.bytes_estimated,
        "tokens_per_s": tokens * len(rows) / seconds if seconds else math.nan,
        "seconds": seconds,
        "steps": run.step,
        "tokens": run.step * tokens,
        "epochs": schedule.epochs(run.config, len(run.batches.tokens), run.step),
        "parameters": counts.parameters(run.config),
        "precision": run.precision,
        "ranks": {
            "world": run.topology.world_size,
            "tensor": run.topology.tensor_parallel_size,
            "data": run.topology.data_parallel_size,
        },
    }


def table(numbers: dict[str, Any], run: TrainingRun) -> str:
    """The summary as a page for a terminal."""
    estimated = numbers["bits_per_byte_estimated"]
    sign, note = ("~", ", an estimate: the corpus holds no bytes of its tokens") if estimated else ("", "")
    rows = [
        ("held-out loss", f"{numbers['heldout_loss']:.4f} nats a token"),
        ("unigram entropy", f"{numbers['unigram_entropy']:.4f} nats a token, of the held-out tokens"),
        ("perplexity", f"{numbers['perplexity']:.2f}"),
        ("bits per byte", f"{sign}{numbers['bits_per_byte']:.4f}{note}"),
        (
            "steps",
            f"{numbers['steps']}, {numbers['tokens']:,} tokens, {numbers['epochs']:.3g} passes over the data",
        ),
        (
            "speed",
            f"{numbers['tokens_per_s']:,.0f} tokens/s, {format_duration(numbers['seconds'])} of "
            f"training steps",
        ),
        ("written to", f"{run.dir}/ (metrics.jsonl, evaluations.jsonl, summary.json, checkpoints/)"),
    ]
    lines = "\n".join(f"  {name:<16} {text}" for name, text in rows)
    return f"\n{lines}\n\nsample:\n{numbers['sample']}"
