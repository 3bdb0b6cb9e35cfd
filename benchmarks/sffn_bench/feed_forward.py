"""Times one feed-forward layer on one device, and a training step of it.

As ``tools/bench.py ffn`` and ``step`` start it.

    ffn     mode forward: nothing is kept for backward
            mode forward_backward: gradients of the input and of all parameters
    step    mode training: forward, backward, and AdamW's step on the layer's parameters

Settings come as one JSON object in the first argument; the rows are printed as one JSON list.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sffn_kernels import dispatch
from torch import Tensor, nn

from sffn_bench import layers, one_layer, rows, sizes
from sffn_dist import strict_json
from sffn_dist.parallel import topology
from sffn_dist.spec.device_peaks import peak_flops, peak_memory

MODES: dict[str, tuple[sizes.Mode, ...]] = {"ffn": ("forward", "forward_backward"), "step": ("training",)}
# Passes in a row that make one time: on CUDA devices the next pass is prepared while one runs, as in
# training.
PASSES = {"cuda": 5, "cpu": 1}
WARMUP = {
    "cuda": 4,
    "cpu": 2,
}  # times that do not count; what is compiled or chosen by measuring is done in the first


class Case:
    """One layer by one provider, run in one mode over x (T, h), with dL/dy = ``sent``."""

    def __init__(
        self, layer: sizes.Layer, provider: str, module: nn.Module, mode: sizes.Mode, x: Tensor, sent: Tensor
    ):
        self.layer, self.provider, self.module, self.mode, self.x, self.sent = (
            layer,
            provider,
            module,
            mode,
            x,
            sent,
        )
        # so small a step that the weights stay what they are; its time does not depend on it
        self._optimizer = (
            torch.optim.AdamW(module.parameters(), lr=1e-9, fused=True) if mode == "training" else None
        )

    def clear(self) -> None:
        """Drop all gradients."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)

    def once(self) -> None:
        """One pass."""
        setting = layers.KERNELS.get(self.provider)
        with dispatch.using(setting) if setting else nullcontext():
            if self.mode == "forward":
                with torch.no_grad():
                    self.module(self.x)
                return
            self.clear()
            self.module(self.x).backward(self.sent)
            if self._optimizer:
                self._optimizer.step()

    def timed(self) -> float:
        """Seconds a pass; its gradients are gone afterwards."""
        passes = PASSES[self.x.device.type]
        wait(self.x.device)
        start = time.perf_counter()
        for _ in range(passes):
            self.once()
        wait(self.x.device)
        spent = (time.perf_counter() - start) / passes
        self.clear()
        return spent

    def peak_mb(self) -> float | None:
        """The most memory of a warm pass, in MB, beside x, dy, the weights and AdamW's moments.

        None on CPUs, which do not count it.
        """
        if self.x.device.type != "cuda":
            return None
        self.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.once()
        peak = torch.cuda.max_memory_allocated() - before
        self.clear()
        return rows.figures(peak / 1e6)


def wait(device: torch.device) -> None:
    """Return once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floor(
    layer: sizes.Layer, tokens: int, mode: sizes.Mode, dtype: torch.dtype, device: str
) -> dict[str, float | None]:
    """Columns gflop and gbytes, the least work, and floor_ms, what a device of that name needs for it at
    its peaks; None where unknown.
    """
    flops, moved = sizes.work(layer, tokens, mode, dtype.itemsize)
    rate, memory = peak_flops(device, "bf16" if dtype == torch.bfloat16 else "fp32"), peak_memory(device)
    least = rows.figures(1e3 * max(flops / rate, moved / memory)) if rate and memory else None
    return {"gflop": rows.figures(flops / 1e9), "gbytes": rows.figures(moved / 1e9), "floor_ms": least}


def cases(op: str, width: int, settings: dict[str, Any], device: torch.device) -> list[Case]:
    """Every layer of a width by every provider in every mode.

    Recomputation makes a difference only with a backward pass.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, sent = (torch.randn(settings["tokens"], width, dtype=dtype, device=device) for _ in range(2))
    x.requires_grad_()
    return [
        Case(layer, provider, module, mode, x, sent)
        for layer in sizes.layers(width, settings["kinds"], settings["shares"])
        for provider, module in layers.providers(layer, device).items()
        for mode in MODES[op]
        if mode != "forward" or provider != "ours_bottleneck"
    ]


def measure(op: str, width: int, settings: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Rows of one width, a mode after the other; within a mode all layers and providers take turns."""
    torch.compiler.reset()  # each width is compiled for itself
    found = []
    everything = cases(op, width, settings, device)
    for mode in MODES[op]:
        here = {str(i): case for i, case in enumerate(everything) if case.mode == mode}
        times = rows.interleaved(
            {i: case.timed for i, case in here.items()}, settings["repeats"], WARMUP[device.type]
        )
        dense = next(statistics.median(times[i]) for i, case in here.items() if case.provider == "dense")
        found += [row(op, case, times[i], dense, settings) for i, case in here.items()]
    return found


def row(op: str, case: Case, times: list[float], dense: float, settings: dict[str, Any]) -> dict[str, Any]:
    """One case's row; ``dense`` is the dense layer's median of the same turns, in seconds."""
    shape = case.layer.columns(settings["tokens"])
    ran = {"dtype": str(case.x.dtype).removeprefix("torch."), "threads": settings["threads"]}
    more = {"speedup_over_dense": rows.figures(dense / statistics.median(times)), "peak_mb": case.peak_mb()}
    least = floor(case.layer, settings["tokens"], case.mode, case.x.dtype, rows.device())
    return rows.row(op, case.provider, case.mode, {**shape, **ran}, times, **more, **least)


def main() -> None:
    """All widths."""
    settings = json.loads(sys.argv[1])
    device = one_layer.alone(settings["threads"]).device
    with dispatch.measuring_into(Path(settings["table"]) if settings["table"] else None):
        found = [
            row for width in settings["widths"] for row in measure(settings["op"], width, settings, device)
        ]
    print(strict_json.dumps(found), flush=True)
    topology.destroy()


if __name__ == "__main__":
    main()
