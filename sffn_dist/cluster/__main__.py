"""What slurm/pretrain.sbatch asks.

python -m sffn_dist.cluster run-dir ARGUMENTS-OF-PRETRAIN...
    prints run.dir; exit code 2 where the arguments are refused
python -m sffn_dist.cluster world-info NODE RANKS HOST...
    prints the --world_info of deepspeed's launcher, as node number NODE sees it
python -m sffn_dist.cluster ended --code N --asked SIGNAL --record FILE --history FILE --run-dir DIR
    prints what follows an end; exit code 0: start again, 3: do not
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sffn_dist.cluster import requeue
from sffn_dist.launch.error_output import print_errors
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError

GO_ON, REFUSED, LEAVE = 0, 2, 3  # exit codes


def world_info(node: int, ranks: int, hosts: Sequence[str], visible: str | None) -> str:
    """DeepSpeed's description of all nodes: host -> its devices, as base64 of JSON.

    The launcher makes the devices of its own node, number ``node``, visible to the ranks. Where Slurm chose
    some (``visible``), those are the ones.
    """
    chosen = [name for name in (visible or "").split(",") if name]
    devices: list[str | int] = [int(name) if name.isdecimal() else name for name in chosen]
    usual: list[str | int] = list(range(ranks))
    own_devices = devices if len(devices) == ranks else usual
    tree = {host: own_devices if number == node else usual for number, host in enumerate(hosts)}
    return base64.urlsafe_b64encode(json.dumps(tree).encode()).decode()


def _run_dir(arguments: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(prog="pretrain.py")
    parser.add_argument("--config", required=True)
    parser.add_argument("--change", action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    options, _ = parser.parse_known_intermixed_args(arguments)
    return loading.load(options.config, options.overrides).run.dir


def _ended(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ended")
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--asked", default="")
    for name in ("--record", "--history", "--run-dir"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args(arguments)
    verdict = requeue.record_end(
        options.code, options.asked, options.record, options.history, options.run_dir
    )
    print(verdict.sentence, flush=True)
    return GO_ON if verdict.go_on else LEAVE


def main(argv: Sequence[str]) -> int:
    """The exit code, as above."""
    question, *rest = argv or [""]
    if question == "run-dir":
        try:
            print(_run_dir(rest))
        except ConfigError as error:
            print_errors("pretrain.sbatch", error.problems)
            return REFUSED
    elif question == "world-info":
        print(world_info(int(rest[0]), int(rest[1]), rest[2:], os.environ.get("CUDA_VISIBLE_DEVICES")))
    elif question == "ended":
        return _ended(rest)
    else:
        print(__doc__, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
