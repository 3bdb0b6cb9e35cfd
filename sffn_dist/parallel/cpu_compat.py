"""The host without CUDA: what megatron-core and DeepSpeed need so that the same model runs on gloo.

megatron-core asks ``torch.cuda.current_device()`` for its buffers, forks a CUDA random state and waits for
CUDA before it writes a checkpoint; :func:`prepare` answers for the CPU. With CUDA it chooses the rank's
device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from sffn_dist.spec import machine
from sffn_dist.spec.config import ConfigError


class CpuRandomTracker:
    """Megatron's random-state tracker over torch's CPU generator: named states, one swapped in while
    forked.
    """

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self._states.clear()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the named state inside; an unknown name starts from torch's initial seed."""
        outside = torch.get_rng_state()
        torch.set_rng_state(
            self._states.get(name, torch.Generator().manual_seed(torch.initial_seed()).get_state())
        )
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def has_cuda() -> bool:
    """True if this rank runs on a CUDA device."""
    return torch.cuda.is_available() and machine.devices_suffice(
        torch.cuda.device_count(), machine.ranks_here()
    )


def device() -> torch.device:
    """This rank's device."""
    if has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def prepare() -> None:
    """Make megatron-core run without CUDA; idempotent.

    Raises ConfigError where the driver offers CUDA and torch cannot use it.
    """
    if machine.cuda_capability() and not has_cuda():
        raise ConfigError(
            [
                f"torch {torch.__version__} cannot use the CUDA device(s) that the driver shows; install a "
                f"build for this driver, "
                "or hide them: CUDA_VISIBLE_DEVICES= "
            ]
        )
    if has_cuda():
        torch.cuda.set_device(device())
        return
    from megatron.core.tensor_parallel import random as megatron_random

    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    # its checkpoint writer waits for copies; here they are done when they return
    cuda.synchronize = lambda device=None: None
    state: Any = megatron_random
    if not isinstance(state._CUDA_RNG_STATE_TRACKER, CpuRandomTracker):
        state._CUDA_RNG_STATE_TRACKER = CpuRandomTracker()
        state._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def seed(value: int) -> None:
    """Seed every generator; on CUDA with Megatron's offsets between tensor-parallel ranks."""
    torch.manual_seed(value)
    if has_cuda():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(value)
