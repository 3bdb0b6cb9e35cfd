"""Times a feed-forward layer for few tokens, forward alone, as generation runs it.

As ``tools/bench.py decode`` starts it.

    dense   F.linear, gelu, F.linear
    torch   the structure's map in plain torch
    ours    sffn_kernels.decode, where the package has it

A model's layers are all read once a token, so a layer's weights are never in a cache when they are needed.
Here too: a time is that of layers with weights of their own, one after the other, as many as make BYTES (at
most MOST), divided by their number. On CUDA devices they are captured in one graph, whose replay is timed.

Settings come as one JSON object in the first argument; the rows are printed as one JSON list.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sffn_kernels import dispatch
from torch import Tensor

from sffn_bench import one_layer, rows, sizes
from sffn_bench.feed_forward import floor, wait
from sffn_dist import strict_json
from sffn_dist.parallel import topology
from sffn_dist.structured import functional

BYTES, MOST = 256 << 20, 64  # several times the caches of today's devices
PASSES = {"cuda": 20, "cpu": 1}  # replays in a row that make one time
WARMUP = {"cuda": 4, "cpu": 2}

Weights = tuple[Tensor, ...]  # of each linear its factors, first-applied first, and its bias
Forward = Callable[[Tensor, Weights], Tensor]


def stack(layer: sizes.Layer, dtype: torch.dtype, device: torch.device) -> list[Weights]:
    """Small random weights of as many layers as are timed together."""
    h, f, structure = layer.width, layer.inner, layer.structure
    shapes = [*structure.factor_shapes(h, f).values(), (f,), *structure.factor_shapes(f, h).values(), (h,)]
    count = min(MOST, math.ceil(BYTES / (layer.parameters * dtype.itemsize)))
    return [
        tuple(torch.randn(shape, dtype=dtype, device=device) * 0.02 for shape in shapes) for _ in range(count)
    ]


def dense(x: Tensor, weights: Weights) -> Tensor:
    """y = W2 gelu(W1 x + b1) + b2: x and y (T, h), W1 (f, h), W2 (h, f)."""
    weight1, bias1, weight2, bias2 = weights
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def providers(layer: sizes.Layer) -> dict[str, Forward]:
    """Functions (x (T, h), weights) -> y (T, h) that compute the layer."""
    if layer.structure.dense:
        return {"dense": dense}
    h, f, structure = layer.width, layer.inner, layer.structure
    names1, names2 = structure.factor_shapes(h, f), structure.factor_shapes(f, h)

    def plain(x: Tensor, weights: Weights) -> Tensor:
        first, bias1, second, bias2 = weights[:2], weights[2], weights[3:5], weights[5]
        y = functional.apply(structure, x, dict(zip(names1, first, strict=True))) + bias1
        return (
            functional.apply(structure, F.gelu(y, approximate="tanh"), dict(zip(names2, second, strict=True)))
            + bias2
        )

    if not importlib.util.find_spec("sffn_kernels.decode"):
        return {"torch": plain}
    kernels: Any = importlib.import_module("sffn_kernels.decode")
    return {"torch": plain, "ours": lambda x, weights: kernels.feed_forward(x, *weights, "gelu")}


def through(forward: Forward, x: Tensor, layers: Sequence[Weights]) -> Tensor:
    """The output of one layer after the other."""
    for weights in layers:
        x = forward(x, weights)
    return x


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A replay of what ``run`` puts on the CUDA device.

    What is chosen by measuring is chosen before the capture.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, stream=beside
    ):  # where decoding's counters are: a new stream would have none
        run()
    return graph.replay


def case(provider: str, forward: Forward, x: Tensor, layers: Sequence[Weights]) -> Callable[[], float]:
    """A function that returns the seconds that a layer takes."""

    def run() -> None:
        with torch.no_grad(), dispatch.using("auto" if provider == "ours" else "torch"):
            through(forward, x, layers)

    kind = x.device.type
    once, passes = (captured(run) if kind == "cuda" else run), PASSES[kind]

    def timed() -> float:
        wait(x.device)
        start = time.perf_counter()
        for _ in range(passes):
            once()
        wait(x.device)
        return (time.perf_counter() - start) / passes / len(layers)

    return timed


def measure(width: int, settings: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Rows of one width, a number of tokens after the other."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stacks = [
        (layer, stack(layer, dtype, device))
        for layer in sizes.layers(width, settings["kinds"], settings["shares"])
    ]
    found = []
    for tokens in settings["batch"]:
        x = torch.randn(tokens, width, dtype=dtype, device=device)
        runs = [
            (layer, len(weights), provider, case(provider, forward, x, weights))
            for layer, weights in stacks
            for provider, forward in providers(layer).items()
        ]
        turns = {str(i): timed for i, (*_, timed) in enumerate(runs)}
        times = rows.interleaved(turns, settings["repeats"], WARMUP[device.type])
        dense_median = statistics.median(times["0"])  # the dense layer comes first
        for (layer, count, provider, _), some in zip(runs, times.values(), strict=True):
            ran = {
                "dtype": str(dtype).removeprefix("torch."),
                "threads": settings["threads"],
                "layers": count,
            }
            more = {"speedup_over_dense": rows.figures(dense_median / statistics.median(some))}
            least = floor(layer, tokens, "forward", dtype, rows.device())
            found.append(
                rows.row(
                    "decode", provider, "forward", {**layer.columns(tokens), **ran}, some, **more, **least
                )
            )
    return found


def main() -> None:
    """All widths."""
    settings = json.loads(sys.argv[1])
    device = one_layer.alone(settings["threads"]).device
    with dispatch.measuring_into(Path(settings["table"]) if settings["table"] else None):
        found = [row for width in settings["widths"] for row in measure(width, settings, device)]
    print(strict_json.dumps(found), flush=True)
    topology.destroy()


if __name__ == "__main__":
    main()
