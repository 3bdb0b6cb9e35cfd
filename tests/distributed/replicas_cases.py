"""Replicas of an engine's weights, and a bit that flips in one of them; called inside the ranks of a pool."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sffn_dist.health import replica_check
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def flips(
    tree: dict[str, Any],
    precision: str,
    steps: int,
    at: list[tuple[str, str, list[int]]],
    part_all: bool = False,
) -> dict[str, Any]:
    """Trains, then flips a bit in what ``at`` names, one after the other: (parameter, "weight" or "part" or
    "fp32", ranks).

    Of each: None, or the error's message, parameters and ranks. "before" and "after" them no bit is wrong.
    """
    with training.parted() if part_all else contextlib.nullcontext():
        run = training.begin(tree, precision)
        for _ in range(steps):
            training.take(run)
    told: dict[str, Any] = {"before": outcome(run), "flipped": []}
    for name, what, ranks in at:
        with flipped(tensor_of(run.engine, name, what) if run.topology.rank in ranks else None):
            told["flipped"].append(outcome(run))
    with torch.no_grad():
        tensor_of(run.engine, at[0][0], at[0][1]).fill_(float("nan"))
    told["nan"] = outcome(run)
    engines.destroy(run.engine)
    return told


def outcome(run: Any) -> Any:
    try:
        replica_check.check_replicas(
            run.model, engine_state.separate_masters(run.engine), run.config, run.topology
        )
    except replica_check.ReplicasDifferError as error:
        return str(error), list(error.parameters), list(error.ranks)
    return None


def tensor_of(engine: Any, name: str, what: str) -> torch.Tensor:
    """The rank's own memory of a parameter."""
    parameter: Any = dict(engine.module.named_parameters())[name]
    if what == "weight":
        return parameter.data
    if what == "part":
        return parameter.ds_tensor.data
    return next(
        fragment.tensors["weight"] for fragment in engine_state.fragments(engine) if fragment.name == name
    )


@contextlib.contextmanager
def flipped(tensor: torch.Tensor | None) -> Iterator[None]:
    """The lowest bit of the tensor's second element is another one inside."""
    bits = (
        None
        if tensor is None
        else tensor.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    )
    if bits is not None:
        bits[1] ^= 1
    yield
    if bits is not None:
        bits[1] ^= 1
