"""A tensor of a Megatron checkpoint, and the checkpoint, whichever of Megatron's formats it is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

# beside the model: the optimiser, random states, the scheduler; and Transformer Engine's records of fp8
# scales
BESIDE = re.compile(
    r"(optimizer|chained_\d+|rng_state|opt_param_scheduler|rerun_state_machine\w*|param_groups)(\..*|/.*)?"
    r"|.*_extra_state.*"
)
NUMBERED = re.compile(r"decoder\.layers\.(\d{1,4})\.(.+)")


@dataclass(frozen=True)
class MegatronTensor:
    """A tensor in a file: its full shape, and how to read it in fp32."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class MegatronCheckpoint:
    """What is in a Megatron checkpoint."""

    folder: Path
    entries: Mapping[str, MegatronTensor]
    arguments: Mapping[str, Any]  # Megatron-LM's command line; empty if it was not kept
    iteration: int


def iteration_of(tree: Mapping[str, Any]) -> int:
    return value if isinstance(value := tree.get("iteration"), int) and 0 <= value < 2**53 else 0
