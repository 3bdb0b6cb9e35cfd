"""The one config tree: typed, frozen, validated.

Sections and keys are declared here, each with its type, its default and the rule that it keeps by itself;
rules between keys stand in spec/validation.py, and spec/loading.py makes the tree from a file and overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sffn_dist.spec.config_data import Data as Data
from sffn_dist.spec.config_guards import Guards as Guards
from sffn_dist.spec.config_model import Model as Model
from sffn_dist.spec.config_profile import Profile as Profile
from sffn_dist.spec.config_types import (
    FFNKind,
    Fraction,
    GuideSchedule,
    LearningRateSchedule,
    MicroBatchSize,
    NaturalInt,
    NonNegativeFloat,
    OpenFraction,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)
from sffn_dist.structured import registry


class ConfigError(ValueError):
    """Every problem found in a configuration; ``problems`` holds one message each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class RunSettings(Section):
    """Where a run lives."""

    dir: str = Field(
        "",
        description="folder of everything the run writes, where the same command continues it; default: "
        "runs/<name of the config file>",
    )


class FFN(Section):
    """The feed-forward kind; ``rank`` and ``blocks`` as in the paper's section 3.1."""

    kind: FFNKind = Field(
        registry.DENSE, description="structure of the feed-forward layers, of those in structured/registry.py"
    )
    width: PositiveInt | None = Field(None, description="inner width f; default: 4 x model.width")
    rank: PositiveInt | None = Field(None, description="R, of the kinds that have one")
    blocks: PositiveInt | None = Field(None, description="B, of the kinds that have them")
    dense_layers: tuple[NaturalInt, ...] = Field((0,), description="layers whose FFN stays dense")


class Guide(Section):
    """Self-guided training (paper, section 4): o = alpha W x + (1 - alpha) U(V x)."""

    mode: Literal["off", "fixed_step", "fixed_flop", "window"] = Field(
        "off",
        description="guided steps; fixed_step: the first ones, by guide.fraction; fixed_flop: guided "
        "steps, repeated at the end, such that the run costs what the dense model's costs; window: by "
        "guide.begin and guide.end",
    )
    fraction: Fraction = Field(
        0.5, description="of train.steps that are guided, from the first on (fixed_step)"
    )
    begin: NaturalInt = Field(0, description="first guided step (window)")
    end: PositiveInt | None = Field(
        None, description="the step after the last guided one (window); default: train.steps"
    )
    schedule: GuideSchedule = Field("cosine", description="how the guide's weight falls from 1 to 0")
    stochastic: bool = Field(False, description="compute the guide only with probability alpha")


class Train(Section):
    """Recipe (paper, appendix): AdamW, linear warm-up, cosine to a tenth."""

    steps: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        0,
        description="optimiser steps over new data; guide.mode = fixed_flop repeats some of them; 0: "
        "train.epochs says",
    )
    epochs: PositiveFloat | None = Field(
        None, description="passes over the training data, in place of train.steps, rounded up to whole steps"
    )
    global_batch_size: PositiveInt = Field(512, description="sequences a step, over all ranks")
    micro_batch_size: MicroBatchSize = Field(
        8, description="sequences a forward pass, a rank; auto: the most that fit, see spec/micro_batch.py"
    )
    seed: Seed = Field(0, description="of first weights, order of data, coins and sample")
    optimizer: OptimizerName = Field("adamw", description="of those in spec/optimizers.py")
    learning_rate: PositiveFloat = Field(6e-4, description="at the end of the warm-up, the highest")
    learning_rate_schedule: LearningRateSchedule = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    min_learning_rate_ratio: Fraction = Field(
        0.1, description="learning rate at the end, as a share of train.learning_rate"
    )
    warmup_share: Fraction = Field(0.1, description="of all steps, in which the learning rate rises from 0")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="decoupled, of every parameter, biases and norms too"
    )
    beta1: OpenFraction = Field(0.9, description="decay of the first moment")
    beta2: OpenFraction = Field(0.999, description="decay of the second moment")
    epsilon: PositiveFloat = Field(1e-8, description="added to the second moment's root")
    clip: NonNegativeFloat = Field(1.0, description="global gradient norm; 0: no clipping")
    stop_at_step: PositiveInt | None = Field(
        None, description="save and end after so many steps, on the schedule of all train.steps"
    )
    stop_after_minutes: PositiveFloat | None = Field(
        None, description="save and end after so many minutes of training since the start"
    )


class Parallel(Section):
    """How the model is split over ranks; what is left of them is data parallel."""

    tensor: PositiveInt = Field(
        1, description="ranks that share each layer; a multiple or a divisor of model.kv_heads"
    )
    sequence: bool = Field(
        False, description="split the residual stream by tokens over the tensor-parallel group"
    )


class Zero(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="0: nothing is split over data-parallel ranks; 1: moments; 2: gradients too; 3: weights "
        "too. Micro-steps are summed in fp32. 0 is refused in bf16, where DeepSpeed would sum in bf16",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="in which bf16 training sums gradients over the data-parallel ranks"
    )

    def reduces_in(self, precision: str) -> Literal["fp32", "bf16"]:
        """The dtype of those sums in training of this precision: in fp32 always that."""
        return self.reduce_dtype if precision == "bf16" else "fp32"


class InitFrom(Section):
    """Whose weights this run starts from; a text alone is its ``path``."""

    path: str | None = Field(
        None, min_length=1, description="checkpoint, or run; default: the seed's weights"
    )
    optimizer: bool = Field(False, description="its moments and step count too")
    data: bool = Field(False, description="go on with the samples after those that it was trained on")
    first_sample: NaturalInt = Field(0, description="recorded where init_from.data is set; not to be set")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if value is None or isinstance(value, str) else value


class Change(Section):
    """Values of some settings before ``step``, where ``--change`` gave others (spec/changes.py)."""

    step: NaturalInt
    before: dict[str, Any]


class Checkpoint(Section):
    """When the run's state is saved, and how much of it is kept."""

    interval: NaturalInt = Field(500, description="steps between saves; 0: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: NaturalInt = Field(
        0, description="checkpoints of steps that are its multiples are kept for good; 0: none"
    )
    asynchronous: bool = Field(
        True, description="write while training goes on, from a copy in host memory: 12 bytes a parameter"
    )


class Evaluation(Section):
    """When the held-out loss is measured, and on how much."""

    interval: NaturalInt = Field(
        0, description="steps between evaluations of the held-out loss; 0: only at the end"
    )
    sequences: PositiveInt = Field(
        128, description="held-out sequences, at most, and at most as many as are trained on"
    )


class Sample(Section):
    """The text generated at the end of a run."""

    tokens: NaturalInt = Field(48, description="length of the text; 0: none is generated")
    prompt: str = Field("def ", description="what the text begins with")
    temperature: NonNegativeFloat = Field(0.8, description="0: the likeliest token each time")


class Logging(Section):
    """What is shown and which trackers are used."""

    progress: bool = Field(True, description="show the steps on rank 0's standard output")
    wandb: bool = Field(False, description="log to Weights & Biases; offline where nobody is logged in")
    wandb_project: str = Field("sffn_dist", description="project there")
    tensorboard: bool = Field(False, description="log to TensorBoard files in run.dir")
    peak_tflops: PositiveFloat | None = Field(
        None, description="of a device, for the MFU; default: by the device's name, in bf16"
    )


class Config(Section):
    """A run. Sections and keys are what overrides name: ``train.steps=100``."""

    run: RunSettings = RunSettings()
    model: Model
    ffn: FFN = FFN()
    guide: Guide = Guide()
    data: Data = Data()
    train: Train
    parallel: Parallel = Parallel()
    zero: Zero = Zero()
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on CUDA devices and on CPUs with bf16 units, else fp32"
    )
    recompute: Literal["none", "bottleneck", "full"] = Field(
        "none",
        description="bottleneck: of a structured FFN keep the input and both bottlenecks, and rebuild in "
        "backward what is as wide as the inner layer; full: keep each layer's input alone",
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="auto: on CUDA devices whichever was measured to be faster, a Triton kernel or plain "
        "torch; triton is refused, with the reason, where it cannot run",
    )
    init_from: InitFrom = InitFrom()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    guards: Guards = Guards()
    sample: Sample = Sample()
    logging: Logging = Logging()
    profile: Profile = Profile()
    changes: tuple[Change, ...] = Field((), description="recorded by --change; not to be set")

    @property
    def kv_heads(self) -> int:
        return self.model.kv_heads or self.model.heads

    @property
    def vocab_unpadded(self) -> int:
        """Token ids are below it; rows of the embedding from it on are padding."""
        return self.model.vocab_unpadded or self.model.vocab

    @property
    def gathers_qkv(self) -> bool:
        """Whether there are fewer key/value heads than tensor-parallel ranks.

        megatron-core then cuts linear_qkv's rows inside a head: a rank computes its rows, gathers the
        others', and takes its query heads and their key and value head.
        """
        return self.kv_heads < self.parallel.tensor

    @property
    def attention_dim(self) -> int:
        return self.model.attention_dim or self.model.width

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.model.heads

    @property
    def micro_batch_size(self) -> int:
        """Sequences a forward pass, a rank, once ``auto`` has become a number (spec/micro_batch.py)."""
        size = self.train.micro_batch_size
        assert size != "auto", "micro_batch.choose says what it is"
        return size

    @property
    def ffn_width(self) -> int:
        return self.ffn.width or 4 * self.model.width

    @property
    def gated(self) -> bool:
        return self.model.activation == "swiglu"

    @property
    def structured(self) -> bool:
        """True if some layer's feed-forward is structured."""
        return any(self.kind_of_layer(layer) != registry.DENSE for layer in range(self.model.layers))

    @property
    def evaluation_sequences(self) -> int:
        """Held-out sequences of an evaluation: no more than the whole run trains on, so that a trial run
        stays short.
        """
        return min(self.evaluation.sequences, self.train.steps * self.train.global_batch_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step, over all ranks."""
        return self.train.global_batch_size * self.model.sequence

    def accumulation_steps(self, data_parallel: int) -> int:
        """Micro-steps of a step on each of ``data_parallel`` ranks."""
        return max(1, self.train.global_batch_size // (self.micro_batch_size * data_parallel))

    def kind_of_layer(self, layer: int) -> str:
        return registry.DENSE if layer in self.ffn.dense_layers else self.ffn.kind
