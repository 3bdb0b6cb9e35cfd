"""How ranks find each other: one key-value store, at MASTER_ADDR:MASTER_PORT, and word from every rank that
it is there.

Rank 0 serves the store; under torchrun its agent does. The process group is made over it, and the watch
(health/watchdog.py) keeps word through it of who is alive, beside the collectives.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from sffn_dist.launch import ports
from sffn_dist.launch.ports import RendezvousError
from sffn_dist.spec.config import ConfigError

# seconds that a rank may come later than the first: nodes boot containers and read an environment from a slow
# disk
RENDEZVOUS_TIMEOUT = 600.0


def connect(rank: int, world: int, patience: float = RENDEZVOUS_TIMEOUT) -> Any:
    """The store, once all ``world`` ranks are there.

    Raises RendezvousError where the port is taken, the address cannot be reached in ``patience`` seconds, or
    ranks are missing by then: with their numbers, on rank 0. ConfigError where MASTER_PORT is no port.
    """
    if world == 1:
        return HashStore()
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError([f"environment variable MASTER_PORT = {port!r}: must be a port number"])
    store = _connect(host, int(port), rank, patience)
    # it outlives the ranks: those that it starts again must not read the words of those before
    if _agent_serves():
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        _wait_for_all(store, rank, world, patience)
    except dist.DistError as error:  # its server is gone
        raise RendezvousError(
            [f"MASTER_ADDR = {host}: rank 0 went before all ranks were there ({_first_line(error)})"]
        ) from None
    return store


def _connect(host: str, port: int, rank: int, patience: float) -> Any:
    serves = rank == 0 and not _agent_serves()
    timeout = datetime.timedelta(seconds=patience)
    try:
        return TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise RendezvousError([ports.taken_port(port)]) from None
        rule = (
            f"{platform.node()} cannot reach it in {patience:g} seconds ({_first_line(error)}); rank 0 must "
            f"run there"
        )
        raise RendezvousError([f"MASTER_ADDR = {host}, MASTER_PORT = {port}: {rule}"]) from None


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _wait_for_all(store: Any, rank: int, world: int, patience: float) -> None:
    store.set(f"here/{rank}", platform.node())
    if rank:  # rank 0 has the last word: it knows who is missing
        try:
            store.wait(["everyone is here"], datetime.timedelta(seconds=patience + 30.0))
        except dist.DistStoreError:
            raise RendezvousError(
                [f"not all of {world} ranks were there after {patience:g} seconds; rank 0 knows which"]
            ) from None
        return
    deadline, missing = time.monotonic() + patience, list(range(world))
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            raise RendezvousError([_absent(missing, world, patience, store)])
        time.sleep(0.05)
    store.set("everyone is here", "")


def _absent(missing: list[int], world: int, patience: float, store: Any) -> str:
    hosts = sorted({store.get(f"here/{rank}").decode() for rank in range(world) if rank not in missing})
    names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    return (
        f"rank {names} of {world} did not come in {patience:g} seconds; there are {world - len(missing)}, "
        f"on {', '.join(hosts)}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
