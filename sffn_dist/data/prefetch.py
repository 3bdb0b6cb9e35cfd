"""A step's batches, read by a thread while the step before is computed.

On CUDA they come in pinned memory: the copy to the device is queued there like any other work, where one from
pageable memory would let the host wait for all that was queued before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Read = Callable[[], ArrayLike]


class Prefetch:
    """What is read ahead, one step at most, by a key; a key that was not read ahead is read when it is taken.

    So what was expected may be wrong: after a rollback, another step follows.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._reading: _Reading | None = None

    def start(self, key: Hashable, read: Read) -> None:
        """Read in a thread of its own."""
        self._reading = _Reading(key, lambda: self._read(read))
        self._reading.start()

    def take(self, key: Hashable, read: Read) -> Tensor:
        """What was read under this key, or is read now; raises what reading raised."""
        reading, self._reading = self._reading, None
        return reading.result() if reading and reading.key == key else self._read(read)

    def _read(self, read: Read) -> Tensor:
        tokens = torch.from_numpy(np.ascontiguousarray(read()))
        if self._device.type != "cuda":
            return tokens
        torch.cuda.set_device(self._device)  # a new thread has the first one
        return tokens.pin_memory()


class _Reading(threading.Thread):
    def __init__(self, key: Hashable, read: Callable[[], Tensor]):
        super().__init__(name="prefetch", daemon=True)  # a disk that hangs must not keep a run from ending
        self.key = key
        self._read = read
        self._out: Tensor | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._out = self._read()
        except BaseException as error:
            self._error = error

    def result(self) -> Tensor:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._out is not None
        return self._out
