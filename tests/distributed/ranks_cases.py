"""Steps of a real engine with the recorder beside them, one rank slowed down; called inside the ranks of a
pool.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sffn_dist import model as models
from sffn_dist.health import stragglers
from sffn_dist.training import engine as engines

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


def recorded(
    tree: dict[str, Any], steps: int, slow: dict[int, tuple[float, float]], run_dir: str
) -> dict[str, Any]:
    """The report after some steps; ``slow``: by rank, seconds that its batches and its forward passes take
    longer.
    """
    run = training.begin(tree)
    here = run.topology
    late_data, late_forward = slow.get(here.rank, (0.0, 0.0))
    recorder = stragglers.StepTimers(here.device)

    def slowly(batches: Any) -> Iterator[torch.Tensor]:
        for batch in batches:
            time.sleep(late_data)
            yield torch.from_numpy(batch)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        value = models.token_losses(run.engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()
        time.sleep(late_forward)
        recorder.forwarded()
        return value

    for step in range(steps):
        micro = run.batches.at(
            step,
            here.data_parallel_rank,
            here.data_parallel_size,
            micro_batch_size=run.config.train.micro_batch_size,
        )
        recorder.begin()
        engines.train_batch(run.engine, loss, recorder.data(slowly(micro)), run.config.train.clip)
        with recorder.waiting():
            dist.all_reduce(torch.zeros(1))
        recorder.end()
    rows = stragglers.report(recorder, here, run.config.tokens_per_step, "fp32")
    if here.is_rank_zero:
        stragglers.write(Path(run_dir), steps, rows)
    engines.destroy(run.engine)
    return {"rows": [asdict(row) for row in rows], "text": stragglers.render(rows)}
