"""What joins several keys of a config: rules between them, which of them a run uses, which make it the run it is.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config, ConfigError, Guide, defaults, flatten


def problems(config: Config) -> Iterable[str]:
    """Rules that join several keys. Yields a message for each one broken."""
    sizes = [*_attention_rules(config), *_ffn_rules(config), *_tensor_parallel_rules(config)]
    yield from sizes
    if not sizes and config.structured:  # FLOPs are those of sizes that fit
        yield from _guide_rules(config)
    if config.recompute == "bottleneck" and not config.structured:
        yield "recompute = bottleneck: there is no structured feed-forward layer, whose bottleneck could be kept; use none or full"
    if config.train.global_batch_size % config.train.micro_batch_size:
        yield (
            f"train.micro_batch_size = {config.train.micro_batch_size}: must divide "
            f"train.global_batch_size = {config.train.global_batch_size}"
        )


def _divides(key: str, value: int, name: str, whole: int) -> Iterable[str]:
    if whole % value:
        yield f"{key} = {value}: must divide {name} = {whole}"


def _attention_rules(config: Config) -> Iterable[str]:
    model = config.model
    dim_key = "model.attention_dim" if model.attention_dim else "model.width"
    yield from _divides("model.heads", model.heads, dim_key, config.attention_dim)
    yield from _divides("model.kv_heads", config.kv_heads, "model.heads", model.heads)
    if config.attention_dim % model.heads == 0 and config.head_dim % 2:
        yield (
            f"{dim_key} = {config.attention_dim}: head size {config.head_dim} ({dim_key} / model.heads) must be even, "
            "rotary embeddings turn pairs"
        )


def _ffn_rules(config: Config) -> Iterable[str]:
    ffn, h, f = config.ffn, config.model.width, config.ffn_width
    for layer in ffn.dense_layers:
        if layer >= config.model.layers:
            yield f"ffn.dense_layers holds {layer}: must be below model.layers = {config.model.layers}"
    if ffn.kind in ("low_rank", "block_dense"):
        if ffn.rank is None:
            yield f'ffn.rank: missing; ffn.kind = "{ffn.kind}" needs it'
        elif ffn.rank > min(h, f):
            yield f"ffn.rank = {ffn.rank}: must not exceed min(model.width, ffn.width) = {min(h, f)}"
    if ffn.kind in ("block_shuffle", "block_dense"):
        if ffn.blocks is None:
            yield f'ffn.blocks: missing; ffn.kind = "{ffn.kind}" needs it'
            return
        yield from _divides("ffn.blocks", ffn.blocks, "model.width", h)
        yield from _divides("ffn.blocks", ffn.blocks, "ffn.width", f)
        if ffn.kind == "block_dense" and ffn.rank is not None:
            yield from _divides("ffn.blocks", ffn.blocks, "ffn.rank", ffn.rank)


def _tensor_parallel_rules(config: Config) -> Iterable[str]:
    p, ffn = config.parallel.tensor, config.ffn
    if p == 1:
        return

    def multiple(key: str, value: int) -> Iterable[str]:
        if value % p:
            yield f"{key} = {value}: must be divisible by parallel.tensor = {p}"

    yield from multiple("model.heads", config.model.heads)
    yield from multiple("model.kv_heads", config.kv_heads)
    yield from multiple("model.vocab", config.model.vocab)
    yield from multiple("ffn.width", config.ffn_width)
    if config.parallel.sequence:
        yield from multiple("model.sequence", config.model.sequence)
    if ffn.kind in ("block_shuffle", "block_dense") and ffn.blocks is not None:
        if ffn.blocks % p and p % ffn.blocks:
            yield f"ffn.blocks = {ffn.blocks}: must be divisible by parallel.tensor = {p}, or divide it"
        elif ffn.kind == "block_shuffle" and config.ffn_width % ffn.blocks**2:
            yield (
                f"ffn.blocks = {ffn.blocks}: its square must divide ffn.width = {config.ffn_width} under tensor parallelism "
                "(the shuffled features of a block must fall into whole blocks of the next factor)"
            )
        elif p > ffn.blocks and (config.ffn_width // ffn.blocks) % (p // ffn.blocks):
            yield f"ffn.width / ffn.blocks = {config.ffn_width // ffn.blocks}: must be divisible by {p // ffn.blocks}"


def _guide_rules(config: Config) -> Iterable[str]:
    guide, steps = config.guide, config.train.steps
    if guide.mode == "window":
        end = steps if guide.end is None else guide.end
        end_key = "train.steps" if guide.end is None else "guide.end"
        if guide.begin >= end:
            yield f"guide.begin = {guide.begin}: must be below {end_key} = {end}"
        if end > steps:
            yield f"guide.end = {end}: must not exceed train.steps = {steps}"
    if guide.mode == "fixed_flop":
        share = schedule.equal_flops_fraction(config)
        if share <= 0:
            yield (
                'guide.mode = "fixed_flop": the structured model costs as many FLOPs as the dense one, which leaves none for a guide; '
                "lower ffn.rank, raise ffn.blocks, or use fixed_step"
            )
        elif share > 1:
            yield (
                f'guide.mode = "fixed_flop": what the structured model saves guides {share:.2f} x train.steps, must be at most 1; '
                "use fixed_step, or guide.stochastic=false"
            )


def check_world(config: Config, world: int) -> None:
    """Refuse a number of ranks that the layout does not fit; raises ConfigError."""
    p, train = config.parallel.tensor, config.train
    if world % p:
        raise ConfigError(
            [
                f"parallel.tensor = {p}: must divide the number of ranks, {world} "
                f"(start {p} ranks with `deepspeed --num_gpus {p} ...`, or set parallel.tensor=1)"
            ]
        )
    per_pass = train.micro_batch_size * (world // p)
    if train.global_batch_size % per_pass:
        raise ConfigError(
            [
                f"train.global_batch_size = {train.global_batch_size}: must be a multiple of train.micro_batch_size x "
                f"data-parallel ranks = {train.micro_batch_size} x {world // p} = {per_pass}"
            ]
        )


def unused_settings(config: Config) -> dict[str, str]:
    """Settings that this run does not use, with the reason; shown by the plan."""
    notes: dict[str, str] = {}
    kind = config.ffn.kind
    if config.ffn.rank is not None and kind in ("dense", "block_shuffle"):
        notes["ffn.rank"] = f"ffn.kind = {kind} has no rank"
    if config.ffn.blocks is not None and kind in ("dense", "low_rank"):
        notes["ffn.blocks"] = f"ffn.kind = {kind} has no blocks"
    notes.update(_unused_guide(config))
    if kind != "dense" and not config.structured:
        notes["ffn.kind"] = "ffn.dense_layers leaves no structured layer"
    if config.parallel.sequence and config.parallel.tensor == 1:
        notes["parallel.sequence"] = "parallel.tensor = 1 splits nothing"
    return notes


def _why_no_step_is_guided(config: Config) -> str:
    if config.ffn.kind == "dense":
        return "a dense FFN has nothing to guide"
    if not config.structured:
        return "ffn.dense_layers leaves no structured layer"
    fraction = config.guide.fraction if config.guide.mode == "fixed_step" else schedule.equal_flops_fraction(config)
    return f"a fraction of {fraction:.3g} of train.steps = {config.train.steps} guides no step"


def _unused_guide(config: Config) -> dict[str, str]:
    mode, notes = config.guide.mode, {}
    guided = schedule.build_schedule(config).guided_steps > 0
    if mode != "off" and not guided:
        notes["guide.mode"] = _why_no_step_is_guided(config)
    usual = defaults()
    for key in sorted(GUIDE_KEYS - _used_guide_keys(config)):
        if flatten(config)[key] != usual[key]:
            notes[key] = f"guide.mode = {mode} does not read it" if guided else "no guide"
    return notes


GUIDE_KEYS = {f"guide.{key}" for key in Guide.model_fields} - {"guide.mode"}


def _used_guide_keys(config: Config) -> set[str]:
    """Settings of the guide that decide something in this run."""
    if not schedule.build_schedule(config).guided_steps:
        return set()
    by_mode = {"fixed_step": {"guide.fraction"}, "window": {"guide.begin", "guide.end"}}
    return {"guide.schedule", "guide.stochastic", *by_mode.get(config.guide.mode, ())}


# Restarting a run with another value of these would continue another run: they are compared with what run.dir holds.
IDENTITY = ("model", "ffn", "guide", "data", "train", "init_from")
FREE = ("train.micro_batch_size", "data.dir")


def identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value of everything that must stay equal between restarts of one run.

    What the run does not use is left out, whatever its value: sizes of another feed-forward kind, a guide that guides nothing.
    """
    idle = set(FREE)
    if config.ffn.kind not in ("low_rank", "block_dense"):
        idle.add("ffn.rank")
    if config.ffn.kind not in ("block_shuffle", "block_dense"):
        idle.add("ffn.blocks")
    flat = {key: value for key, value in flatten(config).items() if key.split(".")[0] in IDENTITY and key not in idle}
    # what a default stands for: naming it makes no other run
    flat |= {"model.kv_heads": config.kv_heads, "model.attention_dim": config.attention_dim, "ffn.width": config.ffn_width}
    used, usual = _used_guide_keys(config), defaults()
    flat |= {key: usual[key] for key in GUIDE_KEYS - used}
    if not used:
        flat["guide.mode"] = "off"
    elif config.guide.mode == "window" and config.guide.end is None:
        flat["guide.end"] = config.train.steps
    return flat
