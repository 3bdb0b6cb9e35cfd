"""``train.micro_batch_size = auto``: which number that is. Standard library only.

On CUDA devices the largest divisor of the sequences that a data-parallel rank has in a step,

    train.global_batch_size / data-parallel ranks,

whose memory (memory.py; while the guide lasts, if it does) is at most the device's. On a CPU, whose memory
says nothing of its speed, the largest one that is at most 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sffn_dist.spec import machine, schedule, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.memory import memory_per_rank

ON_CPU = 8


@dataclass(frozen=True)
class Target:
    """What a run is planned for: ranks, precision, and the bytes of the smallest rank's CUDA device, None on
    CPUs.
    """

    data_parallel: int
    precision: str
    device_memory: int | None


def target_of(config: Config, world: int, device_memory: int | None = None) -> Target:
    """Of ``world`` ranks on this machine, or on CUDA devices with bf16 units and so many bytes.

    Raises ConfigError where the precision does not have the ZeRO stage.
    """
    local_ranks = machine.ranks_here(otherwise=world)
    precision = machine.precision(config.precision, local_ranks)
    if device_memory is None:
        device_memory = machine.device_memory(local_ranks)
    elif config.precision == "auto":
        precision = "bf16"
    validation.check_precision(config, precision)
    return Target(max(1, world // config.parallel.tensor), precision, device_memory)


def with_size(config: Config, size: int) -> Config:
    """The config with this number."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": size})})


def memory(config: Config, target: Target, guide: bool | None = None) -> dict[str, int]:
    """memory_per_rank of the target; without ``guide`` in the phase that takes the most."""
    if guide is None:
        guide = schedule.build_schedule(config).guided_steps > 0
    device = target.device_memory is not None
    return memory_per_rank(config, target.precision, target.data_parallel, guide=guide, device=device)


def sizes(config: Config, data_parallel: int) -> Iterator[int]:
    """Numbers that are possible, the largest first."""
    share = config.train.global_batch_size // data_parallel
    return (size for size in range(share, 0, -1) if share % size == 0)


def largest_that_fits(config: Config, target: Target) -> int | None:
    """The largest possible number whose memory the device has; None if not even one sequence fits."""
    for size in sizes(config, target.data_parallel):
        if (
            target.device_memory is None
            or memory(with_size(config, size), target)["total"] <= target.device_memory
        ):
            return size
    return None


@dataclass(frozen=True)
class ChosenSize:
    """A number, and why it is that."""

    size: int
    reason: str


def choose(config: Config, target: Target) -> ChosenSize:
    """What ``auto`` is. Raises ConfigError where not even one sequence fits the device."""
    share = config.train.global_batch_size // target.data_parallel
    of = f"the {share} sequences that a rank has in a step"
    if target.device_memory is None:
        size = next(size for size in sizes(config, target.data_parallel) if size <= ON_CPU)
        return ChosenSize(size, f"on a CPU the largest divisor, at most {ON_CPU}, of {of}")
    fitting = largest_that_fits(config, target)
    if fitting is None:
        needed = memory(with_size(config, 1), target)["total"]
        raise ConfigError(
            [
                f"train.micro_batch_size = auto: one sequence needs about {_gb(needed)}, and the device has "
                f"{_gb(target.device_memory)}; raise parallel.tensor or zero.stage, or set recompute"
            ]
        )
    needed = memory(with_size(config, fitting), target)["total"]
    reason = f"the largest divisor of {of} which fits: about {_gb(needed)} of {_gb(target.device_memory)}"
    return ChosenSize(fitting, reason)


def summary(config: Config, target: Target, reason: str) -> dict[str, Any]:
    """For the plan: the number, why it is that if it was chosen, the largest that fits a device (0: none)."""
    fitting = None if target.device_memory is None else (largest_that_fits(config, target) or 0)
    return {
        "size": config.micro_batch_size,
        "reason": reason,
        "device_memory": target.device_memory,
        "largest_that_fits": fitting,
    }


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """:func:`summary` for a reader, where it was chosen or a device is known."""
    size, fitting = summary["size"], summary["largest_that_fits"]
    text = f"{size} sequence{'s' * (size > 1)}"
    if summary["reason"]:
        yield f"{text}: {summary['reason']}"
    elif fitting:
        yield f"{text}; the largest that fits the device's {_gb(summary['device_memory'])} is {fitting}"
    elif fitting is not None:
        yield f"{text}; not even one fits the device's {_gb(summary['device_memory'])}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
