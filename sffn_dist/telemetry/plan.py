"""What a run will be, before it starts: parameters, FLOPs, memory, tokens, phases, unused settings. Standard library only."""

from __future__ import annotations

import itertools
from typing import Any

from sffn_dist import machine, schedule, shapes
from sffn_dist.config import Config
from sffn_dist.rules import unused
from sffn_dist.telemetry.memory import memory_per_rank


def plan(config: Config, world: int) -> dict[str, Any]:
    """One JSON-ready object. Parameters and FLOPs without the guide stand under ``parameters`` and ``flops_per_step``.

    FLOPs are those of forward and backward (shapes.flops_per_token), not of recomputation; ``memory_per_rank`` is an estimate in bytes.
    """
    parts = shapes.parameters_by_part(config)
    guide = parts.pop("guide")
    ffn = parts["ffn_dense"] + parts["ffn_structured"]
    clock = schedule.of(config)
    step_tokens = config.tokens_per_step
    flops, guided = shapes.flops_per_token(config) * step_tokens, shapes.guide_flops_per_token(config) * step_tokens
    here = machine.ranks_here(otherwise=world)
    data_parallel = max(1, world // config.parallel.tensor)
    precision = machine.precision(config.precision, here)
    return {
        "run.dir": config.run.dir,
        "ffn": config.ffn.model_dump(mode="json", exclude_none=True),
        "ffn.kind": config.ffn.kind,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "guide_parameters": guide,
        "structured_share_of_ffn": parts["ffn_structured"] / ffn,
        "ffn_parameters_of_dense": ffn / _dense_ffn(config),
        "flops_per_step": flops,
        "guide_flops_per_guided_step": guided,
        "flops_total": round(flops * clock.total_steps + guided * clock.total_steps * clock.expected_guided_share()),
        "steps": clock.total_steps,
        "tokens_per_step": step_tokens,
        "tokens": step_tokens * clock.total_steps,
        "phases": _phases(clock),
        "precision": precision,
        "device": machine.device_name(here),
        "ranks": {"world": world, "tensor": config.parallel.tensor, "data": data_parallel},
        "accumulation_steps": config.accumulation_steps(data_parallel),
        "memory_per_rank": memory_per_rank(config, precision, data_parallel),
        "unused": unused(config),
    }


def _dense_ffn(config: Config) -> int:
    """Parameters of the same feed-forward layers were they all dense."""
    dense = config.model_copy(update={"ffn": config.ffn.model_copy(update={"kind": "dense"})})
    return shapes.parameters_by_part(dense)["ffn_dense"]


def _phases(clock: schedule.Schedule) -> list[dict[str, Any]]:
    edges = sorted({0, clock.guided_steps, clock.total_steps})
    return [
        {"phase": clock.at(first).phase, "first_step": first, "last_step": end - 1} for first, end in itertools.pairwise(edges)
    ]


def si(number: float, unit: str = "") -> str:
    """211_000_000 -> '211 M'."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def render(plan: dict[str, Any]) -> str:
    """The plan as a page for a terminal."""
    ffn, memory, ranks = plan["ffn"], plan["memory_per_rank"], plan["ranks"]
    sizes = ", ".join(f"{key} {ffn[key]}" for key in ("rank", "blocks") if key in ffn and f"ffn.{key}" not in plan["unused"])
    parts = ", ".join(f"{part} {si(count)}" for part, count in plan["parameters_by_part"].items() if count)
    guide = f" (+ guide {si(plan['guide_parameters'])} while it lasts)" if plan["guide_parameters"] else ""
    phases = ", ".join(f"{item['phase']} {item['first_step']}..{item['last_step']}" for item in plan["phases"])
    lines = [
        (
            "feed-forward",
            f"{ffn['kind']}{', ' + sizes if sizes else ''}: {plan['ffn_parameters_of_dense']:.0%} of the dense parameters",
        ),
        ("parameters", f"{si(plan['parameters'])}{guide}: {parts}"),
        ("structured", f"{plan['structured_share_of_ffn']:.0%} of the feed-forward parameters"),
        (
            "FLOPs a step",
            f"{si(plan['flops_per_step'])}, + {si(plan['guide_flops_per_guided_step'])} when guided; all {si(plan['flops_total'])}",
        ),
        ("steps", f"{plan['steps']} of {si(plan['tokens_per_step'])} tokens = {si(plan['tokens'])} tokens; {phases}"),
        (
            "ranks",
            f"{ranks['world']} = tensor {ranks['tensor']} x data {ranks['data']}, {plan['accumulation_steps']} micro-steps a step",
        ),
        ("precision", f"{plan['precision']} on {plan['device']}"),
        (
            "memory a rank",
            f"about {si(memory['total'], 'B')}: " + ", ".join(f"{k} {si(v, 'B')}" for k, v in memory.items() if k != "total"),
        ),
    ]
    lines += [("unused", f"{key}: {reason}") for key, reason in plan["unused"].items()]
    lines.append(("writes to", plan["run.dir"]))
    return "\n".join(f"  {name:<14} {text}" for name, text in lines)
