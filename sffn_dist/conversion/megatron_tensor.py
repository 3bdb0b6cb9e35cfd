"""A tensor of a Megatron checkpoint, and the checkpoint, whichever of Megatron's formats it is in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
    unused: tuple[str, ...] = ()  # what else of tensors is in it, in words


def iteration_of(tree: Mapping[str, Any]) -> int:
    return value if isinstance(value := tree.get("iteration"), int) and 0 <= value < 2**53 else 0


def beside(keys: Iterable[str]) -> tuple[str, ...]:
    """What of these is beside the model, in words: each kind with the number of its tensors."""
    kinds = Counter(
        "Transformer Engine's _extra_state" if "_extra_state" in key else re.split(r"[./]", key)[0]
        for key in keys
        if BESIDE.fullmatch(key)
    )
    return tuple(f"{kind} ({count} entries)" for kind, count in kinds.items())
