"""Count steps of runs as rank 0 of many, on fake CUDA: ``trace.py LIBRARY < requests > counts``.

The engine is made and trained by ``engines.create`` and ``train_step`` as in a run; only torch's process
group, its device and its attention are stand-ins (device.py). Requests and counts are JSON lists. A request
has ``tree`` (a config), ``world`` (ranks), ``guided``, and ``bucket`` (elements that ZeRO reduces at once;
or null: a run's own). Its counts are ``micro``, those of each micro-step from the call of the loss to the
next one, of the last one to the end of its backward pass, and ``update``, the rest of the step. Each step
is counted in a process of its own, which this one forks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# before the counted step: DeepSpeed's timers start after two, ZeRO 3 prefetches by what the first one showed
WARM_UP = 2


def count(tree: dict[str, Any], world: int, guided: bool, bucket: int | None) -> dict[str, Any]:
    """The counts of one step; torch must believe in a device."""
    # second on its node, and shown one device alone, as by Slurm's --gpus-per-task
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    os.environ["SLURM_LOCALID"] = "1"
    import torch.distributed as dist
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
    from fake_cuda.counting import Counting, Counts
    from sffn_kernels import dispatch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from sffn_dist import model as models
    from sffn_dist.parallel import cpu_compat, topology
    from sffn_dist.spec import loading, schedule
    from sffn_dist.training import engine as engines
    from sffn_dist.training.bad_steps import BadSteps
    from sffn_dist.training.run import TrainingRun
    from sffn_dist.training.step import train_step

    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = lambda _: None

    class Mode(FakeTensorMode):
        avoid_device_init = True  # type: ignore[assignment]

    class Watch:
        """Where the run's watchdog is told that a micro-step begins."""

        def tick(self, *_: Any) -> None:
            marks.begin()

    class Marks:
        """Which part of a step is counted into what."""

        def __init__(self) -> None:
            self.micro: list[Counts] = []
            self.update = Counts()

        def begin(self) -> None:
            self.micro.append(Counts())
            counting.counts = self.micro[-1]

        def end(self) -> None:
            counting.counts = self.update

    class Batches:
        """Of a run: token 0 everywhere."""

        tokens = range(10**6)

        def at(self, *_: Any, micro_batch_size: int) -> Iterator[Any]:
            import numpy as np

            parts = config.accumulation_steps(ranks.data_parallel_size)
            return np.zeros((parts, micro_batch_size, config.model.sequence + 1), dtype=np.int64)  # type: ignore[return-value]

    config = loading.from_tree(tree)
    precision = "bf16" if config.zero.stage else "fp32"  # stage 0 is refused in bf16
    if bucket:
        engines.reduce_bucket = lambda *_, **__: bucket
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    cpu_compat.prepare()
    ranks = topology.groups(config.parallel.tensor)
    dispatch.use("torch")
    marks = Marks()
    groups = {"tensor": ranks.tensor_group, "data": ranks.data_group, "world": dist.group.WORLD}
    with Mode(allow_non_fake_inputs=True), Counting(groups) as counting:
        model = models.build(config, precision, ranks, guide=guided)
        engine = engines.create(model, config, precision, ranks)
        del model
        run = TrainingRun(
            config, precision, schedule.build_schedule(config), ranks, Batches(), None, "", None,  # type: ignore[arg-type]
            BadSteps(config.guards, HERE), engine, 0, watchdog=Watch(),  # type: ignore[arg-type]
        )  # fmt: skip
        backward = engine.backward

        def last_ends(loss: Any) -> Any:
            result = backward(loss)
            if engine.is_gradient_accumulation_boundary():
                marks.end()
            return result

        engine.backward = last_ends
        for _ in range(WARM_UP):
            train_step(run)
        marks = Marks()
        marks.end()
        result = train_step(run)
        assert result.skip_reason is None
    return {"micro": [micro.row() for micro in marks.micro], "update": marks.update.row()}


def in_child(request: dict[str, Any]) -> dict[str, Any]:
    """:func:`count` in a process that is forked for it, before any other has started threads."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            with os.fdopen(writes, "w") as answer:
                json.dump(count(**request), answer)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(writes)
    with os.fdopen(reads) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"no counts of {request}: see stderr")
    return dict(json.loads(text))


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    from fake_cuda import device

    os.environ.pop("DS_ACCELERATOR", None)  # "cpu", of a test session that has trained
    device.load_guard(Path(sys.argv[1]))
    requests, out = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the answer
    device.pretend()
    import sffn_dist.training.step  # noqa: F401  (what every child needs)

    with os.fdopen(out, "w") as answers:
        json.dump([in_child(request) for request in requests], answers)


if __name__ == "__main__":
    main()
