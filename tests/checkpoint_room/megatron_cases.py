"""Checkpoints that megatron-core itself writes; called inside the ranks of a pool."""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from sffn_dist.parallel import cpu_compat

VOCAB, LENGTH, LAYERS = 48, 12, 4
Save = Callable[[GPTModel, argparse.Namespace, Path], None]


def arguments(**extra: Any) -> argparse.Namespace:
    """What Megatron-LM keeps of its command line, as far as it describes the model."""
    return argparse.Namespace(
        **{
            "num_layers": LAYERS, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 1,
            "group_query_attention": False, "kv_channels": 6, "ffn_hidden_size": 40, "swiglu": False,
            "normalization": "LayerNorm", "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": False,
            "rotary_base": 10000, "rotary_percent": 1.0, "rotary_interleaved": False,
            "position_embedding_type": "rope", "add_bias_linear": True, "add_qkv_bias": False,
            "bias_gelu_fusion": False, "openai_gelu": False, "squared_relu": False,
            "padded_vocab_size": VOCAB, "max_position_embeddings": LENGTH, "seq_length": LENGTH,
            "num_experts": None, "apply_layernorm_1p": False, "qk_layernorm": False, "train_iters": 30,
            "lr": 3e-4, "adam_beta2": 0.95, "params_dtype": torch.float32, "use_rope_scaling": False,
            "window_size": None, "global_batch_size": 8, "micro_batch_size": 2, "clip_grad": 1.0,
            "seed": 1234, "multi_latent_attention": False,
            **extra,
        }
    )  # fmt: skip


def _groups(tensor: int) -> None:
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, create_gloo_process_groups=False
        )


def model_of(args: argparse.Namespace, tensor: int) -> GPTModel:
    """The model as Megatron-LM builds it of its arguments, with weights of some size everywhere."""
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels, ffn_hidden_size=args.ffn_hidden_size, normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon, gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu, bias_activation_fusion=args.bias_gelu_fusion,
        add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tensor, use_cpu_initialization=True,
        init_method_std=0.2, masked_softmax_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    torch.manual_seed(7)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        args.padded_vocab_size,
        args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
    )
    generator = torch.Generator().manual_seed(11 + parallel_state.get_tensor_model_parallel_rank())
    alike = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases of column-parallel linears differ by rank, all others must not
                own = generator if name.endswith(("linear_qkv.bias", "linear_fc1.bias")) else alike
                parameter.add_(torch.randn(parameter.shape, generator=own) / 3)
    return model


def save(how: str, folder: str, tensor: int, tokens: np.ndarray, **extra: Any) -> np.ndarray:
    """Write a model as ``how`` says; gives its logits (batch, S, vocab)."""
    _groups(tensor)
    args = arguments(tensor_model_parallel_size=tensor, **extra)
    model = model_of(args, tensor).eval()
    WAYS[how](model, args, Path(folder))
    dist.barrier()
    length = tokens.shape[1]
    positions, mask = (
        torch.arange(length).expand(tokens.shape),
        torch.ones(1, 1, length, length).triu(1).bool(),
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens), positions, mask).numpy()


# ------------------------------------------------------------------------------------------------- torch_dist


def _torch_dist(
    model: GPTModel, args: argparse.Namespace, folder: Path, *, root: bool = False, **metadata: Any
) -> None:
    target = folder / "iter_0000007" if root else folder
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
        if root:
            (folder / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    state = model.sharded_state_dict(metadata=metadata or None)
    common = {
        "args": args,
        "iteration": 7,
        "checkpoint_version": 3.0,
        "num_floating_point_operations_so_far": 0,
    }
    dist_checkpointing.save({**common, "model": state}, str(target), ("torch_dist", 1))


def _stacked(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    _torch_dist(model, args, folder)


def _by_layer(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    _torch_dist(model, args, folder, root=True, non_homogeneous_layers=True)


def _halves(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    _torch_dist(model, args, folder, singleton_local_shards=True)


# ----------------------------------------------------------------------------------------------------- legacy


def _file(state: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron-LM writes beside the weights."""
    rng = {
        "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {},
    }  # fmt: skip
    args.model_type = ModelType.encoder_or_decoder
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": state,
        "rng_state": [rng],
        "opt_param_scheduler": {},
    }


def _legacy(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    target = folder / "iter_0000007" / f"mp_rank_{dist.get_rank():02d}"
    target.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    torch.save(_file(model.state_dict_for_save_checkpoint(), args), target / "model_optim_rng.pt")


def stages_of(
    state: dict[str, Any], layers: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A whole model's state_dict as pipeline stages hold it: layers counted from 0, the last one with its
    copy of a tied table.
    """
    stages: list[dict[str, Any]] = []
    for number, own in enumerate(layers):
        stage: dict[str, Any] = {}
        for key, value in state.items():
            if key.startswith("decoder.layers."):
                layer, rest = key.removeprefix("decoder.layers.").split(".", 1)
                if int(layer) in own:
                    stage[f"decoder.layers.{own.index(int(layer))}.{rest}"] = value
            elif (number == 0) if key.startswith("embedding.") else (number == len(layers) - 1):
                stage[key] = value
        if number == len(layers) - 1 and not args.untie_embeddings_and_output_weights:
            stage["output_layer.weight"] = state["embedding.word_embeddings.weight"].clone()
        stages.append(stage)
    return stages


def _pipeline(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    """Three stages, with the names that Transformer Engine's layers have."""
    names = {
        "input_layernorm": "self_attention.linear_qkv.layer_norm",
        "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
    }
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        for norm, fused in names.items():
            key = key.replace(f"{norm}.weight", f"{fused}_weight").replace(f"{norm}.bias", f"{fused}_bias")
        state[key] = io.BytesIO(b"fp8") if key.endswith("_extra_state") else value
    for number, stage in enumerate(stages_of(state, [[0], [1, 2], [3]], args)):
        target = folder / f"mp_rank_{dist.get_rank():02d}_{number:03d}"
        target.mkdir(parents=True)
        torch.save(_file(stage, args), target / "model_optim_rng.pt")


def _interleaved(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    """Two stages, each with two parts of the model: layers 0 and 2, 1 and 3."""
    parts = stages_of(model.state_dict(), [[0], [1], [2], [3]], args)
    for stage in range(2):
        target = folder / f"mp_rank_{dist.get_rank():02d}_{stage:03d}"
        target.mkdir(parents=True)
        file = _file({}, args)
        del file["model"]
        torch.save(
            {**file, "model0": parts[stage], "model1": parts[stage + 2]}, target / "model_optim_rng.pt"
        )


WAYS: dict[str, Save] = {
    "stacked": _stacked,
    "by_layer": _by_layer,
    "halves": _halves,
    "legacy": _legacy,
    "pipeline": _pipeline,
    "interleaved": _interleaved,
}
