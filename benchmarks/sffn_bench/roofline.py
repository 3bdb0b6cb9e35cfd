"""A predicted time of a micro-step and of a step, part by part, from a config and a device's data sheet.

Standard library only: nothing here was measured, and no device is asked.

The time of a part is the sum over its launches of the larger of two bounds (device_work.py: memory traffic,
FLOPs; the efficiencies, which are assumed), what a launch reads and writes stands in model_work.py and
feed_forward_work.py. Rows add up: a micro-step is its parts and what the device waits for the host,

    max(launches x 5 us - time of the parts, 0)

and a step is its micro-steps and the update. Of one data-parallel rank: nothing is sent to others, and it
takes all micro-steps of a step. The guides of self-guided training take no part. MFU is that of a run:
FLOPs by counts.flops_per_token, over the time, over the data sheet's FLOP/s. The column ``flops`` differs
from it: causal attention is halved, and what is recomputed counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sffn_bench import device_work, model_work
from sffn_bench.device_work import DeviceRates, Work
from sffn_bench.model_work import ModelWork
from sffn_dist.spec import validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.counts import flops_per_token
from sffn_dist.spec.device_peaks import PEAK_MEMORY, peak_flops, peak_link, peak_memory

MICRO_STEP, UPDATE, STEP = "micro-step", "update", "step"
NOT_MEASURED = "nothing here was measured"
DIRECTIONS = {"forward": 0, "recomputed": 1, "backward": 2}

_STREAMED = f"memory at {device_work.STREAMING:g} of its data sheet"
_PRODUCTS = f"cuBLAS at {device_work.MATRIX:g} of the data sheet's FLOP/s"
_LINKED = f"link at {device_work.LINK:g} of its data sheet, beside nothing else"
# by a word of the part's name; the first that it holds counts
ASSUMPTIONS = (
    (model_work.COLLECTIVES, _LINKED),
    (model_work.ACCUMULATION, f"to fp32 and added, as in ZeRO 1; {_STREAMED}"),
    (model_work.LINEARS, f"{_PRODUCTS}; bias of qkv in passes of its own"),
    (model_work.ROTARY, f"Megatron's operations, unfused; {_STREAMED}"),
    (model_work.CORE, f"flash attention 2, causal half, at {device_work.ATTENTION:g} of the FLOP/s"),
    (model_work.RESIDUAL, f"bias and sum in passes of their own, no dropout; {_STREAMED}"),
    (model_work.OUTPUT, _PRODUCTS),
    (model_work.LOSS, f"vocabulary-parallel, fp32 logits; {_STREAMED}"),
    ("bias, activation", f"where no launch of a product does it; {_STREAMED}"),
    ("sums of weight gradients", f"in fp32 over 24ths of the tokens; {_STREAMED}"),
    ("dense FFN", _PRODUCTS),
    ("structured FFN", f"{_PRODUCTS}, or Triton at {device_work.TRITON:g} with bias and activation in it"),
    (model_work.NORM, f"no gradient is clipped; {_STREAMED}"),
    (model_work.CHECKS, "launches alone"),
    ("", _STREAMED),
)


def rates_of(
    name: str,
    *,
    flops: float | None = None,
    memory: float | None = None,
    link: float | None = None,
    linked: bool = True,
) -> DeviceRates:
    """A device by its name, or by what is given in place of its data sheet.

    ``linked``: whether anything is sent. Raises ConfigError for a device that is not known.
    """
    rates = {
        "--peak-tflops": flops or peak_flops(name, "bf16"),
        "--bandwidth": memory or peak_memory(name),
        "--link": link or peak_link(name) or (None if linked else math.inf),
    }
    if missing := [option for option, rate in rates.items() if rate is None]:
        known = ", ".join(PEAK_MEMORY)
        raise ConfigError([f"--device {name}: must be one of {known}; or give {', '.join(missing)}"])
    peak, bandwidth, received = (float(rate or 0) for rate in rates.values())
    return DeviceRates(name, peak, bandwidth, received)


def check(config: Config) -> None:
    """Raise ConfigError for a config whose time is not predicted."""
    problems = []
    if config.precision == "fp32":
        problems.append(
            'precision = "fp32": must be "auto" or "bf16", since the peaks of devices are of bf16'
        )
    if config.train.micro_batch_size == "auto":
        problems.append(
            'train.micro_batch_size = "auto": must be a number here; pretrain.py --plan --device-memory GIB '
            "says which fits"
        )
    if problems:
        raise ConfigError(problems)
    validation.check_precision(config, "bf16")
    validation.check_world(config, config.parallel.tensor)


@dataclass(frozen=True)
class Prediction:
    """Rows of the parts and of the totals; seconds of a micro-step and of a step."""

    rows: list[dict[str, Any]]
    micro_step: float
    step: float


def predict(config: Config, device: DeviceRates) -> Prediction:
    """Of one step on one data-parallel rank. Raises ConfigError as :func:`check` does."""
    check(config)
    model, tokens = ModelWork(config, device), config.micro_batch_size * config.model.sequence
    needed, steps = flops_per_token(config) / config.parallel.tensor, config.accumulation_steps(1)
    micro_rows = _rows(model.micro_step(), device, MICRO_STEP)
    micro = _total(micro_rows, MICRO_STEP, f"{tokens} tokens; {NOT_MEASURED}")
    update_rows = _rows(model.update(), device, UPDATE)
    update = _total(update_rows, UPDATE, "after the last micro-step")
    many = {**micro, **{key: micro[key] * steps for key in ("launches", "bytes", "flops", "ms")}}
    text = f"{steps} micro-steps and the update, one data-parallel rank; {NOT_MEASURED}"
    step = _total([many, update], STEP, text)
    for row, count in ((micro, tokens), (step, tokens * steps)):
        row["mfu"] = round(needed * count / (row["ms"] / 1e3) / device.flops, 4)
    rows = [*micro_rows, micro, *update_rows, update, step]
    return Prediction(rows, micro["ms"] / 1e3, step["ms"] / 1e3)


def predicted(config: Config, device_name: str, precision: str) -> Prediction | None:
    """For a run on a device of that name; None where its times are not predicted."""
    if precision != "bf16":
        return None
    try:
        return predict(config, rates_of(device_name))
    except ConfigError:
        return None


def _rows(works: Iterable[Work], device: DeviceRates, whole: str) -> list[dict[str, Any]]:
    """A row for each part, and one for what the device waits for the host."""
    parts: dict[str, list[Work]] = {}
    for work in works:
        parts.setdefault(work.part, []).append(work)
    # parts of the forward pass before those of the backward pass, each in their order
    parts = dict(sorted(parts.items(), key=lambda item: DIRECTIONS.get(item[0].split()[0], len(DIRECTIONS))))
    rows = [_row(part, of_part, device) for part, of_part in parts.items()]
    launches, busy = sum(row["launches"] for row in rows), sum(row["ms"] for row in rows)
    launching = 1e3 * device_work.LAUNCH_SECONDS * launches
    text = f"{1e6 * device_work.LAUNCH_SECONDS:g} us a launch: {launching:.3g} ms, beside the device's time"
    return [*rows, _columns(f"{whole}, waits for the host", 0, 0, 0, max(0.0, launching - busy), text)]


def _row(part: str, works: Sequence[Work], device: DeviceRates) -> dict[str, Any]:
    launches, moved, flops = (
        sum(getattr(work, name) for work in works) for name in ("launches", "bytes", "flops")
    )
    text = next(text for word, text in ASSUMPTIONS if word in part)
    return _columns(part, launches, moved, flops, 1e3 * device_work.total_seconds(works, device), text)


def _total(rows: Sequence[dict[str, Any]], part: str, text: str) -> dict[str, Any]:
    launches, moved, flops, ms = (
        sum(row[name] for row in rows) for name in ("launches", "bytes", "flops", "ms")
    )
    return _columns(part, launches, moved, flops, ms, text)


def _columns(part: str, launches: int, moved: int, flops: int, ms: float, assumption: str) -> dict[str, Any]:
    columns = {"part": part, "launches": launches, "bytes": moved, "flops": flops, "ms": float(f"{ms:.6g}")}
    return {**columns, "mfu": None, "assumption": assumption}
