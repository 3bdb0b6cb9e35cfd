"""What a structured feed-forward layer costs: what it sends, and how long it takes.

python tools/bench.py comm      elements that a rank receives under tensor parallelism, by structure and number of ranks
python tools/bench.py tp        time of one layer over p ranks: ours, the naive split, dense
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sffn_dist.shapes import Structure
from sffn_dist.traffic import Group, feed_forward, total

BENCH = Path(__file__).resolve().parents[1] / "kernels" / "bench"


def comm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of elements received, a token and rank; from the split table, exactly."""
    h, f, tokens = args.width, args.inner, args.tokens
    structures = [
        Structure("dense"),
        Structure("low_rank", rank=args.rank),
        Structure("block_dense", rank=args.block_rank, blocks=args.blocks),
        Structure("block_shuffle", blocks=args.blocks),
    ]
    rows = []
    for p in args.ranks:
        dense = total(feed_forward(Group(p, tokens, True), structures[0], h, f), "forward")
        for structure in structures:
            split = feed_forward(Group(p, tokens, True), structure, h, f)
            whole = feed_forward(Group(p, tokens, False), structure, h, f)
            narrow = feed_forward(Group(p, tokens, True), structure, h, f, narrow=True)
            rows.append(
                {
                    "kind": structure.kind,
                    "p": p,
                    "elements": float(total(split, "forward") / tokens),
                    "ratio_to_dense": float(total(split, "forward") / dense),
                    "backward": float(total(split, "backward") / tokens),
                    "backward_recompute_bottleneck": float(total(narrow, "backward") / tokens),
                    "gradients": float(total(split, "gradient") / tokens),
                    "without_sp_forward": float(total(whole, "forward") / tokens),
                    "without_sp_backward": float(total(whole, "backward") / tokens),
                    "tokens": tokens,
                    "h": h,
                    "f": f,
                    "rank": structure.rank,
                    "blocks": structure.blocks,
                }
            )
    return rows


def tp(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of measured times; starts the ranks."""
    structures = [
        {"kind": "low_rank", "rank": args.rank},
        {"kind": "block_dense", "rank": args.block_rank, "blocks": args.blocks},
        {"kind": "block_shuffle", "blocks": args.blocks},
    ]
    settings = {
        "width": args.width,
        "inner": args.inner,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "sequence": {"on": [True], "off": [False], "both": [True, False]}[args.sequence],
        "structures": structures,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks[0])]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1"}
    command = [*launch, str(BENCH / "tensor_parallel.py"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        sys.exit(f"{done.stderr}bench: the ranks ended with {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


COLUMNS = {
    "comm": ("kind", "p", "elements", "ratio_to_dense", "backward", "gradients", "without_sp_forward", "without_sp_backward"),
    "tp": ("kind", "p", "sequence", "provider", "median_ms", "p20_ms", "p80_ms", "speedup_over_naive", "speedup_over_dense"),
}


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows for a terminal."""

    def text(value: Any) -> str:
        return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    cells = [list(columns), *[[text(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, width: int, tokens: int, ranks: list[int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--width", type=int, default=width, metavar="H", help="model width h (default %(default)s)")
        sub.add_argument("--inner", type=int, default=4 * width, metavar="F", help="inner width f (default %(default)s)")
        sub.add_argument("--rank", type=int, default=width // 4, help="rank of low_rank (default %(default)s)")
        sub.add_argument("--block-rank", type=int, default=3 * width // 8, help="rank of block_dense (default %(default)s)")
        sub.add_argument("--blocks", type=int, default=4, help="blocks of the block structures (default %(default)s)")
        sub.add_argument("--tokens", type=int, default=tokens, help="tokens of a micro-batch (default %(default)s)")
        sub.add_argument(
            "--ranks", type=int, nargs="+", default=ranks, metavar="P", help="tensor-parallel ranks (default %(default)s)"
        )
        sub.add_argument("--json", action="store_true", help="print a JSON list of rows")
        return sub

    command("comm", "elements received by a rank, a token; (p-1)/p included", 2048, 8192, [2, 4, 8])
    timing = command("tp", "forward + backward time of one feed-forward layer over p ranks", 1024, 2048, [2])
    timing.add_argument(
        "--sequence", choices=("on", "off", "both"), default="on", help="sequence parallelism (default %(default)s)"
    )
    timing.add_argument("--repeats", type=int, default=15, help="interleaved repeats (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its rows."""
    args = arguments().parse_args(argv)
    rows = comm(args) if args.command == "comm" else tp(args)
    print(json.dumps(rows, indent=1) if args.json else table(rows, COLUMNS[args.command]))


if __name__ == "__main__":
    main()
