"""Where a run starts: at step 0 from its seed, at step 0 from another run's weights, or after its newest checkpoint."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from sffn_dist import model as models
from sffn_dist.checkpoint import manifest as manifests
from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.store import Reader
from sffn_dist.config import Config
from sffn_dist.parallel.topology import Topology
from sffn_dist.shapes import is_guide
from sffn_dist.training import engine as engines
from sffn_dist.training import phases, state
from sffn_dist.training.run import Run


def start(run: Run, found: Manifest | None) -> None:
    """Give the run its engine, in the phase of its first step, and its weights, moments and step: those of ``found``, or of a start."""
    config, topology = run.config, run.topology
    run.step = found.step if found else 0
    model = models.build(config, run.precision, topology, guide=run.schedule.guided(run.step))
    prepare_weights(model, config, topology, found)
    run.engine = engines.create(model, config, run.precision, topology)
    restore(run.engine, found, config, topology)
    if found is None and models.has_guide(model):
        phases.start_guides(run)


@torch.no_grad()
def load_weights(model: GPTModel, manifest: Manifest, config: Config, topology: Topology) -> None:
    """The run's own weights, guides included."""
    reader = Reader(manifest, config)
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.local(name, topology))


@torch.no_grad()
def start_from(model: GPTModel, manifest: Manifest, config: Config, topology: Topology) -> None:
    """Another run's weights (``init_from``) without its guides."""
    reader = Reader(manifest, config)
    for name, parameter in model.named_parameters():
        if not is_guide(name):
            parameter.copy_(reader.local(name, topology))


def prepare_weights(model: GPTModel, config: Config, topology: Topology, found: Manifest | None) -> None:
    """Set the model's weights: those of ``found``, the run's newest checkpoint, or those of a start."""
    if found is not None:
        load_weights(model, found, config, topology)
    elif config.init_from:
        start_from(model, manifests.find("init_from", config.init_from), config, topology)
    else:
        models.initialise(model, config, topology)


def restore(engine: state.Engine, found: Manifest | None, config: Config, topology: Topology) -> None:
    """fp32 weights, moments and step counts into a fresh engine, bit for bit.

    A start from another run takes its weights in fp32 too: the engine's own masters were made from what the model holds, maybe bf16.
    """
    if found is not None:
        Reader(found, config).restore(state.fragments(engine), topology)
        state.set_step_counts(engine, found.optimizer_steps, found.guide_optimizer_steps)
    elif config.init_from:
        own = (fragment for fragment in state.fragments(engine) if not is_guide(fragment.name))
        Reader(manifests.find("init_from", config.init_from), config).restore(own, topology, kinds=("weight",))
