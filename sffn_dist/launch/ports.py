"""The port of the rendezvous: which are free, which is taken, which one a job's ranks find by themselves."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import MutableMapping

from sffn_dist.launch import exit_codes
from sffn_dist.spec.config import ConfigError

# below those that the kernel gives out by itself, from 32768 on
_FIRST_PORT, _PORTS = 20000, 12000


class RendezvousError(ConfigError):
    """Ranks do not find each other: where the address is right, another start may."""

    exit_code = exit_codes.LOST_RANK


def check_port(environ: MutableMapping[str, str] = os.environ) -> None:
    """Refuse a taken MASTER_PORT before anything is imported, on rank 0, which is to serve it.

    Raises RendezvousError: it may be free at another start.
    """
    text = environ.get("MASTER_PORT", "")
    serves = environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if environ.get("RANK") != "0" or not serves or not text.isdecimal() or not 0 < int(text) < 65536:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RendezvousError([taken_port(int(text))]) from None


def free_port() -> int:
    """A port that nothing listens on, for a launch that follows.

    None of those that the kernel gives out: one of those may be some connection's by then.
    """
    for port in random.SystemRandom().sample(range(_FIRST_PORT, _FIRST_PORT + _PORTS), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(errno.EADDRINUSE, "1000 ports from 20000 to 31999 were tried, all are in use")


def taken_port(port: int) -> str:
    """What to say of a MASTER_PORT that another process serves on this machine."""
    return (
        f"MASTER_PORT = {port}: is in use on {socket.gethostname()}; another run may have it: choose a free "
        f"one (--master_port of deepspeed, --master-port of torchrun)"
    )


def rendezvous_port(job: int, step: int) -> int:
    """A port that all ranks of a step find by themselves.

    Steps of one job and jobs that follow one another have different ones.
    """
    return _FIRST_PORT + (job * 16 + step) % _PORTS
