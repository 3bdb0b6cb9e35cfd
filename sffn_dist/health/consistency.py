"""What must be the same on all ranks, compared before anything long starts: settings, code, versions, and the
folder they write to.

Every rank finds these by itself, so a node with another checkout, another torch or another file behind the
same name would train another model silently. All functions here but :func:`differences` are called by
all ranks together, after the process group was joined; each rank comes to the same verdict, and one that is
refused is refused everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sffn_kernels
import torch
import torch.distributed as dist

import sffn_dist
from sffn_dist.checkpoint import versions
from sffn_dist.parallel import cpu_compat
from sffn_dist.parallel.object_collectives import all_gather_object, broadcast_object
from sffn_dist.spec import machine
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten

# facts: two hashes, of which the keys and the git revision are reported; a name, of which others are odd
# and no more
CONFIG, CODE, DEVICE, UUID = "config", "code", "device", "device uuid"
CORES = "cores"  # the ids of those that a rank may use
FEW_CORES = 4  # of a rank with a device: training, data, saves and the watchdog want one each
FOLDER_TIMEOUT = (
    # seconds for a file to be seen on other nodes: NFS clients cache a folder's listing for 3 s and
    # more
    10.0
)
MAX_NAMED_HOSTS = 4  # hosts named one by one; of more, the first ones and how many there are


# ------------------------------------------------------------------------------------------------------ facts


def facts(config: Config, precision: str) -> dict[str, str]:
    """What is compared: versions, a hash of the code, sha256 of the config as canonical JSON, precision,
    CPU or CUDA, device.
    """
    cuda = cpu_compat.has_cuda()
    rank_facts = {"host": socket.gethostname(), **versions.versions(), "triton": _version("triton")}
    if cuda:
        rank_facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        rank_facts[UUID] = str(torch.cuda.get_device_properties(cpu_compat.device()).uuid)
    canonical = json.dumps(flatten(config), sort_keys=True)
    rank_facts |= {
        CODE: code(),
        CONFIG: hashlib.sha256(canonical.encode()).hexdigest(),
        "precision": precision,
    }
    rank_facts[CORES] = json.dumps(sorted(machine.core_set()))
    rank_facts["computes on"] = "cuda" if cuda else "cpu"
    rank_facts[DEVICE] = device_name()
    return rank_facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name() -> str:
    """Name and compute capability of this rank's CUDA device, or what its CPU is."""
    if not cpu_compat.has_cuda():
        return machine.device_name()
    return "{}, compute capability {}.{}".format(
        torch.cuda.get_device_name(), *torch.cuda.get_device_capability()
    )


@functools.cache
def code() -> str:
    """A hash of the sources that run here.

    (Git is asked only where they differ: its answer may time out on a slow disk.)
    """
    digest = hashlib.sha256()
    for package in (sffn_dist, sffn_kernels):
        assert package.__file__
        folder = Path(package.__file__).parent
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_consistency(mine: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(hosts by rank, warnings) where all ranks have the same :func:`facts`.

    Their ``settings`` are asked for only where configs differ.

    Raises ConfigError on every rank, one problem for each fact and dotted key that differs, with the values
    and who has them.
    """
    gathered = all_gather_object(dict(mine))
    hosts = [rank_facts.pop("host") for rank_facts in gathered]
    uuids = [rank_facts.pop(UUID, None) for rank_facts in gathered]
    cores = [frozenset(json.loads(rank_facts.pop(CORES))) for rank_facts in gathered]
    if problems := shared_devices(hosts, uuids):
        raise ConfigError(problems)
    differing = differences(gathered, hosts)
    if differing.pop(CONFIG, None):
        differing |= {
            f"config: {key}": text
            for key, text in differences(all_gather_object(dict(settings)), hosts).items()
        }
    if CODE in differing:
        revisions = all_gather_object(versions.revision() or "unknown")
        code_revisions = [
            {CODE: f"{held[CODE]}, git {revision}"}
            for held, revision in zip(gathered, revisions, strict=True)
        ]
        differing |= differences(code_revisions, hosts)
    odd_devices = differing.pop(DEVICE, None)
    if differing:
        raise ConfigError([f"ranks disagree: {key} = {text}" for key, text in differing.items()])
    warnings = [f"devices differ, the slowest sets the pace: {odd_devices}"] if odd_devices else []
    shares = machine.core_shares(list(zip(hosts, cores, strict=True)))
    few = [rank for rank, uuid in enumerate(uuids) if uuid is not None and shares[rank] < FEW_CORES]
    if few:
        warnings.append(
            f"cores of a rank: {name_ranks(few, hosts)}: as few as {min(shares[rank] for rank in few)}; "
            f"below {FEW_CORES} the host keeps its device waiting; ask for more (Slurm: --cpus-per-task)"
        )
    return hosts, warnings


def differences(gathered: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> dict[str, str]:
    """Of what ranks hold, each key whose values differ -> the values, who holds each, and which are the odd
    ones.

    Values come by how many ranks hold them, most first; where one is held by more ranks than any other, all
    others are odd.
    """
    differing = {}
    for key in sorted({key for held in gathered for key in held}):
        holders: dict[str, list[int]] = {}
        for rank, held in enumerate(gathered):
            value = json.dumps(held[key]) if key in held else "unknown"
            holders.setdefault(value, []).append(rank)
        if len(holders) == 1:
            continue
        ordered = sorted(holders.items(), key=lambda item: -len(item[1]))
        usual = len(ordered[0][1]) > len(ordered[1][1])
        parts = [
            f"{value} on {name_ranks(ranks, hosts)}{', the odd one' if usual and index else ''}"
            for index, (value, ranks) in enumerate(ordered)
        ]
        differing[key] = "; ".join(parts)
    return differing


def shared_devices(hosts: Sequence[str], uuids: Sequence[str | None]) -> list[str]:
    """A problem for each CUDA device that several ranks of one host have.

    Parts of a device, by MIG, have uuids of their own.
    """
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, (host, uuid) in enumerate(zip(hosts, uuids, strict=True)):
        if uuid is not None:
            holders.setdefault((host, uuid), []).append(rank)
    return [
        f"{name_ranks(ranks, hosts)} have one CUDA device, {uuid}: each rank needs its own; start as many "
        "ranks as there are devices, and look at CUDA_VISIBLE_DEVICES and Slurm's --gpus-per-task, --gpu-bind"
        for (_, uuid), ranks in holders.items()
        if len(ranks) > 1
    ]


def name_ranks(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """Ranks by their hosts, as ``n1, n2 (ranks 0-15)``."""
    ranks = sorted(ranks)
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(names) - MAX_NAMED_HOSTS} more" if len(names) > MAX_NAMED_HOSTS else ""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{', '.join(names[:MAX_NAMED_HOSTS])}{more} (rank{'s' if len(ranks) > 1 else ''} {spans})"


# ----------------------------------------------------------------------------------------------------- folder


def check_shared_folder(folder: Path, hosts: Sequence[str], patience: float = FOLDER_TIMEOUT) -> None:
    """Let every rank read a token that rank 0 writes into ``folder``, and rank 0 one of each other host.

    Nothing is left there.

    Raises ConfigError on every rank naming the folder and who does not see it, or cannot write there.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    token, path = broadcast_object((secrets.token_hex(8), str(folder)))
    # a name not looked up before: a client keeps the answer that there is no such file for a while
    files = {hosts.index(name): folder / f".preflight-{token}-{hosts.index(name)}" for name in hosts}
    try:
        refuse = [broadcast_object(_write(files[0], token) if rank == 0 else None)]
        if refuse[0] is None:
            refuse = _both_ways(rank, files, token, hosts, patience)
    finally:
        with contextlib.suppress(OSError, KeyError):
            files[rank].unlink()
    if problems := [f"run.dir = {path!r}: {problem}" for problem in refuse if problem]:
        raise ConfigError(problems)


def _both_ways(
    rank: int, files: Mapping[int, Path], token: str, hosts: Sequence[str], patience: float
) -> list[str]:
    """What is wrong, the same list on every rank: rank 0's file is looked for by all, and a file of each
    host by rank 0.
    """
    visible = _wait_for(files[0], token, patience)
    failed = _write(files[rank], token) if visible and rank in files and rank > 0 else None
    answers = all_gather_object((visible, failed))
    blind = [other for other, (saw, _) in enumerate(answers) if not saw]
    problems = []
    if blind:
        problems.append(
            f"not the same folder on all nodes: a file of {hosts[0]} is not seen on "
            f"{name_ranks(blind, hosts)}"
        )
    problems += [
        f"{problem} (on {name_ranks([other], hosts)})"
        for other, (_, problem) in enumerate(answers)
        if problem
    ]
    lost: list[int] = []
    if rank == 0:
        deadline = time.monotonic() + patience
        wrote = [other for other in files if other > 0 and answers[other] == (True, None)]
        lost = [
            other
            for other in wrote
            if not _wait_for(files[other], token, max(0.0, deadline - time.monotonic()))
        ]
    lost = broadcast_object(lost)
    if lost:
        problems.append(f"what {name_ranks(lost, hosts)} writes there is not seen on {hosts[0]}")
    return problems


def _write(path: Path, token: str) -> str | None:
    """Write the token, to the disk; what went wrong, if anything."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def _wait_for(path: Path, token: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, ValueError):
            if path.read_text(encoding="ascii") == token:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
