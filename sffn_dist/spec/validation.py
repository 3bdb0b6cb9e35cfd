"""What joins several keys of a config: rules between them, which of them a run uses, which make it the run it
is.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config, ConfigError, Guide
from sffn_dist.spec.config_keys import defaults, flatten
from sffn_dist.spec.split_table import configured_structure
from sffn_dist.structured.registry import DENSE, structure_class
from sffn_dist.structured.structure import SETTINGS, Size


def problems(config: Config) -> Iterable[str]:
    """Rules that join several keys. Yields a message for each one broken."""
    yield from _length_rules(config)
    if config.vocab_unpadded > config.model.vocab:
        yield (
            f"model.vocab_unpadded = {config.vocab_unpadded}: must not exceed model.vocab = "
            f"{config.model.vocab}"
        )
    sizes = [*_attention_rules(config), *_ffn_rules(config), *_tensor_parallel_rules(config)]
    yield from sizes
    if not sizes and config.structured:  # FLOPs are those of sizes that fit
        yield from _guide_rules(config)
    if config.recompute == "bottleneck" and not config.structured:
        yield (
            "recompute = bottleneck: there is no structured feed-forward layer, whose bottleneck could be "
            "kept; use none or full"
        )
    if config.data.bos and config.data.tokenizer is None:
        yield "data.bos = true: a tokenizer trained on the source has no bos_token; name a data.tokenizer"
    micro_batch = config.train.micro_batch_size
    if micro_batch != "auto" and config.train.global_batch_size % micro_batch:
        yield (
            f"train.micro_batch_size = {micro_batch}: must divide "
            f"train.global_batch_size = {config.train.global_batch_size}"
        )


def _length_rules(config: Config) -> Iterable[str]:
    train = config.train
    if train.epochs is None and not train.steps:
        yield "train.steps = 0: must be greater than 0, or train.epochs be set in its place"
    elif train.epochs is not None and train.steps:
        yield (
            f"train.epochs = {train.epochs:g}: stands in place of train.steps, which is {train.steps}; set "
            "one of them (train.steps=0 leaves it to train.epochs)"
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
            f"{dim_key} = {config.attention_dim}: head size {config.head_dim} ({dim_key} / model.heads) "
            f"must be even, "
            "rotary embeddings turn pairs"
        )


def _ffn_rules(config: Config) -> Iterable[str]:
    for layer in config.ffn.dense_layers:
        if layer >= config.model.layers:
            yield f"ffn.dense_layers holds {layer}: must be below model.layers = {config.model.layers}"
    structure = configured_structure(config, config.ffn.kind)
    outer, inner = Size("model.width", config.model.width), Size("ffn.width", config.ffn_width)
    yield from structure.setting_problems("ffn.")
    yield from structure.size_problems(outer, inner, "ffn.")
    yield from structure.tensor_parallel_problems(
        inner, Size("parallel.tensor", config.parallel.tensor), "ffn."
    )


def _tensor_parallel_rules(config: Config) -> Iterable[str]:
    p = config.parallel.tensor
    sizes = {
        "model.heads": config.model.heads,
        "model.vocab": config.model.vocab,
    }
    if config.parallel.sequence and p > 1:
        sizes["model.sequence"] = config.model.sequence
    for key, value in sizes.items():
        if value % p:
            yield f"{key} = {value}: must be divisible by parallel.tensor = {p}"
    kv_heads, key_rows = config.kv_heads, 2 * config.kv_heads * config.head_dim
    if kv_heads % p and p % kv_heads:
        yield f"model.kv_heads = {kv_heads}: must be a multiple or a divisor of parallel.tensor = {p}"
    elif config.gathers_qkv and key_rows % p:
        yield (
            f"model.kv_heads = {kv_heads}: the keys' and values' rows, 2 x {kv_heads} heads of "
            f"{config.head_dim}, must be divisible by parallel.tensor = {p}"
        )


def _guide_rules(config: Config) -> Iterable[str]:
    guide, steps = config.guide, config.train.steps
    if guide.mode == "window" and steps:  # of train.epochs the steps are known later
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
                'guide.mode = "fixed_flop": the structured model costs as many FLOPs as the dense one, '
                "which leaves none for a guide; "
                "lower ffn.rank, raise ffn.blocks, or use fixed_step"
            )
        elif share > 1:
            yield (
                f'guide.mode = "fixed_flop": what the structured model saves guides {share:.2f} x '
                f"train.steps, must be at most 1; "
                "use fixed_step, or guide.stochastic=false"
            )


def check_precision(config: Config, precision: str) -> None:
    """Refuse a ZeRO stage that the precision ("bf16", "fp32", of "auto" what the devices have) does not have;
    raises ConfigError.
    """
    if precision == "bf16" and config.zero.stage == 0:
        raise ConfigError(
            [
                f"zero.stage = 0: must be 1, 2 or 3 in bf16 (precision = {config.precision}), because "
                "DeepSpeed's stage 0 sums gradients in bf16; set zero.stage=1, which sums them in fp32, or "
                "precision=fp32"
            ]
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
    if train.micro_batch_size == "auto":
        if train.global_batch_size % (world // p):
            raise ConfigError(
                [
                    f"train.global_batch_size = {train.global_batch_size}: must be a multiple of the "
                    f"data-parallel ranks = {world // p}"
                ]
            )
        return
    per_pass = train.micro_batch_size * (world // p)
    if train.global_batch_size % per_pass:
        raise ConfigError(
            [
                f"train.global_batch_size = {train.global_batch_size}: must be a multiple of "
                f"train.micro_batch_size x "
                f"data-parallel ranks = {train.micro_batch_size} x {world // p} = {per_pass}"
            ]
        )
    rank = max(config.profile.ranks)
    if config.profile.steps is not None and rank >= world:
        raise ConfigError([f"profile.ranks holds {rank}: must be below the number of ranks, {world}"])


def unused_settings(config: Config) -> dict[str, str]:
    """Settings that this run does not use, with the reason; shown by the plan."""
    notes: dict[str, str] = {}
    kind, settings = config.ffn.kind, structure_class(config.ffn.kind).settings
    for name in SETTINGS:
        if getattr(config.ffn, name) is not None and name not in settings:
            notes[f"ffn.{name}"] = f"ffn.kind = {kind} has no {name}"
    notes.update(_unused_guide(config))
    if kind != DENSE and not config.structured:
        notes["ffn.kind"] = "ffn.dense_layers leaves no structured layer"
    if config.checkpoint.keep_every and not config.checkpoint.interval:
        notes["checkpoint.keep_every"] = "checkpoint.interval = 0 saves at the end alone"
    if config.parallel.sequence and config.parallel.tensor == 1:
        notes["parallel.sequence"] = "parallel.tensor = 1 splits nothing"
    if config.profile.steps is None and config.profile.ranks != (0,):
        notes["profile.ranks"] = "profile.steps = null profiles nothing"
    return notes


def _why_no_step_is_guided(config: Config) -> str:
    if config.ffn.kind == DENSE:
        return "a dense FFN has nothing to guide"
    if not config.structured:
        return "ffn.dense_layers leaves no structured layer"
    fraction = (
        config.guide.fraction if config.guide.mode == "fixed_step" else schedule.equal_flops_fraction(config)
    )
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


# Restarting a run with another value of these would continue another run: they are compared with what run.dir
# holds.
IDENTITY = ("model", "ffn", "guide", "data", "train", "init_from")
FREE = (
    "train.micro_batch_size",
    "train.stop_at_step",
    "train.stop_after_minutes",
    "data.dir",
    "init_from.first_sample",
)


def identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value of everything that must stay equal between restarts of one run.

    What the run does not use is left out, whatever its value: sizes of another feed-forward kind, a guide
    that guides nothing.
    """
    idle = set(FREE)
    idle |= {f"ffn.{name}" for name in SETTINGS if name not in structure_class(config.ffn.kind).settings}
    flat = {
        key: value
        for key, value in flatten(config).items()
        if key.split(".")[0] in IDENTITY and key not in idle
    }
    # what a default stands for: naming it makes no other run
    flat |= {
        "model.kv_heads": config.kv_heads,
        "model.attention_dim": config.attention_dim,
        "model.vocab_unpadded": None
        if config.vocab_unpadded == config.model.vocab
        else config.vocab_unpadded,
        "ffn.width": config.ffn_width,
    }
    used, usual = _used_guide_keys(config), defaults()
    flat |= {key: usual[key] for key in GUIDE_KEYS - used}
    if not used:
        flat["guide.mode"] = "off"
    elif config.guide.mode == "window" and config.guide.end is None:
        flat["guide.end"] = config.train.steps
    return flat
