"""Time that training waits for a checkpoint, written while it waits or behind it.

One rank, as tools/bench.py starts it.

The state is what ZeRO gives one rank of a model of the paper: fp32 weights and both moments, in the model's
own order and sizes, until there are as many bytes as asked for.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sffn_bench import rows
from sffn_dist import strict_json
from sffn_dist.checkpoint.manifest import KINDS
from sffn_dist.checkpoint.writer import Fragment, Position, Saver
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import model_tensors

ELEMENT = 4 * len(KINDS)  # bytes: weight and moments in fp32
PROVIDERS = ("sync", "async")


def state(config: Config, size: int) -> Iterator[Fragment]:
    """Fragments of the model's tensors, the last one cut, ``size`` bytes in all."""
    left = size // ELEMENT
    for name, spec in model_tensors(config, guide=False).items():
        numel = min(left, math.prod(spec.shape))
        if numel:
            yield Fragment(name, 0, numel, {kind: torch.randn(numel) for kind in KINDS})
        left -= numel


class Saves:
    """Saves by one provider, one after another.

    What each one took, the first one apart: it allocates the staging buffer too.
    """

    def __init__(self, provider: str, folder: Path, config: Config, fragments: list[Fragment]):
        checkpoint = config.checkpoint.model_copy(update={"asynchronous": provider == "async", "keep": 1})
        alone = Topology(0, 1, 1, 0, 1, 0, torch.device("cpu"), None, None)
        self._saver = Saver(folder / provider, config.model_copy(update={"checkpoint": checkpoint}), alone)
        self._fragments, self._step = fragments, 0
        self.stalls: list[float] = []
        self.totals: list[float] = []

    def once(self) -> float:
        """Seconds until training may go on; returns once the checkpoint is on disk.

        Exits where it could not be written.
        """
        self._step += 1
        start = time.perf_counter()
        self._saver.save(Position(self._step, self._step, None, None), self._fragments)
        self.stalls.append(time.perf_counter() - start)
        if self._saver.wait() is None:
            sys.exit("; ".join(self._saver.pop_failures()))
        self.totals.append(time.perf_counter() - start)
        return self.stalls[-1]


def measured(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each provider."""
    torch.set_num_threads(settings["threads"])
    config = loading.load(settings["config"])
    fragments = list(state(config, settings["bytes"]))
    saves = {name: Saves(name, Path(settings["folder"]), config, fragments) for name in PROVIDERS}
    cases: dict[str, Callable[[], float]] = {name: one.once for name, one in saves.items()}
    times = rows.interleaved(cases, settings["repeats"], warmup=1)
    size = ELEMENT * sum(fragment.numel for fragment in fragments)
    shape = {
        "gigabytes": size / 1e9,
        "tensors": len(fragments),
        "threads": settings["threads"],
        "dtype": "float32",
    }
    found = []
    for name, stalls in times.items():
        total = statistics.median(saves[name].totals[1:])
        more = {"first_ms": round(1e3 * saves[name].stalls[0], 3), "total_s": round(total, 3)}
        over = statistics.median(stalls) / statistics.median(times["sync"])
        more |= {"gb_per_s": round(size / 1e9 / total, 3), "over_sync": round(over, 4)}
        found.append(rows.row("checkpoint", name, "save", shape, stalls, **more))
    return found


if __name__ == "__main__":
    print(strict_json.dumps(measured(json.loads(sys.argv[1]))))
