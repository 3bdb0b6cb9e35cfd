"""The pre-flight on real ranks, with one rank that is wrong in some way; called inside the ranks of a
pool.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sffn_dist.health import collective_check, consistency, preflight
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.config_keys import flatten


def join(tensor: int) -> topology.Topology:
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return topology.groups(tensor)


def agreed(tree: dict[str, Any], odd: dict[int, dict[str, Any]]) -> list[str]:
    """What the check says where ranks of ``odd`` hold other facts, or under "overrides" other settings."""
    join(1)
    mine = odd.get(dist.get_rank(), {})
    config = loading.from_tree({**tree, **mine.get("overrides", {})})
    facts = {**consistency.facts(config, "fp32"), "host": f"n{dist.get_rank() // 2}", **mine.get("facts", {})}
    try:
        hosts, warnings = consistency.check_consistency(facts, flatten(config))
    except ConfigError as error:
        return list(error.problems)
    return [*hosts, *warnings]


def group_limits(tree: dict[str, Any]) -> set[float]:
    """Seconds that a collective of Megatron's groups may take."""
    config = loading.from_tree(tree)
    join(1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    made = topology.groups(config.parallel.tensor, topology.collective_timeout(config))
    cpu = torch.device("cpu")
    limits = {
        group._get_backend(cpu).options._timeout.total_seconds()
        for group in (made.tensor_group, made.data_group)
    }
    parallel_state.destroy_model_parallel()
    return limits


def folder(folders: list[str], hosts: list[str], late: float = 0.0, upper: str | None = None) -> list[str]:
    """What the check of the shared folder says; each rank has its own of ``folders``.

    ``late``: seconds that each file comes up later. ``upper``: where rank 1's writes go, as on an overlay
    over the shared folder.
    """
    join(1)
    mine, rank = Path(folders[dist.get_rank()]), dist.get_rank()
    write = consistency._write

    def elsewhere(path: Path, token: str) -> str | None:
        time.sleep(late)
        return write(Path(upper) / path.name if upper and rank == 1 else path, token)

    consistency._write = elsewhere
    try:
        consistency.check_shared_folder(mine, hosts, patience=0.5)
    except ConfigError as error:
        return list(error.problems)
    finally:
        consistency._write = write
    return [f"rank {rank} sees it"]


def measured(
    tensor: int,
    hosts: list[str],
    clock_off: dict[int, float] | None = None,
    slow: int | None = None,
    corrupt: str | None = None,
) -> dict[str, Any]:
    """The report.

    ``clock_off``: seconds by rank; ``slow``: a rank at half speed; ``corrupt``: a collective, one bit wrong
    on rank 1.
    """
    here = join(tensor)
    off = (clock_off or {}).get(here.rank, 0.0)
    usual = collective_check.KINDS.copy()

    def rate(device: torch.device, precision: str, seconds: float) -> float:
        return 1e9 if here.rank == slow else 2e9

    if corrupt and here.rank == 1:
        collective_check.KINDS[corrupt] = lambda at: spoilt(*usual[corrupt](at))
    try:
        found = preflight.measure(
            preflight.RankFacts(tuple(hosts), "cpu"),
            here,
            "fp32",
            now=lambda: time.time() + off,
            **({"rate": rate} if slow is not None else {}),
        )
    except ConfigError as error:
        return {"refused": list(error.problems)}
    finally:
        collective_check.KINDS.update(usual)
    return {"row": found.row(), "text": found.text(), "errors": [error for _, error in found.clocks]}


def spoilt(
    run: collective_check.RunCollective, right: collective_check.CheckResult
) -> tuple[collective_check.RunCollective, collective_check.CheckResult]:
    """The collective, after which one bit of whatever it gave this rank is another one."""
    held = [cell.cell_contents for cell in run.__closure__ or ()]
    tensors = [tensor for tensor in held if isinstance(tensor, torch.Tensor)]

    def wrong() -> None:
        run()
        for tensor in tensors:
            tensor.view(torch.int32)[tensor.numel() // 2] ^= 1

    return wrong, right


def flight(tree: dict[str, Any]) -> dict[str, Any]:
    """All of it as a run does it; how long each part took."""
    config = loading.from_tree(tree)
    here = join(config.parallel.tensor)
    consistency.code()
    dist.barrier()
    began = time.perf_counter()
    found = preflight.check_ranks(config, "fp32")
    agreed_in = time.perf_counter() - began
    report = preflight.measure(found, here, "fp32")
    return {
        "agree": agreed_in,
        "measure": report.seconds,
        "text": report.text(),
        "left": sorted(p.name for p in Path(config.run.dir).iterdir()),
    }
