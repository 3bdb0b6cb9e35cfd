"""Who started this rank, and what it passes on of the others: torchrun's variables, or Slurm's put into them.

Standard library only.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE), MASTER_ADDR
and MASTER_PORT. Slurm's srun sets names of its own, which :func:`set_rank_variables` translates, so that
``srun --ntasks-per-node=8 python sffn_dist/pretrain.py ...`` is enough.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator, MutableMapping, Sequence

from sffn_dist.launch.ports import rendezvous_port
from sffn_dist.spec import machine
from sffn_dist.spec.config import Config, ConfigError

# from here on step ids are Slurm's names for the batch script, an allocation's shell, ...
_RESERVED_STEPS = 0xFFFFFFF0
_MOST_HOSTS = 1_000_000
_SIOCGIFADDR = 0x8915
BLACKWELL = (10, 0)  # compute capability


# --------------------------------------------------------------------------------------------------- adopting


def set_rank_variables(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Describe this rank by torchrun's variables where srun started it; True if it did so.

    Nothing is translated where RANK is set already, outside of a step of srun (the batch script and the shell
    of an allocation have SLURM_PROCID too), and in a step of one task, which is a process by itself.
    MASTER_ADDR and MASTER_PORT stay if they are set.

    With more than one node, whoever started the rank, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set where
    they are not, to the interface that leads to the other nodes: gloo otherwise takes the address that the
    host's own name stands for, on Debian 127.0.1.1.

    Raises:
        ConfigError: a SLURM_ variable is missing or holds what it cannot.
    """
    adopted = "RANK" not in environ and _in_a_step(environ)
    if adopted:
        _translate(environ)
    local_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    if local_size and environ.get("WORLD_SIZE", local_size) != local_size:
        name = interface_to(_others(environ))
        if name:
            environ.setdefault("GLOO_SOCKET_IFNAME", name)
            environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, not all that begin like it
    return adopted


# what describes a rank among others; launchers set all of them
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Refuse some of a launcher's variables without the others: set by hand, or left in a shell.

    Raises ConfigError.
    """
    missing = [name for name in _RANK_VARIABLES if name not in environ]
    several = environ.get("WORLD_SIZE", "1") != "1"
    if missing and ("RANK" in environ or several):
        name = "RANK" if "RANK" in environ else "WORLD_SIZE"
        raise ConfigError(
            [
                f"environment variable {name} = {environ[name]!r}: {', '.join(missing)} must be set too; "
                f"start the ranks with deepspeed, torchrun or srun, or unset {name} for a run of one process"
            ]
        )


def is_rank_zero(environ: MutableMapping[str, str] = os.environ) -> bool:
    """True for rank 0, which reports for all; also before :func:`set_rank_variables` or after it failed."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in environ else "0") == "0"


def _in_a_step(environ: MutableMapping[str, str]) -> bool:
    """True in a task of srun that is one of several."""
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return False
    return (
        _number(environ, "SLURM_STEP_ID") < _RESERVED_STEPS and _number(environ, "SLURM_STEP_NUM_TASKS") > 1
    )


def _translate(environ: MutableMapping[str, str]) -> None:
    rank, world = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    local, node = _number(environ, "SLURM_LOCALID"), _number(environ, "SLURM_NODEID")
    text = _text(environ, "SLURM_STEP_TASKS_PER_NODE")
    try:
        tasks = tasks_per_node(text)
    except ValueError as error:
        raise ConfigError([f"environment variable SLURM_STEP_TASKS_PER_NODE = {text!r}: {error}"]) from None
    if node >= len(tasks):
        raise ConfigError(
            [
                f"environment variable SLURM_NODEID = {node}: SLURM_STEP_TASKS_PER_NODE = {text!r} has no "
                f"such "
                f"node"
            ]
        )
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(tasks[node]),
    }
    if "MASTER_ADDR" not in environ:
        variables["MASTER_ADDR"] = _hosts(environ, "SLURM_STEP_NODELIST")[0]
    if "MASTER_PORT" not in environ:
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        variables["MASTER_PORT"] = str(rendezvous_port(job, step))
    environ.update(variables)


def set_driver_variables(config: Config, environ: MutableMapping[str, str] = os.environ) -> None:
    """What the CUDA driver, torch and NCCL read once: set before any of them is asked for devices.

    A variable that is set stays.

    PYTORCH_ALLOC_CONF: segments that grow, since the sizes of the guided phase differ from the next one's.
    TORCH_FR_*, TORCH_NCCL_*: the last collectives of each rank, written into run.dir where one times out.
    CUDA_DEVICE_MAX_CONNECTIONS = 1 with tensor parallelism: Megatron's linears count on one queue, where a
    collective that is started before a product runs before it, and overlaps. Not where that costs more: from
    Blackwell on there are priorities between queues, and ZeRO 2 and 3 reduce beside the backward pass.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # the older name
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    trace = f"{config.run.dir}/nccl_trace_rank_"
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", trace),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", trace),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        environ.setdefault(name, value)
    if config.parallel.tensor == 1 or config.zero.stage > 1:
        return
    capability = machine.compute_capability()
    if capability is None or capability < BLACKWELL:
        environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _text(environ: MutableMapping[str, str], name: str) -> str:
    if name not in environ:
        raise ConfigError(
            [
                f"environment variable {name}: missing; srun sets it, start the ranks with srun or set RANK "
                f"yourself"
            ]
        )
    return environ[name]


def _number(environ: MutableMapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise ConfigError([f"environment variable {name} = {text!r}: must be a number, as srun sets it"])
    return int(text)


def _hosts(environ: MutableMapping[str, str], name: str) -> list[str]:
    text = _text(environ, name)
    try:
        return hosts(text)
    except ValueError as error:
        raise ConfigError([f"environment variable {name} = {text!r}: {error}"]) from None


# ------------------------------------------------------------------------------------------ Slurm's notations


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from Slurm's short form: ``2(x3),1`` is [2, 2, 2, 1]. Raises ValueError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,7})\))?", part, re.ASCII)
        if not match:
            raise ValueError("must read like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def hosts(text: str) -> list[str]:
    """Names from Slurm's short form: ``n[01-03,7],m2`` is n01, n02, n03, n7, m2.

    Brackets may stand anywhere, also twice.

    Raises ValueError if it cannot be read.
    """
    names: list[str] = []
    for part in _split(text):
        names += _expanded(part)
        if len(names) > _MOST_HOSTS:
            raise ValueError(f"names more than {_MOST_HOSTS} hosts")
    return names


def _split(text: str) -> Iterator[str]:
    """The parts between commas that no brackets hold."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and not depth:
            yield part
            part = ""
        else:
            part += letter
    if depth:
        raise ValueError("its brackets do not match")
    yield part


def _expanded(part: str) -> list[str]:
    """The names that one part stands for, the last brackets running fastest."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        if not re.fullmatch(r"[^\s\[\],]+", part):
            raise ValueError("holds an empty name" if not part else f"holds {part!r}, which is no host")
        return [part]
    inside, _, tail = rest.partition("]")
    names: list[str] = []
    tails = _expanded(tail) if tail else [""]
    for item in inside.split(","):
        for digits in _range(item):
            names += [f"{head}{digits}{end}" for end in tails]
    return names


def _range(item: str) -> Iterator[str]:
    """``01-03`` -> 01, 02, 03: as many digits as the first number has."""
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", item, re.ASCII)
    if not match:
        raise ValueError(f"holds [{item}], which is no range of numbers")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last <= first + _MOST_HOSTS:
        raise ValueError(f"holds [{item}], which does not go upwards, or too far")
    yield from (str(number).zfill(len(match[1])) for number in range(first, last + 1))


# ------------------------------------------------------------------------------------------------- interfaces


def interface_to(names: Sequence[str]) -> str | None:
    """The network interface from which the first of ``names`` is reached that is not this very machine's
    loopback; None if none is.

    An interface name, such as eth0. Asking sends nothing: a datagram socket only looks up the route.
    """
    for name in names:
        address = _address_towards(name)
        if address and not address.startswith("127."):
            interface = next(
                (label for _, label in socket.if_nameindex() if _address_of(label) == address), None
            )
            if interface:
                return interface
    return None


def _others(environ: MutableMapping[str, str]) -> list[str]:
    """Hosts to ask the route to: the master, and as on itself its name may be loopback, the job's others."""
    names = [environ["MASTER_ADDR"]] if environ.get("MASTER_ADDR") else []
    with contextlib.suppress(ValueError):
        names += hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")[:8]
    return names


def _address_towards(name: str) -> str | None:
    """The IPv4 address of this machine that reaches ``name``."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((name, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _address_of(interface: str) -> str | None:
    """An interface's IPv4 address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(packed[20:24])
    except OSError:
        return None
