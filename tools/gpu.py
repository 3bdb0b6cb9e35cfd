"""Everything to run first on a GPU: tests, training, layers, in pieces; their figures as CSV, and a page.

    gpu.py              the pieces that are not done yet, for nine minutes; call it again until none is left
    gpu.py --list       the pieces, and which are done

A piece has eight minutes, and is done once it ended with code 0. What it printed lies in WORK/<piece>.log,
its figures in OUT/<piece>.csv; OUT/README.md sets them beside what was aimed at. Needs no network; on a
machine that lacks packages: `make gpu-wheels` elsewhere, `make gpu WHEELS=DIR` there.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_bench import roofline, sizes

from sffn_dist import atomic_io, strict_json
from sffn_dist.checkpoint.versions import revision, versions
from sffn_dist.launch.error_output import print_errors
from sffn_dist.spec import loading, machine
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.device_peaks import peak_flops
from sffn_dist.spec.plan import plan
from sffn_dist.telemetry import metrics

ROOT = Path(__file__).resolve().parents[1]
PIECE_SECONDS, TINY_SECONDS, CALL_SECONDS = 480.0, 120.0, 540.0
WIDTHS = (1024, 1536, 2048, 3072, 4096)
FAILED, REFUSED = 1, 2
# train.global_batch_size is a part of the paper's, so that a step takes about a second
SHORT = {
    "train.steps": 200,
    "train.global_batch_size": 64,
    "evaluation.interval": 0,
    "checkpoint.interval": 0,
    "sample.tokens": 0,
    "profile.steps": "100:103",
}
TINY: dict[str, Any] = {
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 4,
    "model.sequence": 32,
    "model.vocab": 512,
    "model.kv_heads": "null",
    "model.attention_dim": "null",
    "ffn.width": 256,
    "evaluation.sequences": 2,
    "train.steps": 6,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
}


@dataclass(frozen=True)
class Stage:
    """One command; ``run_dir`` is a run's, whose records are its figures."""

    name: str
    command: list[str]
    run_dir: Path | None = None
    config: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What a figure should be at least, by a name that the page shows."""

    name: str
    least: float
    found: float | None

    @property
    def met(self) -> bool | None:
        """None where it was not measured."""
        return None if self.found is None else self.found >= self.least


def pieces(out: Path, work: Path, *, tiny: bool) -> list[Stage]:
    """All of them, in the order in which they run: what may be wrong first."""
    python, pretrain = sys.executable, str(ROOT / "sffn_dist" / "pretrain.py")
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    made = [Stage("tests", [python, "-m", "pytest", "-m", "gpu", "-rs", *map(str, marked)])]
    for name, config in (
        ("train_wide_blockdiag", "configs/wide_blockdiag.json"),
        ("train_xl_low_rank_32", "configs/paper/xl_low_rank_32.json"),
        ("train_xl_dense", "configs/paper/xl_dense.json"),
    ):
        run_dir = work / name
        settings = {**SHORT, "data.dir": work / "data", "run.dir": run_dir}
        if tiny:
            settings["data.source"] = tiny_source(work)
            rank = loading.load(str(ROOT / config)).ffn.rank
            settings |= TINY if rank is None else {**TINY, "ffn.rank": 16}
        overrides = tuple(f"{key}={value}" for key, value in settings.items())
        command = [python, pretrain, "--config", str(ROOT / config), *overrides]
        made.append(Stage(name, command, run_dir, config, overrides))
    bench = [python, str(ROOT / "tools" / "bench.py")]
    size = ["--device", "cpu", "--tokens", "32", "--repeats", "2"] if tiny else []
    for width in (64,) if tiny else WIDTHS:
        table = ["--width", str(width), "--csv", str(out / f"ffn_{width}.csv")]
        made.append(Stage(f"ffn_{width}", [*bench, "ffn", *table, *size]))
    size = ["--device", "cpu", "--width", "64", "--batch", "1", "--repeats", "2"] if tiny else []
    made.append(Stage("decode", [*bench, "decode", "--csv", str(out / "decode.csv"), *size]))
    return made


def tiny_source(work: Path) -> Path:
    """A small text, a document a section: the standard library's takes half a minute to prepare."""
    sections = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")
    work.mkdir(parents=True, exist_ok=True)
    rows = "".join(strict_json.dumps({"text": section}) + "\n" for section in sections)
    atomic_io.write_text(work / "sections.jsonl", rows)
    return work / "sections.jsonl"


def run(piece: Stage, work: Path, seconds: float) -> int:
    """Its exit code; 124 where it took longer, and was ended."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if piece.run_dir:  # half a run is not gone on with: its speeds would be of two starts
        shutil.rmtree(piece.run_dir, ignore_errors=True)
    with (work / f"{piece.name}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                piece.command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            log.write(f"\nended after {seconds:g} s\n")
            return 124
    if piece.run_dir:  # of the xl models 9 GB each
        shutil.rmtree(piece.run_dir / "checkpoints", ignore_errors=True)
    return done.returncode


# ---------------------------------------------------------------------------------------------------- figures


def run_figures(piece: Stage) -> dict[str, Any]:
    """A run's: losses, speed over the second half of its steps without a guide, memory, beside what the plan
    and the roofline say of it.
    """
    assert piece.run_dir
    rows = [row for row in metrics.read(piece.run_dir / "metrics.jsonl") if not row["skipped"]]
    steady = rows[len(rows) // 2 :]
    config = loading.load(str(ROOT / piece.config), piece.overrides)
    planned = plan(config, 1)
    seconds = statistics.median(row["seconds"] for row in steady)
    flops = statistics.median(row["flops"] for row in steady)
    peak = peak_flops(device_name(), planned["precision"])
    predicted = roofline.predicted(config, device_name(), planned["precision"])
    figures = {
        "run": piece.name,
        "kind": config.ffn.kind,
        "steps": len(rows),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "step_seconds": seconds,
        "predicted_step_seconds": predicted.step if predicted else None,
        "measured_over_predicted": seconds / predicted.step if predicted else None,
        "micro_steps": config.accumulation_steps(1),
        "predicted_micro_step_seconds": predicted.micro_step if predicted else None,
        "tokens_per_s": config.tokens_per_step / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_memory": max((row.get("peak_memory", 0) for row in rows), default=0) or None,
        "planned_memory": planned["memory_per_rank"]["total"],
        "precision": planned["precision"],
    }
    return {**figures, "device": device_name(), **provenance()}


def provenance() -> dict[str, Any]:
    """What the figures are of."""
    found = versions()
    return {"torch": found.get("torch"), "deepspeed": found.get("deepspeed"), "revision": revision()}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(paths: Iterable[Path]) -> list[dict[str, str]]:
    """Rows of the tables that are there."""
    files = [path for path in paths if path.is_file()]
    return [row for path in files for row in csv.DictReader(path.open(newline="", encoding="utf-8"))]


def targets(layers: Sequence[dict[str, str]], decoded: Sequence[dict[str, str]], runs: Any) -> list[Goal]:
    """What was aimed at, and the figure that was found: of layers at width 2048."""

    def speedup(rows: Sequence[dict[str, str]], kind: str, share: float, mode: str) -> float | None:
        found = [
            float(row["speedup_over_dense"])
            for row in rows
            if row["kind"] == kind
            and abs(float(row["share"]) - share) < 0.05
            and row["mode"] == mode
            and row["provider"] == "ours"
            and row["width"] in ("2048", "64")
        ]
        return max(found, default=None)

    listed = []
    for (percent, kind), least in sizes.AIMED_AT.items():
        name = f"layer, forward + backward, {kind} {percent}%: times faster than compiled dense"
        share = {32: 0.3, 63: 0.61}[percent]
        listed.append(Goal(name, least, speedup(layers, kind, share, "forward_backward")))
    for kind in sizes.KINDS:
        name = f"decoding, {kind} 32%: times faster than dense"
        listed.append(Goal(name, sizes.DECODING_AIMED_AT, speedup(decoded, kind, 0.3, "forward")))
    by_name = {row["run"]: row for row in runs}
    dense, structured = by_name.get("train_xl_dense"), by_name.get("train_xl_low_rank_32")
    faster = dense["step_seconds"] / structured["step_seconds"] if dense and structured else None
    listed.append(Goal("step of xl LowRank 32%: times faster than dense", 1.6, faster))
    listed += [Goal(f"MFU, {name}", 0.45, row["mfu"]) for name, row in by_name.items()]
    return listed


def page(out: Path, state: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """OUT/README.md."""
    layers, decoded = read_csv(sorted(out.glob("ffn_*.csv"))), read_csv(out.glob("decode.csv"))
    lines = [f"# {out.name}", "", "Made by `python tools/gpu.py` (`make gpu`).", ""]
    lines += ["| piece | exit code | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {entry['code']} | {entry['seconds']:.0f} |" for name, entry in state.items()]
    lines += ["", "| aimed at | at least | found | |", "|---|---|---|---|"]
    for target in targets(layers, decoded, runs):
        found = "not measured" if target.found is None else f"{target.found:.3g}"
        verdict = {None: "", True: "met", False: "**short of it**"}[target.met]
        lines.append(f"| {target.name} | {target.least:g} | {found} | {verdict} |")
    if runs:
        keys = [key for key in runs[0] if key not in ("torch", "deepspeed", "revision", "device")]
        lines += ["", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
        lines += [f"| {' | '.join(_text(row[key]) for key in keys)} |" for row in runs]
        lines += ["", "`predicted_…`: `tools/bench.py roofline`, by config and data sheet alone."]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = arguments().parse_args(argv)
    try:
        return _main(args)
    except ConfigError as error:
        print_errors("gpu.py", error.problems)
        return REFUSED


def _main(args: argparse.Namespace) -> int:
    if not args.tiny and machine.cuda() is None:
        raise ConfigError(["there is no CUDA device here, or torch is a CPU build; --tiny tries the script"])
    out, work = args.out or ROOT / "benchmarks" / "results" / folder_name(device_name()), args.work
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    planned, state_file = pieces(out, work, tiny=args.tiny), work / "pieces.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    if unknown := set(args.only) - {piece.name for piece in planned}:
        names = ", ".join(piece.name for piece in planned)
        raise ConfigError([f"--only {', '.join(sorted(unknown))}: must be of {names}"])
    left = [
        piece for piece in planned if state.get(piece.name, {}).get("code") != 0 or piece.name in args.only
    ]
    if args.list:
        print("\n".join(f"{piece.name}: {'left' if piece in left else 'done'}" for piece in planned))
        return 0
    began, limit = time.monotonic(), TINY_SECONDS if args.tiny else PIECE_SECONDS
    for piece in [piece for piece in left if not args.only or piece.name in args.only]:
        if time.monotonic() - began > CALL_SECONDS - limit and piece is not left[0]:
            break
        started = time.monotonic()
        print(f"{piece.name}: {' '.join(piece.command)}", flush=True)
        code = run(piece, work, limit)
        state[piece.name] = {"code": code, "seconds": time.monotonic() - started}
        print(f"{piece.name}: exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
        atomic_io.write_text(state_file, strict_json.dumps(state, indent=1) + "\n")
        report(out, planned, state)
    still_left = [piece.name for piece in planned if state.get(piece.name, {}).get("code") != 0]
    print(f"left: {', '.join(still_left)}; call again" if still_left else f"done: {out}/README.md")
    return FAILED if any(entry["code"] for entry in state.values()) else 0


def report(out: Path, planned: Sequence[Stage], state: dict[str, Any]) -> None:
    """Write the runs' figures and the page from what is done by now."""
    done = [piece for piece in planned if piece.run_dir and state.get(piece.name, {}).get("code") == 0]
    runs = [run_figures(piece) for piece in done]
    if runs:
        write_csv(out / "train.csv", runs)
    atomic_io.write_text(out / "README.md", page(out, state, runs))


@functools.cache
def device_name() -> str:
    """This node's first device, as its driver names it, or what its CPU is."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return machine.device_name()


def folder_name(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the pieces and stop")
    parser.add_argument("--only", nargs="*", default=[], metavar="PIECE", help="these, done or not")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="runs, data and logs")
    parser.add_argument("--tiny", action="store_true", help="sizes to try the script itself on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
