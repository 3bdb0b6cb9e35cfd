"""config -> megatron-core GPTModel with our layer specs, and its weights at step 0."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sffn_dist.parallel import cpu_compat
from sffn_dist.parallel.collectives import sum_partial_gradients
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layers import CoreAttention, NormLayer
from sffn_dist.parallel.linears import (
    StructuredColumnParallelLinear,
    StructuredLinear,
    StructuredRowParallelLinear,
)
from sffn_dist.parallel.split import shard
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config
from sffn_dist.spec.schedule import Schedule, StepSchedule
from sffn_dist.spec.split_table import ffn_linears, ffn_structure, is_guide, model_tensors
from sffn_dist.structured import functional
from sffn_dist.structured.cut import TensorSpec
from sffn_dist.structured.functional import to_dense

# megatron-core warns of any feed-forward layer but its own, once a layer: it hands those no process group;
# ours are parallel_state's
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not record.getMessage().startswith("Unknown MLP type")
)

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 10.0  # between lines about initial weights
ACTIVATIONS = {"gelu": functools.partial(F.gelu, approximate="tanh"), "gelu_erf": F.gelu, "swiglu": F.silu}


def transformer_config(config: Config, precision: str) -> TransformerConfig:
    """The part of a run that megatron-core configures itself by."""
    model = config.model
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_width,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=config.gated,
        add_bias_linear=model.bias,
        add_qkv_bias=model.bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence and config.parallel.tensor > 1,
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        bf16=precision == "bf16",
        use_cpu_initialization=not cpu_compat.has_cuda(),
        perform_initialization=False,  # initialise() below, by name, alike for every layout
    )


def mlp_spec(config: Config, layer: int, *, guide: bool) -> ModuleSpec:
    """The feed-forward layer: Megatron's MLP over dense linears, or ours over structured ones, with a
    guide or without.
    """
    structure = ffn_structure(config, layer)
    if structure.dense:
        return ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
    params = {"structure": structure, "guide": guide}
    linears = MLPSubmodules(
        linear_fc1=ModuleSpec(module=StructuredColumnParallelLinear, params=params),
        linear_fc2=ModuleSpec(module=StructuredRowParallelLinear, params=params),
    )
    recompute = "bottleneck" if config.recompute == "bottleneck" else "none"
    return ModuleSpec(module=StructuredMLP, params={"recompute": recompute}, submodules=linears)


def layer_spec(config: Config, layer: int, *, guide: bool) -> ModuleSpec:
    """One transformer layer: pre-norm attention and feed-forward."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NormLayer,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NormLayer,
            mlp=mlp_spec(config, layer, guide=guide),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build(config: Config, precision: str, topology: Topology, *, guide: bool) -> GPTModel:
    """The rank's part of the model, as in the guided phase or outside of it.

    Its weights not yet set: see :func:`initialise`.
    """
    layers = [layer_spec(config, layer, guide=guide) for layer in range(config.model.layers)]
    model = GPTModel(
        config=transformer_config(config, precision),
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=NormLayer),
        vocab_size=config.model.vocab,
        max_sequence_length=config.model.sequence,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_base,
    )
    if config.recompute == "full":
        for layer in model.decoder.layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    _mask_padding(model, config, topology)
    _mark_parameters(model, config)
    sum_partial_gradients(model, topology.tensor_group)
    return model


def _mask_padding(model: GPTModel, config: Config, topology: Topology) -> None:
    """Logits of the rows that only pad the vocabulary are the lowest there is: no probability goes there, in
    the loss or in sampling, and no gradient comes from there.
    """
    rows = config.model.vocab // topology.tensor_parallel_size
    first = max(0, config.vocab_unpadded - topology.tensor_parallel_rank * rows)
    if first >= rows:
        return

    def mask(_: object, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        padding = torch.arange(rows, device=logits.device) >= first
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(mask)


def _mark_parameters(model: GPTModel, config: Config) -> None:
    """Megatron's marks by the split table: DeepSpeed's gradient norm counts what is not
    ``tensor_model_parallel`` once.

    Megatron marks its own weights only while it initialises them, which it does not do here.
    """
    specs, p = model_tensors(config, guide=True), config.parallel.tensor
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = specs[name].cut is not None
        parameter.partition_dim = specs[name].partition_dim(p)
        parameter.partition_stride = 1


def token_losses(model: Callable[..., Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of every label, (batch, S), for tokens and labels (batch, S)."""
    return model(tokens, None, None, labels=labels)


def token_logits(model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """Logits (batch, S, vocab/p) of tokens (batch, S): this rank's slice of the vocabulary."""
    return model(tokens, None, None)


def structured_linears(model: GPTModel) -> Iterator[tuple[int, int, StructuredLinear]]:
    """(layer, 0 for the first or 1 for the second linear, module)."""
    for index, layer in enumerate(model.decoder.layers):
        for linear_index, linear in enumerate((layer.mlp.linear_fc1, layer.mlp.linear_fc2)):
            if isinstance(linear, StructuredLinear):
                yield index, linear_index, linear


def has_guide(model: GPTModel) -> bool:
    """True as in the guided phase: its structured linears have their dense guides."""
    return any(linear.guide is not None for _, _, linear in structured_linears(model))


def set_guide(model: GPTModel, schedule: Schedule, step_schedule: StepSchedule) -> int:
    """Set for every linear whether it computes its guide in this step; returns how many do."""
    drawn = 0
    for layer, linear_index, linear in structured_linears(model):
        linear.guide_weight = (
            schedule.guide_weight(step_schedule, layer, linear_index) if linear.guide is not None else None
        )
        drawn += linear.guide_weight is not None
    return drawn


def mix_guide(model: GPTModel, alpha: float) -> None:
    """Every guide with weight ``alpha``, no coin: what an evaluation during the guided phase sees."""
    for _, _, linear in structured_linears(model):
        linear.guide_weight = alpha if linear.guide is not None and alpha > 0 else None


def unset_guide(model: GPTModel) -> None:
    """The structure alone, as evaluated and exported."""
    for _, _, linear in structured_linears(model):
        linear.guide_weight = None


# --------------------------------------------------------------------------------------------- initialisation


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _units(names: Iterable[str]) -> dict[str, list[str]]:
    """What is drawn together: unit -> parameter names.

    The factors of a linear are one draw, other matrices one each.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        factor = ".mlp." in name and leaf not in ("weight", "bias")
        units.setdefault(prefix if factor else name, []).append(name)
    return units


def _draw(
    config: Config, specs: dict[str, TensorSpec], unit: str, names: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Full fp32 tensors of a unit by parameter name, its guide if that is named.

    The same on every machine of equal torch and kind of ``device``, which computes the singular values: those
    of an xl model take a core of the host about 9 minutes.
    """
    std = config.model.init_std
    generator = _generator(config.train.seed, unit)
    if names == [unit]:
        shape = specs[unit].shape
        if len(shape) > 1:
            return {unit: torch.randn(shape, generator=generator) * std}
        return {unit: torch.ones(shape) if unit.endswith("norm.weight") else torch.zeros(shape)}
    layer, linear = int(unit.split(".")[2]), unit.rpartition(".")[2]
    inputs, outputs = next(
        (inputs, outputs) for name, _, inputs, outputs in ffn_linears(config) if name == linear
    )
    guide = any(is_guide(name) for name in names)
    structure = ffn_structure(config, layer)
    drawn = functional.draw(structure, inputs, outputs, std, generator, guide=guide, device=device)
    return {f"{unit}.{name}": tensor for name, tensor in drawn.items()}


@torch.no_grad()
def initialise(
    model: GPTModel,
    config: Config,
    topology: Topology,
    tick: Callable[[str, int], None] = lambda doing, step: None,
) -> None:
    """Weights at step 0: one full draw a unit, seeded by (train.seed, name), cut for every rank.

    So the weights are the same for every layout. Ranks draw units in turn and broadcast them: an SVD of 8192
    x 2048 takes seconds, and a rank's own library must not decide the signs of its singular vectors.

    ``tick`` is told of the progress, as Watchdog.tick.
    """
    parameters = dict(model.named_parameters())
    specs = model_tensors(config, guide=has_guide(model))
    units = list(_units(specs).items())
    own_units = units[topology.rank :: topology.world_size]
    drawn, logged = dict[str, dict[str, Tensor]](), time.monotonic()
    for done, (unit, names) in enumerate(own_units, start=1):
        drawn[unit] = _draw(config, specs, unit, names, topology.device)
        tick(f"initial weights, {done} of {len(own_units)}", 0)
        if time.monotonic() - logged > PROGRESS_SECONDS:
            logged = time.monotonic()
            log.info("initial weights: %d of %d drawn by this rank", done, len(own_units))
    for i, (unit, names) in enumerate(units):
        for name in names:
            own = drawn[unit].pop(name) if unit in drawn else torch.empty(specs[name].shape)
            full = own.to(topology.device)
            if topology.world_size > 1:
                dist.broadcast(full, src=i % topology.world_size)
            parameters[name].copy_(
                shard(full, specs[name], topology.tensor_parallel_size, topology.tensor_parallel_rank)
            )


def guides(config: Config, topology: Topology, full: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, this rank's part) of every guide as it starts, W = to_dense(U, V), from the factors' ``full``
    tensors by name.
    """
    specs = model_tensors(config, guide=True)
    for name in (name for name in specs if is_guide(name)):
        prefix, layer = name.removesuffix("guide"), int(name.split(".")[2])
        leaves = [other.removeprefix(prefix) for other in specs if other.startswith(prefix)]
        factors = {leaf: full(prefix + leaf) for leaf in leaves if leaf not in ("guide", "bias")}
        dense = to_dense(ffn_structure(config, layer), factors)
        yield name, shard(dense, specs[name], topology.tensor_parallel_size, topology.tensor_parallel_rank)
