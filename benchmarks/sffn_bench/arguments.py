"""The command line of tools/bench.py. Standard library only."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from sffn_bench import sizes

CUDA_WIDTHS, CPU_WIDTHS = [1024, 1536, 2048, 3072, 4096], [2048]
CUDA_TOKENS, CPU_TOKENS = 30000, 1024


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def parser(description: str | None) -> argparse.ArgumentParser:
    """All commands."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    _one_size(
        commands, "comm", "elements received by a rank, a token; (p-1)/p included", 2048, 8192, [2, 4, 8]
    )
    timing = _one_size(
        commands, "tp", "forward + backward time of one feed-forward layer over p ranks", 1024, 2048, [2]
    )
    timing.add_argument(
        "--sequence",
        choices=("on", "off", "both"),
        default="on",
        help="sequence parallelism (default %(default)s)",
    )
    text = "forward + backward time of one feed-forward layer on one rank, by the guide's part"
    guiding = _one_size(commands, "guide", text, 1024, 2048)
    text = "time that training waits for a save, written while it waits or behind it"
    saving = _command(commands, "checkpoint", text)
    saving.add_argument(
        "--gigabytes", type=float, default=1.2, metavar="GB", help="state of the rank (default %(default)s)"
    )
    saving.add_argument(
        "--folder",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="on the disk to write to (default: this one)",
    )
    watching = _command(commands, "guards", "time that a run's watch, checks and telemetry take of its steps")
    watching.add_argument(
        "--config", type=Path, default=Path("configs/demo.json"), help="the run (default %(default)s)"
    )
    watching.add_argument("--steps", type=positive, default=100, help="of the run (default %(default)s)")
    watching.add_argument(
        "--ranks", type=positive, default=2, help="that it is started on (default %(default)s)"
    )
    watching.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the config")
    _roofline(commands)
    layers = [
        _paper_sizes(
            commands,
            "ffn",
            "time and memory of one feed-forward layer on one device: forward, and forward + backward",
        ),
        _paper_sizes(
            commands, "step", "time of forward + backward + AdamW of one feed-forward layer on one device"
        ),
        _paper_sizes(
            commands, "decode", "forward time of one feed-forward layer for few tokens, as in generation"
        ),
    ]
    for sub in layers[:2]:
        said = f"tokens of a micro-batch (default {CUDA_TOKENS} on CUDA, {CPU_TOKENS} on the CPU)"
        sub.add_argument("--tokens", type=positive, metavar="T", help=said)
    layers[2].add_argument(
        "--batch",
        type=positive,
        nargs="+",
        default=[1, 8, 64],
        metavar="T",
        help="tokens at a time (default %(default)s)",
    )
    for sub in (timing, guiding, saving, *layers):
        default = 5 if sub is saving else 15
        sub.add_argument(
            "--repeats", type=positive, default=default, help="interleaved repeats (default %(default)s)"
        )
    return made


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command with what all have."""
    sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there too")
    sub.add_argument("--json", action="store_true", help="print a JSON list of rows")
    return sub


def _roofline(commands: Commands) -> None:
    text = "predicted time of a micro-step and of a step, part by part, from the config alone"
    sub = _command(commands, "roofline", text)
    sub.add_argument("--config", type=Path, required=True, help="the run")
    sub.add_argument("--device", default="H100", help="by its driver's name or a part of it (default H100)")
    for option, unit in (
        ("--peak-tflops", "TFLOP/s in bf16"),
        ("--bandwidth", "TB/s of its memory"),
        ("--link", "GB/s that it receives from its tensor-parallel group"),
    ):
        said = f"{unit}, in place of its data sheet's"
        sub.add_argument(option, type=positive_number, metavar="X", help=said)
    sub.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the config")


def _one_size(
    commands: Commands, name: str, text: str, width: int, tokens: int, ranks: list[int] | None = None
) -> argparse.ArgumentParser:
    """A command on layers of one width, whose other sizes may be chosen."""
    sub = _command(commands, name, text)
    sub.add_argument(
        "--width", type=positive, default=width, metavar="H", help="model width h (default %(default)s)"
    )
    sub.add_argument("--inner", type=positive, metavar="F", help="inner width f (default 4 h)")
    sub.add_argument("--rank", type=positive, help="rank of low_rank (default h/4)")
    sub.add_argument("--block-rank", type=positive, help="rank of block_dense (default 3h/8)")
    sub.add_argument(
        "--blocks", type=positive, default=4, help="blocks of the block structures (default %(default)s)"
    )
    sub.add_argument(
        "--tokens", type=positive, default=tokens, help="tokens of a micro-batch (default %(default)s)"
    )
    if ranks:
        said = "tensor-parallel ranks (default %(default)s)"
        sub.add_argument("--ranks", type=positive, nargs="+", default=ranks, metavar="P", help=said)
    else:
        sub.set_defaults(ranks=[1])
    return sub


def _paper_sizes(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command on the paper's layers of several widths."""
    sub = _command(commands, name, text)
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a device")
    said = (
        "measure anew which kernels are fastest, into the device's table in DIR "
        "(kernels/sffn_kernels/tables ships it)"
    )
    sub.add_argument("--table", type=Path, metavar="DIR", help=said)
    said = f"model widths h; the inner width is 4 h (default {CUDA_WIDTHS} on CUDA, {CPU_WIDTHS} on the CPU)"
    sub.add_argument("--width", "--widths", dest="widths", type=positive, nargs="+", metavar="H", help=said)
    kinds, shares = list(sizes.KINDS), list(sizes.SIZES)
    sub.add_argument("--kinds", choices=kinds, nargs="+", default=kinds, help="structures (default: all)")
    said = "percent of the dense layer's parameters (default: both)"
    sub.add_argument("--shares", type=int, choices=shares, nargs="+", default=shares, help=said)
    return sub


def settle(args: argparse.Namespace, cuda: bool) -> None:
    """Fill in the defaults that depend on other arguments, and on whether there is a CUDA device."""
    if "width" in args:
        args.inner = args.inner or 4 * args.width
        args.rank = args.rank or max(1, args.width // 4)
        args.block_rank = args.block_rank or max(1, 3 * args.width // 8)
    if "widths" in args:
        args.device = args.device or ("cuda" if cuda else "cpu")
        on_cuda = args.device == "cuda"
        args.widths = args.widths or (CUDA_WIDTHS if on_cuda else CPU_WIDTHS)
        if args.command != "decode":
            args.tokens = args.tokens or (CUDA_TOKENS if on_cuda else CPU_TOKENS)
        for name in {"widths", "kinds", "shares", "batch"} & vars(args).keys():
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
