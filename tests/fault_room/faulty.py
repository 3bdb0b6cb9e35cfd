"""pretrain.py with a fault: the launcher starts this in its place.

The environment's FAULT says which, on which rank, at which step.

The run itself is the product's: what is broken here is one rank's step, batch, weight, gradient or command
line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sffn_dist import pretrain
from sffn_dist.launch import cli

FAULT: dict[str, Any] = json.loads(os.environ["FAULT"])
RANK = int(os.environ.get("RANK", "0"))
HERE = FAULT.get("rank", RANK) == RANK


def mark() -> None:
    """When it happened, for whoever measures how long it goes unseen."""
    path = Path(os.environ["FAULT_MARK"])
    if not path.exists():
        path.write_text(str(time.time()))


def break_steps() -> None:
    """Wrap the loop's step: some steps of some rank go wrong."""
    import torch

    from sffn_dist.training import loop

    train_step = loop.train_step

    def broken(run: Any) -> Any:
        if not (HERE and FAULT["step"] <= run.step < FAULT["step"] + FAULT.get("steps", 1)) or FAULT.get(
            "done"
        ):
            return train_step(run)
        mark()
        kind = FAULT["kind"]
        first = next(run.model.parameters())
        if kind == "exception":
            raise ValueError("an injected fault")
        if kind == "hang":
            time.sleep(3600)
        if kind == "tamper":
            FAULT["done"] = True
            with torch.no_grad():
                dict(run.model.named_parameters())["decoder.layers.0.mlp.linear_fc1.bias"][3] += 1e-3
        hook = first.register_hook(lambda gradient: gradient * float("nan")) if kind == "nan" else None
        usual = run.batches
        if kind == "spike":
            run.batches = Noise(usual)
        if kind == "slow":
            run.batches = Slow()
        result = train_step(run)
        if hook:
            hook.remove()
        run.batches = usual
        return result

    loop.train_step = broken


class Slow:
    """Batches that take longer than any launcher waits."""

    def at(self, *place: Any, **more: Any) -> Any:
        time.sleep(120.0)


class Noise:
    """Batches of random tokens: their loss is that of no knowledge at all."""

    def __init__(self, batches: Any):
        self._batches, self.tokens = batches, batches.tokens

    def at(self, *place: Any, **more: Any) -> Any:
        import numpy as np

        generator = np.random.default_rng(7)
        return [generator.integers(0, 512, np.shape(part)) for part in self._batches.at(*place, **more)]


def block_preparation() -> None:
    """The preparing rank gets one document and then waits, while it trains a tokenizer (the main thread is in
    the library's C then, and asks for text in another) or while it encodes.
    """
    from sffn_dist.data import build

    documents, passes = build.documents, iter(("tokenizer training", "encoding"))

    def blocked(*args: Any) -> Any:
        if next(passes) != FAULT["kind"]:
            yield from documents(*args)
            return
        yield next(documents(*args))
        mark()
        time.sleep(120.0)

    build.documents = blocked


if __name__ == "__main__":
    if FAULT["kind"] in ("tokenizer training", "encoding"):
        block_preparation()
    elif FAULT["kind"] == "config":
        if HERE:
            sys.argv.append("train.learning_rate=0.123")
            mark()
    elif FAULT["kind"] != "none":
        break_steps()
    cli.end_process(pretrain.main())
