"""What a run will be, before it starts: parameters, FLOPs, memory, tokens, phases, unused settings.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sffn_dist.spec import changes, counts, machine, memory, micro_batch, schedule, traffic
from sffn_dist.spec.config import Config
from sffn_dist.spec.profiled_steps import describe
from sffn_dist.spec.validation import unused_settings
from sffn_dist.structured.registry import DENSE


def plan(
    config: Config, world: int, device_memory: int | None = None, micro_batch_reason: str = ""
) -> dict[str, Any]:
    """One JSON-ready object.

    ``device_memory``: bytes of the CUDA devices that the plan is for, instead of what this machine has.
    ``micro_batch_reason``: why train.micro_batch_size is what it is, where somebody chose it.

    Parameters and FLOPs without the guide stand under ``parameters`` and ``flops_per_step``.

    FLOPs are those of forward and backward (counts.flops_per_token), not of recomputation;
    ``memory_per_rank`` is in bytes (memory.py). Raises ConfigError where ``auto`` finds no micro-batch that
    fits.
    """
    target = micro_batch.target_of(config, world, device_memory)
    if config.train.micro_batch_size == "auto":
        choice = micro_batch.choose(config, target)
        config, micro_batch_reason = micro_batch.with_size(config, choice.size), choice.reason
    parts = counts.parameters_by_part(config)
    ffn = parts["ffn_dense"] + parts["ffn_structured"]
    run_schedule = schedule.build_schedule(config)
    step_tokens = config.tokens_per_step
    guided = run_schedule.guided_steps > 0
    local_ranks = machine.ranks_here(otherwise=world)
    data_parallel, precision = target.data_parallel, target.precision
    return {
        "run.dir": config.run.dir,
        "ffn": config.ffn.model_dump(mode="json", exclude_none=True),
        "ffn.kind": config.ffn.kind,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "guide_parameters": counts.guide_parameters(config) if guided else 0,
        "structured_share_of_ffn": parts["ffn_structured"] / ffn,
        "ffn_parameters_of_dense": ffn / _dense_ffn(config),
        "flops_per_step": counts.flops_per_token(config) * step_tokens,
        "guide_flops_per_guided_step": counts.guide_flops_per_token(config) * step_tokens if guided else 0,
        "flops_total": schedule.flops(config),
        "flops_of_dense": schedule.flops(config) / schedule.flops(counts.all_dense(config)),
        "steps": run_schedule.total_steps,
        "tokens_per_step": step_tokens,
        "tokens": step_tokens * run_schedule.total_steps,
        "guided_steps_share": run_schedule.guided_steps / run_schedule.first_pass,
        "phases": _phases(config, target),
        "precision": precision,
        "device": f"cuda, {si(device_memory, 'B')}" if device_memory else machine.device_name(local_ranks),
        "ranks": {"world": world, "tensor": config.parallel.tensor, "data": data_parallel},
        "accumulation_steps": config.accumulation_steps(data_parallel),
        "micro_batch": micro_batch.summary(config, target, micro_batch_reason),
        "memory_per_rank": micro_batch.memory(config, target),
        "zero": {"stage": config.zero.stage, "reduce_dtype": config.zero.reduces_in(precision)},
        "communication": communication(config, precision, data_parallel),
        "checkpoint_bytes": checkpoint_bytes(config, guide=guided),
        "checkpoint": config.checkpoint.model_dump(mode="json"),
        "changes": [text for _, text in changes.described(config)],
        "unused": unused_settings(config),
        "profile": describe(config, run_schedule.total_steps),
    }


def checkpoint_bytes(config: Config, *, guide: bool) -> int:
    """Of one checkpoint, and while it is written in the background of host memory over all ranks: fp32
    weight and two moments.
    """
    return 12 * (counts.parameters(config) + (counts.guide_parameters(config) if guide else 0))


def communication(config: Config, precision: str, data_parallel: int) -> dict[str, Any]:
    """What a rank receives (spec/traffic.py). From its tensor-parallel group: elements and bytes of a
    micro-batch by layer, of a step in all. From its data-parallel group: bytes of a step.

    ``guide`` is what the guides add where they are drawn, ``all_dense`` what the same model with dense
    feed-forward layers receives. ``data_parallel``: ZeRO's, while the guide lasts, if it does.
    """
    size, steps = 2 if precision == "bf16" else 4, config.accumulation_steps(data_parallel)
    layers = range(config.model.layers)
    guided = [*layers] if schedule.build_schedule(config).guided_steps else []
    guides = [moved for layer in guided for moved in traffic.layer_traffic(config, layer, guide=True)]
    return {
        "layers": [
            {
                "layer": layer,
                "ffn": config.kind_of_layer(layer),
                **{
                    place: _received(transfers, size)
                    for place, transfers in _by_linear(traffic.layer_traffic(config, layer)).items()
                },
            }
            for layer in layers
        ],
        "step": _received(traffic.step_traffic(config, data_parallel), size),
        "guide": _received(guides, size, steps),
        "all_dense": _received(traffic.step_traffic(counts.all_dense(config), data_parallel), size),
        "data_parallel": _by_purpose(
            traffic.zero_traffic(config, precision, data_parallel, guide=bool(guided))
        ),
    }


def _by_linear(moved: list[traffic.Transfer]) -> dict[str, list[traffic.Transfer]]:
    """Attention's, both feed-forward linears', and the rest, which is the norms' gradients."""
    places: dict[str, list[traffic.Transfer]] = {
        "attention": [],
        "linear_fc1": [],
        "linear_fc2": [],
        "norms": [],
    }
    for transfer in moved:
        part = (
            "attention"
            if transfer.place.startswith("self_attention")
            else transfer.place.removeprefix("mlp.").split(".")[0]
        )
        places[part if part in places else "norms"].append(transfer)
    return places


def _by_purpose(moved: list[traffic.Transfer]) -> dict[str, float]:
    """Bytes of gradients, of weights, and of both; each transfer says its elements' size."""
    found = {
        purpose: float(sum(t.elements * (t.size or 0) for t in moved if t.purpose == purpose))
        for purpose in ("gradient", "weights")
    }
    return {**found, "bytes": sum(found.values())}


def _received(moved: list[traffic.Transfer], size: int, times: int = 1) -> dict[str, float]:
    """Elements by purpose, and bytes."""
    elements = {
        purpose: float(times * traffic.total(moved, purpose))
        for purpose in ("forward", "backward", "gradient")
    }
    return {
        **elements,
        "bytes": float(times * sum(transfer.elements * (transfer.size or size) for transfer in moved)),
    }


def _dense_ffn(config: Config) -> int:
    """Parameters of the same feed-forward layers were they all dense."""
    return counts.parameters_by_part(counts.all_dense(config))["ffn_dense"]


def _phases(config: Config, target: micro_batch.Target) -> list[dict[str, Any]]:
    """The phases in order: steps, tokens, expected FLOPs over all ranks, and a rank's memory, the guide's
    included while it lasts.
    """
    return [
        {
            "phase": phase.name,
            "first_step": phase.first,
            "last_step": phase.end - 1,
            "steps": phase.end - phase.first,
            "tokens": (phase.end - phase.first) * config.tokens_per_step,
            "flops": schedule.flops(config, phase),
            "memory": micro_batch.memory(config, target, guide=phase.name == "guided")["total"],
        }
        for phase in schedule.build_schedule(config).phases()
    ]


def _phase_line(phase: dict[str, Any], plan: dict[str, Any]) -> str:
    share = f" ({plan['guided_steps_share']:.3f} of train.steps)" if phase["phase"] == "guided" else ""
    steps = f"steps {phase['first_step']}..{phase['last_step']}{share}, {si(phase['tokens'])} tokens"
    return f"{steps}, {si(phase['flops'])} FLOPs, {si(phase['memory'], 'B')} a rank"


def _memory_lines(held: dict[str, int]) -> Iterator[str]:
    """What a rank's tensors take, and what a device holds besides."""
    tensors = ", ".join(
        f"{part} {si(size, 'B')}"
        for part, size in held.items()
        if part != "total" and part not in memory.BESIDES
    )
    yield f"about {si(held['total'], 'B')}: {tensors}"
    if "cuda_context" in held:
        yield (
            f"besides the tensors, assumed and not measured: CUDA context {si(held['cuda_context'], 'B')}, "
            f"NCCL buffers {si(held['nccl_buffers'], 'B')}, allocator slack {memory.ALLOCATOR_SLACK:.0%}, "
            f"{si(held['allocator_slack'], 'B')}"
        )


def _received_line(plan: dict[str, Any]) -> str:
    received = {key: plan["communication"][key]["bytes"] for key in ("step", "guide", "all_dense")}
    guide = f", + {si(received['guide'], 'B')} where guides are drawn" if received["guide"] else ""
    dense = f" (all dense: {si(received['all_dense'], 'B')})" if plan["ffn"]["kind"] != DENSE else ""
    return (
        f"{si(received['step'], 'B')} a rank and step by tensor parallelism{dense}{guide}; "
        f"{_layer_line(plan)}"
    )


def _data_parallel_line(plan: dict[str, Any]) -> str:
    received = plan["communication"]["data_parallel"]
    return (
        f"{si(received['bytes'], 'B')} a rank and step by data parallelism, ZeRO {plan['zero']['stage']}: "
        f"gradients {si(received['gradient'], 'B')} in {plan['zero']['reduce_dtype']}, "
        f"weights {si(received['weights'], 'B')}"
    )


def _checkpoint_line(plan: dict[str, Any]) -> str:
    size, settings = plan["checkpoint_bytes"], plan["checkpoint"]
    frequency = f"every {settings['interval']} steps" if settings["interval"] else "at the end"
    forever = ""
    if settings["keep_every"] and settings["interval"]:
        # of the steps that are saved, those that checkpoint.keep_every divides
        forever = f", and every {math.lcm(settings['interval'], settings['keep_every'])} steps for good"
    disk = (
        f"{settings['keep']} kept{forever}, {si((settings['keep'] + 1) * size, 'B')} of disk while one is "
        f"written"
    )
    if not settings["asynchronous"]:
        return f"{si(size, 'B')} {frequency}; {disk}"
    # ranks that write: under ZeRO 0 the data-parallel ranks hold the same
    writers = plan["ranks"]["world" if plan["zero"]["stage"] else "tensor"]
    pinned = "pinned host memory" if plan["device"].startswith("cuda") else "host memory"
    return (
        f"{si(size, 'B')} {frequency}; {disk}; "
        f"copied first, to about {si(size / writers, 'B')} of {pinned} a rank, kept for the next one"
    )


def _layer_line(plan: dict[str, Any]) -> str:
    """What the feed-forward linears of one layer of each kind receive in a micro-batch."""
    kinds = {layer["ffn"]: layer for layer in plan["communication"]["layers"]}
    sums = {
        kind: layer["linear_fc1"]["bytes"] + layer["linear_fc2"]["bytes"] for kind, layer in kinds.items()
    }
    return "a micro-batch's FFN: " + ", ".join(f"{kind} {si(amount, 'B')}" for kind, amount in sums.items())


def si(number: float, unit: str = "") -> str:
    """211_000_000 -> '211 M'."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def data_lines(data: dict[str, Any] | None) -> Iterator[str]:
    """What the run reads, where the plan was asked for it (data/overview.py)."""
    if data is None:
        return
    yield from (f"{data['source']} {line}" for line in data["contents"])
    if data["epochs"] is None:
        yield f"{data['source']}: not prepared yet; its tokens and the passes over them are known once it is"
        return
    yield (
        f"{data['source']}: {si(data['train_tokens'])} tokens to train on, {si(data['heldout_tokens'])} held "
        f"out; the run passes over the training data {data['epochs']:.3g} times"
    )
    if any(data["skipped"].values()):
        yield "skipped: " + ", ".join(
            f"{n} {key.replace('_', ' ')}" for key, n in data["skipped"].items() if n
        )


def render(plan: dict[str, Any]) -> str:
    """The plan as a page for a terminal."""
    ffn, ranks = plan["ffn"], plan["ranks"]
    sizes = ", ".join(
        f"{key} {ffn[key]}" for key in ("rank", "blocks") if key in ffn and f"ffn.{key}" not in plan["unused"]
    )
    parts = ", ".join(f"{part} {si(count)}" for part, count in plan["parameters_by_part"].items() if count)
    guide = f" (+ guide {si(plan['guide_parameters'])} while it lasts)" if plan["guide_parameters"] else ""
    lines = [
        (
            "feed-forward",
            f"{ffn['kind']}{', ' + sizes if sizes else ''}: {plan['ffn_parameters_of_dense']:.0%} of the "
            f"dense parameters",
        ),
        ("parameters", f"{si(plan['parameters'])}{guide}: {parts}"),
        ("structured", f"{plan['structured_share_of_ffn']:.0%} of the feed-forward parameters"),
        (
            "FLOPs a step",
            f"{si(plan['flops_per_step'])}, + {si(plan['guide_flops_per_guided_step'])} when guided; "
            f"all {si(plan['flops_total'])}, {plan['flops_of_dense']:.1%} of the dense model's",
        ),
        ("steps", f"{plan['steps']} of {si(plan['tokens_per_step'])} tokens = {si(plan['tokens'])} tokens"),
        *(
            (item["phase"], _phase_line(item, plan))
            for item in plan["phases"]
            if len(plan["phases"]) > 1 or plan["guided_steps_share"]
        ),
        *(("data", line) for line in data_lines(plan.get("data"))),
        (
            "ranks",
            f"{ranks['world']} = tensor {ranks['tensor']} x data {ranks['data']}, "
            f"{plan['accumulation_steps']} micro-steps a step",
        ),
        ("precision", f"{plan['precision']} on {plan['device']}"),
        *(("micro-batch", line) for line in micro_batch.lines(plan["micro_batch"])),
        *(("memory a rank", line) for line in _memory_lines(plan["memory_per_rank"])),
    ]
    if ranks["tensor"] > 1:
        lines.append(("received", _received_line(plan)))
    if ranks["data"] > 1:
        lines.append(("received", _data_parallel_line(plan)))
    lines.append(("checkpoints", _checkpoint_line(plan)))
    lines += [("changed", text) for text in plan["changes"]]
    lines += [("unused", f"{key}: {reason}") for key, reason in plan["unused"].items()]
    if plan["profile"]:
        lines.append(("profile", plan["profile"]))
    lines.append(("writes to", plan["run.dir"]))
    return "\n".join(f"  {name:<14} {text}" for name, text in lines)
