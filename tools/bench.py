"""What a structured feed-forward layer costs: how long it takes, and what it sends; what a checkpoint costs,
and a run's guards.

bench.py ffn         time and memory of one layer on one device, forward and forward + backward, against dense
bench.py step        time of a training step of one layer on one device: forward + backward + AdamW
bench.py decode      time of one layer for a few tokens, as in generation
bench.py comm        elements that a rank receives under tensor parallelism, by structure and number of ranks
bench.py tp          time of one layer over p ranks: ours, the naive split, dense
bench.py guide       time of one layer on one rank: with the guide, an idle one, none, dense
bench.py checkpoint  time that training waits for a save: written while it waits, or behind it
bench.py roofline    predicted time of a micro-step and of a step of a run, part by part; measures nothing
bench.py guards      time that a run's watchdog, checks and telemetry take of its steps
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sffn_bench import arguments, roofline, sizes
from sffn_bench.columns import table_of
from sffn_bench.device_work import DeviceRates

from sffn_dist import strict_json
from sffn_dist.spec import counts, loading, machine, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.disk_errors import DiskError, explained
from sffn_dist.spec.traffic import TrafficGroup, feed_forward, total
from sffn_dist.structured.dense import Dense
from sffn_dist.structured.structure import Size

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "benchmarks" / "sffn_bench"
SIZES = "sml"  # of the paper's dense models; their state is 1.3, 4.0 and 8.7 GB


def misfits(args: argparse.Namespace) -> Iterator[str]:
    """What sizes do not fit one another, the ranks, or the disk."""
    if args.csv and not args.csv.absolute().parent.is_dir():
        yield f"--csv {args.csv}: there is no folder {args.csv.absolute().parent}"
    if "repeats" in args and args.repeats < 2:
        yield f"--repeats {args.repeats}: must be at least 2"
    if "config" in args:
        yield from config_problems(args)
    elif args.command == "checkpoint":
        yield from no_room(args)
    elif "widths" in args:
        if args.device == "cuda" and machine.cuda() is None:
            yield "--device cuda: there is no CUDA device that this torch could use"
        elif args.table and args.device != "cuda":
            yield f"--table {args.table}: kernels are chosen by measuring on CUDA devices alone"
        if args.table and not args.table.is_dir():
            yield f"--table {args.table}: there is no such folder"
        for tokens in getattr(args, "batch", ()):
            if tokens > sizes.MOST_DECODED:
                yield (
                    f"--batch {tokens}: must not exceed {sizes.MOST_DECODED}, the most that are decoded at "
                    f"a time"
                )
        yield from sizes.odd_widths(args.widths, args.kinds, args.shares)
    else:
        yield from odd_shapes(args)


def config_problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with a run's config, the ranks, or the device that its time is predicted for."""
    try:
        config = loading.load(str(args.config), args.overrides)
        if args.command == "guards":
            validation.check_world(config, args.ranks)
        else:
            roofline.check(config)
            device_rates(args, config)
    except ConfigError as error:
        yield from error.problems


def odd_shapes(args: argparse.Namespace) -> Iterator[str]:
    """What sizes of a layer do not fit one another, or the ranks."""
    outer, inner = Size("--width", args.width), Size("--inner", args.inner)
    problems: list[str] = []
    for structure in sizes.chosen(args.rank, args.block_rank, args.blocks):
        broken = [*structure.setting_problems("--"), *structure.size_problems(outer, inner, "--")]
        for p in args.ranks:
            broken += structure.tensor_parallel_problems(inner, Size("--ranks", p), "--")
        # both ranks are options: low_rank's --rank and block_dense's --block-rank
        problems += (
            [text.replace("--rank =", "--block-rank =") for text in broken] if structure.blocks else broken
        )
    yield from dict.fromkeys(problems)
    for p in args.ranks:
        if args.tokens % p:
            yield f"--tokens = {args.tokens}: must be divisible by --ranks = {p}"
        if args.command == "tp" and args.blocks % p:
            yield (
                f"--blocks {args.blocks}: must be divisible by --ranks {p}, since the naive split cuts "
                f"whole blocks"
            )


def no_room(args: argparse.Namespace) -> Iterator[str]:
    """Why as much state cannot be saved where it is to be."""
    if paper_config(args.gigabytes) is None:
        yield (
            f"--gigabytes {args.gigabytes:g}: must be above 0 and not exceed {gigabytes(SIZES[-1]):.3g}, "
            f"the state of the paper's l"
        )
    elif not args.folder.is_dir():
        yield f"--folder {args.folder}: there is no such folder"
    else:
        # of each provider's the checkpoint before, and the one that is being written
        needed, free = 3 * args.gigabytes + 0.01, shutil.disk_usage(args.folder).free / 1e9
        if free < needed:
            yield (
                f"--gigabytes {args.gigabytes:g}: needs {needed:.3g} GB, {free:.3g} GB free on the disk of "
                f"--folder {args.folder}"
            )


def gigabytes(size: str) -> float:
    """fp32 weights and both moments of one of the paper's dense models."""
    return 12 * counts.parameters(loading.load(_config(size))) / 1e9


def paper_config(wanted: float) -> Path | None:
    """The smallest of the paper's models that has as much state."""
    return next((_config(size) for size in SIZES if 0 < wanted <= gigabytes(size)), None)


def _config(size: str) -> Path:
    return ROOT / "configs" / "paper" / f"{size}_dense.json"


def comm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of elements received, a token and rank; from the split table, exactly."""
    h, f, tokens = args.width, args.inner, args.tokens
    rows = []
    for p in args.ranks:
        split, whole = TrafficGroup(p, tokens, True), TrafficGroup(p, tokens, False)
        dense = feed_forward(split, Dense(), h, f)
        for structure in (Dense(), *sizes.chosen(args.rank, args.block_rank, args.blocks)):
            kept, full = (feed_forward(group, structure, h, f) for group in (split, whole))
            narrow = feed_forward(split, structure, h, f, narrow=True)
            columns = {
                "elements": total(kept, "forward"),
                "backward": total(kept, "backward"),
                "gradients": total(kept, "gradient"),
                "without_sp_forward": total(full, "forward"),
                "without_sp_backward": total(full, "backward"),
                "backward_recompute_bottleneck": total(narrow, "backward"),
            }
            ratio = total(kept, "forward") / total(dense, "forward") if p > 1 else 1
            shape = {"tokens": tokens, "h": h, "f": f, "rank": structure.rank, "blocks": structure.blocks}
            elements = {name: float(column / tokens) for name, column in columns.items()}
            rows.append({"kind": structure.kind, "p": p, **elements, "ratio_to_dense": float(ratio), **shape})
    return rows


def tp(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of measured times over every number of ranks."""
    sequence = {"on": [True], "off": [False], "both": [True, False]}[args.sequence]
    return [
        row for p in args.ranks for row in timed("tensor_parallel", args, p, threads=1, sequence=sequence)
    ]


def guide(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of measured times on one rank, which has all cores."""
    return timed("guided", args, 1, threads=machine.cores())


def timed(
    script: str, args: argparse.Namespace, p: int, *, threads: int, **more: Any
) -> list[dict[str, Any]]:
    """Rows that a script of benchmarks/sffn_bench prints; starts its p ranks."""
    settings = {
        **{name: getattr(args, name) for name in ("width", "inner", "tokens", "repeats")},
        "threads": threads,
        "structures": [
            {"kind": structure.kind, **asdict(structure)}
            for structure in sizes.chosen(args.rank, args.block_rank, args.blocks)
        ],
        **more,
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(p)]
    return printed(
        [*launch, str(BENCH / f"{script}.py"), json.dumps(settings)], threads, f"the {p} rank{'s' * (p > 1)}"
    )


def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of measured times of the paper's layers on one device."""
    names = (
        "widths",
        "kinds",
        "shares",
        "repeats",
        *(("batch",) if args.command == "decode" else ("tokens",)),
    )
    settings = {
        "op": args.command,
        "threads": machine.cores(),
        **{name: getattr(args, name) for name in names},
    }
    settings["table"] = str(args.table.absolute()) if args.table else None
    script = BENCH / ("decode.py" if args.command == "decode" else "feed_forward.py")
    return printed(
        [str(script), json.dumps(settings)], machine.cores(), "the timing", hide_cuda=args.device == "cpu"
    )


def checkpoint(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of measured saves.

    What they wrote is gone afterwards, also when interrupted: the process is ended first.
    """
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=args.folder) as folder:
        settings = {
            "config": str(paper_config(args.gigabytes)),
            "bytes": round(1e9 * args.gigabytes),
            "repeats": args.repeats,
            "threads": machine.cores(),
            "folder": folder,
        }
        # no launcher between: whoever is interrupted here ends the writer itself
        return printed([str(BENCH / "checkpoint.py"), json.dumps(settings)], machine.cores(), "the saves")


def guards(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a run's guards; what it wrote is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench_guards_") as folder:
        config = loading.load(str(args.config), args.overrides)
        own = (f"run.dir={folder}", f"train.steps={args.steps}", "checkpoint.interval=0")
        overrides = loading.merge_overrides(own, args.overrides)
        settings = {
            "config": str(args.config),
            "overrides": overrides,
            "folder": folder,
            "ranks": args.ranks,
            "replicas_interval": config.guards.replicas_interval or args.steps,
        }
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
        command = [*launch, str(BENCH / "guards.py"), json.dumps(settings)]
        return printed(command, max(1, machine.cores() // args.ranks), "the run")


def device_rates(args: argparse.Namespace, config: Config) -> DeviceRates:
    """The device that the command line names. Raises ConfigError for one that is not known."""
    given = {"flops": (args.peak_tflops, 1e12), "memory": (args.bandwidth, 1e12), "link": (args.link, 1e9)}
    rates = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    return roofline.rates_of(args.device, linked=config.parallel.tensor > 1, **rates)


def predicted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a run's parts, predicted."""
    config = loading.load(str(args.config), args.overrides)
    return roofline.predict(config, device_rates(args, config)).rows


def printed(command: list[str], threads: int, who: str, *, hide_cuda: bool = False) -> list[dict[str, Any]]:
    """The rows that a Python process prints in its last line."""
    quiet = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1"}
    if hide_cuda:
        quiet["CUDA_VISIBLE_DEVICES"] = ""
    completed = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=quiet
    )
    if completed.returncode:
        sys.exit(f"{completed.stderr}bench: {who} ended with {completed.returncode}")
    rows: list[dict[str, Any]] = strict_json.floats(json.loads(completed.stdout.splitlines()[-1]))
    return rows


COMMANDS = {
    "comm": comm,
    "tp": tp,
    "guide": guide,
    "checkpoint": checkpoint,
    "guards": guards,
    "roofline": predicted,
    "ffn": layers,
    "step": layers,
    "decode": layers,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its rows."""
    parser = arguments.parser(__doc__)
    args = parser.parse_args(argv)
    arguments.settle(args, cuda=machine.cuda() is not None)
    if problems := list(misfits(args)):
        parser.error("\n".join(problems))
    try:
        measure(args)
    except (ConfigError, DiskError) as error:
        parser.error(str(error))


def measure(args: argparse.Namespace) -> None:
    """Run the benchmark and print its rows. Raises ConfigError or DiskError where --csv cannot be written."""
    if args.csv:
        with explained("--csv", args.csv):  # before minutes of timing
            args.csv.open("a").close()
    rows = COMMANDS[args.command](args)
    print(strict_json.dumps(rows, indent=1) if args.json else table_of(rows, args.command), flush=True)
    if args.command == "roofline" and not args.json:
        print(roofline.NOT_MEASURED, flush=True)
    if args.csv:
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        with explained("--csv", args.csv), args.csv.open("w", encoding="utf-8", newline="") as file:
            file.write(table.getvalue())


if __name__ == "__main__":
    main()
