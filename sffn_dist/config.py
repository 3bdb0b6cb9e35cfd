"""The one config tree: typed, frozen, validated.

A run is described by one JSON file (which may name a ``base`` and say only what differs) plus overrides ``key.path=value``.
:func:`load` merges them, checks every rule and raises one :class:`ConfigError` that lists *all* problems, each with its dotted
key, its value and the rule it broke. Nothing here imports torch: a refusal takes well under a second.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]  # what a JSON number and a float hold exactly
NaturalInt = Annotated[int, Field(ge=0, lt=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]

FFNKind = Literal["dense", "low_rank", "block_shuffle", "block_dense"]


class ConfigError(ValueError):
    """Every problem found in a configuration; ``problems`` holds one message each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class _Section(BaseModel):
    # strict: "4" is not an int and 1 is not a bool; an int where a float is expected is fine
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(_Section):
    """Where a run lives."""

    dir: str = Field("", description="everything the run writes; default runs/<name of the config file>")


class Model(_Section):
    """The transformer around the feed-forward layers (paper.md, table of models)."""

    layers: PositiveInt
    width: PositiveInt = Field(description="of the residual stream, h")
    heads: PositiveInt = Field(description="query heads")
    kv_heads: PositiveInt | None = Field(None, description="key/value heads (GQA); default: heads")
    attention_dim: PositiveInt | None = Field(None, description="heads x head size; default: width")
    sequence: PositiveInt = Field(1024, description="tokens of context")
    vocab: PositiveInt = Field(32_000, description="rows of the embedding, whatever the tokenizer uses of them")
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: PositiveFloat = 1e-5
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tie_embeddings: bool = True
    rope_base: PositiveInt = 10_000
    init_std: PositiveFloat = 0.02


class FFN(_Section):
    """The feed-forward kind; ``rank`` and ``blocks`` as in the paper's section 2."""

    kind: FFNKind = "dense"
    width: PositiveInt | None = Field(None, description="inner width f; default: 4 x model.width")
    rank: PositiveInt | None = Field(None, description="R of low_rank and block_dense")
    blocks: PositiveInt | None = Field(None, description="B of block_shuffle and block_dense")
    dense_layers: tuple[NaturalInt, ...] = Field((0,), description="layers whose FFN stays dense")


class Guide(_Section):
    """Self-guided training (paper, section 4): o = alpha W x + (1 - alpha) U(V x)."""

    mode: Literal["off", "fixed_step"] = "off"
    share: Share = Field(0.5, description="of the training steps that are guided")
    stochastic: bool = Field(False, description="compute the guide only with probability alpha")


class Data(_Section):
    """Text, tokenizer, token shards."""

    dir: str = Field("data", description="prepared token shards, shared by runs")
    source: str = Field("stdlib", description='"stdlib", a file or folder of .txt/.jsonl/.parquet, or "hf:<dataset>"')
    text_field: str = Field("text", description="column that holds the text, of jsonl, parquet and hf sources")
    tokenizer: str | None = Field(None, description="a tokenizer.json; default: a byte-level BPE trained on the source")
    heldout_share: OpenShare = Field(0.02, description="of the documents")


class Train(_Section):
    """Recipe (paper, appendix): AdamW, linear warm-up, cosine to a tenth."""

    steps: PositiveInt
    global_batch_size: PositiveInt = Field(512, description="sequences a step, over all ranks")
    micro_batch_size: PositiveInt = Field(8, description="sequences a forward pass, a rank")
    seed: Seed = 0
    learning_rate: PositiveFloat = 6e-4
    min_learning_rate_ratio: Share = 0.1
    warmup_share: Share = 0.1
    weight_decay: NonNegativeFloat = 0.1
    beta1: OpenShare = 0.9
    beta2: OpenShare = 0.999
    epsilon: PositiveFloat = 1e-8
    clip: NonNegativeFloat = Field(1.0, description="global gradient norm; 0: no clipping")


class Parallel(_Section):
    """How the model is split over ranks; what is left of them is data parallel."""

    tensor: PositiveInt = 1
    sequence: bool = Field(False, description="split the residual stream by tokens over the tensor-parallel group")


class Zero(_Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1


class Checkpoint(_Section):
    """When the run's state is saved, and how much of it is kept."""

    interval: NaturalInt = Field(500, description="steps between saves; 0: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")


class Evaluation(_Section):
    """When the held-out loss is measured, and on how much."""

    interval: NaturalInt = Field(0, description="steps between evaluations; 0: only at the end")
    sequences: PositiveInt = Field(128, description="held-out sequences, at most, and at most as many as are trained on")


class Sample(_Section):
    """The text generated at the end of a run."""

    tokens: NaturalInt = 48
    prompt: str = "def "
    temperature: NonNegativeFloat = 0.8


class Logging(_Section):
    """What is shown and which trackers are told."""

    progress: bool = True
    wandb: bool = False
    wandb_project: str = "sffn_dist"
    tensorboard: bool = False


class Config(_Section):
    """A run. Sections and keys are what overrides name: ``train.steps=100``."""

    run: Run = Run()
    model: Model
    ffn: FFN = FFN()
    guide: Guide = Guide()
    data: Data = Data()
    train: Train
    parallel: Parallel = Parallel()
    zero: Zero = Zero()
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    recompute: Literal["none", "full"] = "none"
    init_from: str | None = Field(None, description="checkpoint, or run, whose weights this run starts from")
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    sample: Sample = Sample()
    logging: Logging = Logging()

    @property
    def kv_heads(self) -> int:
        return self.model.kv_heads or self.model.heads

    @property
    def attention_dim(self) -> int:
        return self.model.attention_dim or self.model.width

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.model.heads

    @property
    def ffn_width(self) -> int:
        return self.ffn.width or 4 * self.model.width

    @property
    def gated(self) -> bool:
        return self.model.activation == "swiglu"

    @property
    def guided(self) -> bool:
        """True if some step of the run has a guide."""
        return self.guide.mode != "off" and self.guide.share > 0 and self.structured

    @property
    def structured(self) -> bool:
        """True if some layer's feed-forward is structured."""
        return any(self.kind_of_layer(layer) != "dense" for layer in range(self.model.layers))

    @property
    def evaluation_sequences(self) -> int:
        """Held-out sequences of an evaluation: no more than the whole run trains on, so that a trial run stays short."""
        return min(self.evaluation.sequences, self.train.steps * self.train.global_batch_size)

    def accumulation_steps(self, data_parallel: int) -> int:
        """Micro-steps of a step on each of ``data_parallel`` ranks."""
        return max(1, self.train.global_batch_size // (self.train.micro_batch_size * data_parallel))

    def kind_of_layer(self, layer: int) -> FFNKind:
        return "dense" if layer in self.ffn.dense_layers else self.ffn.kind


# ---------------------------------------------------------------------------------------------------------------- reading


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read ``path`` (and the files its ``base`` names), apply ``key.path=value`` overrides, validate.

    Raises:
        ConfigError: with every problem found.
    """
    tree = read_tree(Path(path))
    problems: list[str] = []
    for text in overrides:
        try:
            _apply_override(tree, text)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["dir"] = run.get("dir") or f"runs/{Path(path).stem}"
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping; raises ConfigError."""
    try:
        config = Config.model_validate_json(json.dumps(tree))  # JSON mode: lists stand for tuples, all else is strict
    except ValidationError as error:
        raise ConfigError([_sentence(problem, tree) for problem in error.errors()]) from None
    problems = list(_rules(config))
    if problems:
        raise ConfigError(problems)
    return config


def read_tree(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged JSON tree of a config file and its bases, unvalidated."""
    try:
        resolved = path.resolve()
        if resolved in _seen:
            raise ConfigError([f"base = {str(path)!r}: the files name each other as base in a circle"])
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = f" (named as base by {_seen[-1]})" if _seen else ""
        raise ConfigError([f"config file {str(path)!r}{where}: no such file"]) from None
    except ConfigError:
        raise
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: a link to itself
        if isinstance(error, RecursionError):
            raise ConfigError([f"config file {str(path)!r}: not valid JSON: {error}"]) from None
        raise ConfigError([f"config file {str(path)!r}: cannot be read: {error}"]) from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise ConfigError([f"config file {str(path)!r}: not valid JSON: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"config file {str(path)!r}: holds a {type(tree).__name__}, must hold an object"])
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError([f"base = {base!r} in {str(path)!r}: must be the path of a config file"])
    return _merge(read_tree(path.parent / base, (*_seen, resolved)), tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(dict(merged[key]), value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError([f"override {text!r}: must read key.path=value"])
    fields = key_fields()
    if key not in fields:
        raise ConfigError([_unknown_key(key)])
    value: Any
    try:
        value = json.loads(raw, parse_constant=str)
    except (ValueError, RecursionError):
        value = raw
    # run.dir=2024 names a folder: a text field takes what is not already quoted as it stands
    if "str" in str(fields[key]) and not isinstance(value, str) and not (value is None and "None" in str(fields[key])):
        value = raw
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError([f"{section} = {child!r}: must be an object of settings"])
        node = child
    node[leaf] = value


def key_fields() -> dict[str, Any]:
    """Every dotted key -> its type annotation."""
    found: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            found.update({f"{name}.{leaf}": item.annotation for leaf, item in section.model_fields.items()})
        else:
            found[name] = field.annotation
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{name}.{leaf}": item for leaf, item in value.items()})
        else:
            flat[name] = value
    return flat


def defaults() -> dict[str, Any]:
    """Dotted key -> default, of the keys that have one."""
    found: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            fields = {f"{name}.{leaf}": item for leaf, item in section.model_fields.items()}
        else:
            fields = {name: field}
        found.update(
            {
                key: list(v) if isinstance(v := item.default, tuple) else v
                for key, item in fields.items()
                if not item.is_required()
            }
        )
    return found


def _unknown_key(key: str) -> str:
    section = Config.model_fields.get(key)
    if section is not None:
        leaves = [name for name in key_fields() if name.startswith(f"{key}.")]
        return f"{key}: names a section, not a setting; set one of {', '.join(leaves)}"
    known = [*key_fields(), *Config.model_fields]
    leaf = key.rsplit(".", 1)[-1]
    same = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    near = (
        same[:1]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        or difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in known], n=1, cutoff=0.6)
    )
    full = next((name for name in known if near and (name == near[0] or name.endswith("." + near[0]))), None)
    return f"{key}: unknown key" + (f"; the nearest known one is {full}" if full else "")


def _sentence(problem: Any, tree: Mapping[str, Any]) -> str:
    """One pydantic problem as 'key = value: rule'."""
    location = [str(part) for part in problem["loc"]]
    known = set(key_fields()) | set(Config.model_fields)
    while len(location) > 1 and ".".join(location) not in known and problem["type"] != "extra_forbidden":
        if location[-1].isdigit() and ".".join(location[:-1]) in known:
            break
        location = location[:-1]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    if problem["type"] == "missing":
        return f"{key}: missing; the config must set it"
    node: Any = tree
    for part in location:
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
    rule = str(problem["msg"])
    rule = rule.replace("Input should be", "must be").replace("a valid ", "a ").replace("a integer", "an integer")
    return f"{key} = {json.dumps(node, default=str)}: {rule}"


# ------------------------------------------------------------------------------------------------------------------ rules


def _rules(config: Config) -> Iterable[str]:
    """Rules that join several keys. Yields a message for each one broken."""
    yield from _attention_rules(config)
    yield from _ffn_rules(config)
    yield from _tensor_parallel_rules(config)
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
    if ffn.kind in ("low_rank", "block_dense") and ffn.rank is not None:
        yield from multiple("ffn.rank", ffn.rank)
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


def unused(config: Config) -> dict[str, str]:
    """Settings that this run does not use, with the reason; shown by the plan."""
    notes: dict[str, str] = {}
    kind = config.ffn.kind
    if config.ffn.rank is not None and kind in ("dense", "block_shuffle"):
        notes["ffn.rank"] = f"ffn.kind = {kind} has no rank"
    if config.ffn.blocks is not None and kind in ("dense", "low_rank"):
        notes["ffn.blocks"] = f"ffn.kind = {kind} has no blocks"
    if config.guide.mode != "off" and kind == "dense":
        notes["guide.mode"] = "a dense FFN has nothing to guide"
    elif config.guide.mode != "off" and not config.guided:
        notes["guide.mode"] = (
            "guide.share = 0 guides no step" if config.structured else "ffn.dense_layers leaves no structured layer"
        )
    if kind != "dense" and not config.structured:
        notes["ffn.kind"] = "ffn.dense_layers leaves no structured layer"
    if config.guide.stochastic and not config.guided:
        notes["guide.stochastic"] = "no guide"
    if config.parallel.sequence and config.parallel.tensor == 1:
        notes["parallel.sequence"] = "parallel.tensor = 1 splits nothing"
    return notes


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
    if not config.guided:
        flat.update({f"guide.{key}": value for key, value in Guide().model_dump(mode="json").items()})
    return flat
