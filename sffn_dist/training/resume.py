"""Where a run starts: at step 0 from its seed, at step 0 from another run's weights, or after its newest checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from sffn_dist import model as models
from sffn_dist.checkpoint import manifest as manifests
from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.store import Reader
from sffn_dist.config import Config
from sffn_dist.parallel.split import shard
from sffn_dist.parallel.topology import Topology
from sffn_dist.shapes import ffn_structure, is_guide, model_tensors
from sffn_dist.structured.maps import to_dense
from sffn_dist.training import engine as engines


@torch.no_grad()
def load_weights(model: GPTModel, manifest: Manifest, config: Config, topology: Topology) -> None:
    """The run's own weights, guides included."""
    reader = Reader(manifest, config)
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.local(name, topology))


@torch.no_grad()
def start_from(model: GPTModel, manifest: Manifest, config: Config, topology: Topology) -> None:
    """Another run's weights (``init_from``); guides start anew as what the loaded factors stand for."""
    reader, specs = Reader(manifest, config), model_tensors(config)
    for name, parameter in model.named_parameters():
        if not is_guide(name):
            parameter.copy_(reader.local(name, topology))
            continue
        prefix, layer = name.removesuffix("guide"), int(name.split(".")[2])
        factors = {leaf: reader.full(prefix + leaf) for leaf in _factor_names(specs, prefix)}
        dense = to_dense(ffn_structure(config, layer), factors)
        parameter.copy_(shard(dense, specs[name], topology.tensor, topology.tensor_rank))


def _factor_names(specs: dict[str, Any], prefix: str) -> list[str]:
    leaves = [name.removeprefix(prefix) for name in specs if name.startswith(prefix)]
    return [leaf for leaf in leaves if leaf not in ("guide", "bias")]


def prepare_weights(model: GPTModel, config: Config, topology: Topology, found: Manifest | None) -> None:
    """Set the model's weights: those of ``found``, the run's newest checkpoint, or those of a start."""
    if found is not None:
        load_weights(model, found, config, topology)
    elif config.init_from:
        start_from(model, manifests.find("init_from", config.init_from), config, topology)
    else:
        models.initialise(model, config, topology)


def restore(engine: engines.Engine, found: Manifest | None, config: Config, topology: Topology) -> int:
    """fp32 weights, moments and step count into a fresh engine, bit for bit; returns the next step.

    A start from another run takes its weights in fp32 too: the engine's own masters were made from what the model holds, maybe bf16.
    """
    if found is not None:
        Reader(found, config).restore(engines.fragments(engine), topology)
        engines.set_step_count(engine, found.optimizer_steps)
        return found.step
    if config.init_from:
        own = (fragment for fragment in engines.fragments(engine) if not is_guide(fragment.name))
        Reader(manifests.find("init_from", config.init_from), config).restore(own, topology, kinds=("weight",))
    return 0
