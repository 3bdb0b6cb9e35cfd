"""Phases of a run: where the guide comes or goes, the engine is made anew and the run's state goes on bit for
bit.

    plain -> guided     every guide starts as W = to_dense(U, V) of the current fp32 factors, moments and step
                        count at 0 (paper, section 4)
    guided -> plain     the guide's weights, gradients, fp32 copies and moments are gone

ZeRO lays parameters and their fp32 masters out once, when an engine is made: without the guide it needs
another one. The state at step s is that of the phase of s: a boundary is crossed before anything of step s is
evaluated or saved, so a checkpoint holds what its step needs. Each rank keeps its own masters and moments
(engine_state.py), without a collective; the old engine and its model are freed before the new ones are made,
which takes what making them at the start of a run takes (in ZeRO 3, for a moment, the whole model in its own
precision) and less than a guided step does.
"""

from __future__ import annotations

import torch

from sffn_dist import model as models
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state
from sffn_dist.training.engine_state import Engine
from sffn_dist.training.run import TrainingRun


def changes(run: TrainingRun) -> bool:
    """Whether the next step needs other parameters than the engine has.

    Not at the end of the run, where nothing is trained any more: what is saved there leaves a guide out
    (hooks/checkpoint.py).
    """
    if run.step == run.schedule.total_steps:
        return False
    return run.schedule.guided(run.step) != models.has_guide(run.model)


def enter(run: TrainingRun) -> None:
    """Bring the run into the phase of ``run.step``, the next step, if it is not in it.

    All ranks must call it.
    """
    if not changes(run):
        return
    guide, state = run.schedule.guided(run.step), engine_state.export_state(run.engine)

    def build() -> Engine:
        model = models.build(run.config, run.precision, run.topology, guide=guide)
        return engines.create(model, run.config, run.precision, run.topology, state)

    run.replace_engine(build)
    if guide:
        start_guides(run.engine, run.config, run.topology)
    else:
        engine_state.update_model_weights(run.engine)
    if run.reports:
        change = (
            "begins: every guide starts as its factors' product" if guide else "is over: the guide is freed"
        )
        run.reports.progress.note(f"after step {run.step}: the guided phase {change}")


@torch.no_grad()
def start_guides(engine: Engine, config: Config, topology: Topology) -> None:
    """Each guide's fp32 weights, from the factors' fp32 weights, one linear at a time; then the model's.

    All ranks must call it.
    """
    held = {fragment.name: fragment for fragment in engine_state.fragments(engine)}
    specs = model_tensors(config, guide=True)
    for name, part in models.guides(
        config, topology, lambda name: engine_state.full_weight(held, name, specs[name], topology)
    ):
        fragment = held.get(name)
        if fragment is not None:
            fragment.tensors["weight"].copy_(part.view(-1)[fragment.start : fragment.start + fragment.numel])
    engine_state.update_model_weights(engine)
