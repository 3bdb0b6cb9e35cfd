"""The counts of trace.py by ZeRO stage, tensor-parallel size and phase; as a script, printed as a table.

    sweep.py                            the small model of the tests
    sweep.py zero2-tp2 zero3            cases that begin so
    sweep.py --config FILE [case ...]   another model: a minute a case where it has 24 layers
    sweep.py --write                    the small model's counts into expected.json, which the tests hold

Columns: kernels of the second micro-step and of the update, the optimizer's part of the step; waits for
device, stream or event of the second micro-step and of the whole step, and other waits of the host (values
read, pageable copies) of both; collectives, and bytes received, of the second and of the last micro-step, in
whose backward pass stages 0 and 1 reduce gradients, and of the update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
WORLD, MICRO_STEPS = 8, 3
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2+sp": (2, True)}
SMALL: dict[str, Any] = {
    "model": {"layers": 2, "width": 256, "heads": 4, "sequence": 128, "vocab": 512},
    "ffn": {"kind": "low_rank", "rank": 64},
    "train": {"steps": 10, "micro_batch_size": 2},
}


BUCKET = 250_000  # of the small model, so that it has several


class Case(NamedTuple):
    """One step that is counted."""

    stage: int
    layout: str  # of LAYOUTS
    guided: bool

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.layout}-{'guided' if self.guided else 'plain'}"


CASES = [Case(*case) for case in itertools.product(range(4), LAYOUTS, (False, True))]


def request(case: Case, tree: dict[str, Any]) -> dict[str, Any]:
    """What trace.py is asked for: ``tree`` with this stage, layout and phase, on WORLD ranks."""
    tensor, sequence = LAYOUTS[case.layout]
    train = dict(tree["train"])
    train["global_batch_size"] = train["micro_batch_size"] * MICRO_STEPS * WORLD // tensor
    changed = {
        "zero": {"stage": case.stage},
        "parallel": {"tensor": tensor, "sequence": sequence},
        "train": train,
        "guide": {"mode": "fixed_step", "fraction": 1.0} if case.guided else {"mode": "off"},
    }
    bucket = BUCKET if tree is SMALL else None
    return {"tree": tree | changed, "world": WORLD, "guided": case.guided, "bucket": bucket}


def count(cases: list[Case], tree: dict[str, Any], library: Path) -> dict[Case, dict[str, Any]]:
    """The counts of the cases, in a process tree of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "trace.py"), str(library)],
        input=json.dumps([request(case, tree) for case in cases]),
        env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-8000:])
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def calls(counts: dict[str, Any]) -> tuple[int, int]:
    """Collectives of a part of a step, and bytes received."""
    values = counts["collectives"].values()
    return sum(value[0] for value in values), sum(value[1] for value in values)


def waits(counts: dict[str, Any], kind: str) -> int:
    """How often the host waits in a part of a step."""
    return sum(counts[kind].values())


def row(case: Case, counts: dict[str, Any]) -> str:
    """A line of the table."""
    _, second, last = counts["micro"]
    update, parts = counts["update"], [*counts["micro"], counts["update"]]
    in_step = [sum(waits(part, kind) for part in parts) for kind in ("synchronize", "host_syncs")]
    return (
        f"| {case.stage} | {case.layout} | {'guided' if case.guided else 'plain'} "
        f"| {second['kernels']} | {update['kernels']} "
        f"| {waits(second, 'synchronize')} / {in_step[0]} | {waits(second, 'host_syncs')} / {in_step[1]} "
        f"| {calls(second)[0]} / {calls(last)[0]} / {calls(update)[0]} "
        f"| {calls(second)[1] / 1e6:.2f} / {calls(last)[1] / 1e6:.2f} / {calls(update)[1] / 1e6:.2f} |"
    )


HEAD = """| ZeRO | layout | phase | kernels micro | update | synchronize micro / step \
| other waits micro / step | collectives micro / last micro / update | MB micro / last micro / update |
|---|---|---|---|---|---|---|---|---|"""


def written(counts: dict[str, Any]) -> dict[str, Any]:
    """What expected.json says of a case."""
    _, second, last = counts["micro"]
    parts = {"micro": second, "last": last, "update": counts["update"]}
    waiting: Counter[str] = Counter()
    for part in (*counts["micro"], counts["update"]):
        waiting.update(part["synchronize"])
        waiting.update(part["host_syncs"])
    return {
        "kernels": {name: part["kernels"] for name, part in parts.items()},
        "collectives": {name: part["collectives"] for name, part in parts.items()},
        "waits": dict(sorted(waiting.items())),
    }


def as_json(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each part of each row."""
    texts = []
    for name, parts in rows.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
        texts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(texts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", nargs="*", help="beginnings of cases' names; default: all")
    parser.add_argument("--config", help="a config in place of the small model")
    parser.add_argument("--write", action="store_true", help="write expected.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from fake_cuda.device import compile_guard

    from sffn_dist.spec import loading

    tree = SMALL
    if arguments.config:
        tree = loading.load(arguments.config).model_dump(mode="json")
    found = {}
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        library = compile_guard(Path(folder))
        for case in CASES:
            if str(case).startswith(tuple(arguments.case or [""])):
                found[str(case)] = count([case], tree, library)[case]
                print(row(case, found[str(case)]), flush=True)
    if arguments.write:
        (HERE / "expected.json").write_text(as_json({name: written(found[name]) for name in found}))


if __name__ == "__main__":
    main()
