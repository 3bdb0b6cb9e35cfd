"""A stock megatron-core GPT whose feed-forward layers are structured, trained some steps on the CPU.

    python examples/megatron_gpt.py --kind block_dense --rank 48 --blocks 4
    torchrun --nproc-per-node 2 examples/megatron_gpt.py --kind low_rank --rank 32     # tensor parallel 2

Of this project it takes the layer spec and what megatron-core needs without CUDA. Model, groups, loss and
loop are megatron-core's and torch's own, as in a trainer of yours. The data are this file's own bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from sffn_dist.parallel import cpu_compat
from sffn_dist.parallel.layer_spec import NormLayer, structured_layer_spec

VOCAB, LENGTH, BATCH = 256, 64, 8  # a token is a byte


def build(options: argparse.Namespace, ranks: int) -> tuple[TransformerConfig, GPTModel]:
    """The model: megatron-core's GPT, handed the spec of a structured layer."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=512,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        sequence_parallel=ranks > 1,
        # without CUDA: first weights drawn on the CPU, no fused kernels
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    spec = structured_layer_spec(options.kind, rank=options.rank, blocks=options.blocks)
    layers = TransformerBlockSubmodules([spec] * config.num_layers, layer_norm=NormLayer)
    return config, GPTModel(config, layers, VOCAB, LENGTH)


def train(options: argparse.Namespace) -> list[float]:
    """The losses of ``options.steps`` AdamW steps."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")
    cpu_compat.prepare()  # before anything of megatron-core is built
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=ranks, create_gloo_process_groups=False
    )
    torch.manual_seed(0)
    config, model = build(options, ranks)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]  # True: may not look there
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(options.steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        tokens = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        wrapped.zero_grad_buffer()
        loss = wrapped(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([wrapped])  # sums what sequence-parallel ranks have in part
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        losses.append(float(loss.detach()))
        if dist.get_rank() == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.3f}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return losses


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="low_rank", help="of the structure (default %(default)s)")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--steps", type=int, default=50, help="default %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and say what came of it."""
    options = arguments().parse_args(argv)
    if options.kind == "low_rank" and options.rank is None:
        options.rank = 32
    losses = train(options)
    if os.environ.get("RANK", "0") == "0":
        print(f"{options.kind}: loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")


if __name__ == "__main__":
    main()
