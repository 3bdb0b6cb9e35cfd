"""Real runs with train.micro_batch_size=auto; called inside the nursery, which forks them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from sffn_dist.spec import machine, micro_batch
from sffn_dist.spec.loading import load

_spec = importlib.util.spec_from_file_location("change_cases", Path(__file__).with_name("change_cases.py"))
assert _spec
assert _spec.loader
change_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(change_cases)


def runs(folder: str) -> dict[str, Any]:
    """Two ranks whose devices differ: rank 0's has room for its whole share, rank 1's for half of it. Then
    one rank, without a device, that goes on with the run.
    """
    place = Path(folder)
    change_cases.write_config(place)
    config = load(place / "tiny.json", ["train.micro_batch_size=auto"])
    target = micro_batch.Target(2, "fp32", 1)
    room = [micro_batch.memory(micro_batch.with_size(config, size), target)["total"] for size in (2, 1)]
    words = ["train.micro_batch_size=auto", "evaluation.sequences=2"]
    usual = machine.device_memory
    machine.device_memory = lambda ranks=None: room[int(os.environ["RANK"])]
    try:
        least = change_cases.start(place, "auto", *words, "train.stop_at_step=2", world=2)
    finally:
        machine.device_memory = usual
    again = change_cases.start(place, "auto", *words, "train.stop_at_step=4")
    return {"least": least, "again": again}
