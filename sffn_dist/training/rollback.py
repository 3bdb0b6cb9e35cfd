"""Back to a good checkpoint: the run's state is what it was there, and what went wrong since is passed over (bad_steps.py)."""

from __future__ import annotations

from sffn_dist.training import engine as engines
from sffn_dist.training import phases, reporting, resume
from sffn_dist.training.run import Run


def roll_back(run: Run) -> None:
    """Start again from the newest checkpoint before the trouble, or from the start if there is none. All ranks must call it.

    Raises bad_steps.DivergedError where that has been done often enough. The metrics of the steps that are undone go; the events stay.
    """
    bad_steps, reached = run.bad_steps, run.step
    first, last = bad_steps.streak[0], bad_steps.streak[-1]
    limit = bad_steps.begin_rollback()
    run.watch.tick("going back", run.step)
    run.saver.wait()
    found = resume.newest(run.dir, run.topology, up_to=limit)
    if found is None and limit < first:  # nothing that far back is kept
        found = resume.newest(run.dir, run.topology, up_to=first)
    engines.destroy(run.engine)
    run.engine = None
    phases.free(run)
    resume.start(run, found)
    bad_steps.record_rollback(run.step)
    run.evaluated = {step: result for step, result in run.evaluated.items() if step <= run.step}
    if run.topology.main:
        bad_steps.write()
    reporting.begin_again(run)
    source = found.folder if found else "the start"
    run.tell(
        "went back",
        f"steps {first} to {last} were bad: from step {reached} back to step {run.step}, {source}; their batches will be passed over",
        first=first,
        last=last,
        reached=reached,
    )
