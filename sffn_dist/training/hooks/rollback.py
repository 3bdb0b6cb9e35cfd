"""Back to a good checkpoint after bad steps in a row: their batches are skipped from then on
(bad_steps.py).
"""

from __future__ import annotations

from sffn_dist import model as models
from sffn_dist.training import engine as engines
from sffn_dist.training import resume
from sffn_dist.training.engine_state import Engine
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import wait_for_save
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class Rollback(Hook):
    """Due after ``guards.rollback_after`` bad steps in a row.

    Raises DivergedError where it has been done often enough.
    """

    rewinds = True

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return run.bad_steps.needs_rollback

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        roll_back(run)


def roll_back(run: TrainingRun) -> None:
    """Start again from the newest checkpoint before the bad steps, or from the start if there is none.

    All ranks must call it.

    The metrics of the steps that are undone go; the events stay.
    """
    config, topology, bad_steps, reached = run.config, run.topology, run.bad_steps, run.step
    first, last = bad_steps.consecutive[0], bad_steps.consecutive[-1]
    limit = bad_steps.begin_rollback()
    run.watchdog.tick("rolling back", run.step)
    wait_for_save(run)  # a slow one must not seem a hang
    checkpoint = resume.latest_good_checkpoint(run.dir, topology, up_to=limit)
    if checkpoint is None and limit < first:  # nothing that far back is kept
        checkpoint = resume.latest_good_checkpoint(run.dir, topology, up_to=first)
    start = resume.find_start(config, topology, run.saver.tokenizer, checkpoint)
    bad_steps.reset(start.recent_losses)

    def build() -> Engine:
        model = models.build(config, run.precision, topology, guide=run.schedule.guided(start.step))
        if start.from_seed:
            models.initialise(model, config, topology, run.watchdog.tick)
        return engines.create(model, config, run.precision, topology)

    run.replace_engine(build)
    resume.load_state(run.engine, config, topology, start)
    bad_steps.record_rollback(start.step)
    if topology.is_rank_zero:
        bad_steps.write()
    run.rewind(start.step)
    source = checkpoint.folder if checkpoint else "the start"
    run.tell(
        "rolled back",
        f"steps {first} to {last} were bad: from step {reached} back to step {run.step}, {source}; "
        "their batches will be skipped",
        first=first,
        last=last,
        reached=reached,
    )
