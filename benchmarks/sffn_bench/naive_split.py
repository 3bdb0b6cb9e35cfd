"""The naive tensor-parallel structured layer: each pair of factors as a plain Megatron column-row pair.

A baseline, used nowhere else.

The bottleneck is what is cut, so both sums and, with sequence parallelism, both gathers of a feed-forward
layer are as wide as a dense layer's, and two of them are f wide. The activation is computed on all features
by every rank (on its own tokens with sequence parallelism).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from sffn_kernels.block_diagonal import block_diagonal, shuffled_block_diagonal
from torch import Tensor, nn

from sffn_dist.structured.structure import Structure


class BlockColumn(nn.Module):
    """block_in (B, r/B, n/B) cut by blocks, its input entered as Megatron's column-parallel linear enters
    one.
    """

    def __init__(
        self, blocks: int, outputs: int, inputs: int, config: TransformerConfig, ranks: int, rank: int
    ):
        super().__init__()
        self.sequence, self.ranks, self.rank = config.sequence_parallel, ranks, rank
        self.weight = nn.Parameter(
            torch.randn(blocks // ranks, outputs, inputs, dtype=config.params_dtype) * 0.02
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (S or S/p, batch, n) -> (S, batch, r/p)."""
        enter = (
            mappings.gather_from_sequence_parallel_region
            if self.sequence
            else mappings.copy_to_tensor_model_parallel_region
        )
        return block_diagonal(enter(x).chunk(self.ranks, dim=-1)[self.rank], self.weight), None


class BlockRow(nn.Module):
    """Monarch's second factor (B, m/B, n/B) cut along its inputs, its output summed as Megatron's
    row-parallel linear sums one.
    """

    def __init__(self, blocks: int, outputs: int, inputs: int, config: TransformerConfig, ranks: int):
        super().__init__()
        self.sequence = config.sequence_parallel
        self.weight = nn.Parameter(
            torch.randn(blocks, outputs, inputs // ranks, dtype=config.params_dtype) * 0.02
        )

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """z (S, batch, n/p) -> (S or S/p, batch, m)."""
        leave = (
            mappings.reduce_scatter_to_sequence_parallel_region
            if self.sequence
            else mappings.reduce_from_tensor_model_parallel_region
        )
        return leave(shuffled_block_diagonal(z, self.weight)), None


class NaiveLinear(nn.Module):
    """x (S or S/p, batch, inputs) -> (S or S/p, batch, outputs)."""

    def __init__(
        self,
        structure: Structure,
        inputs: int,
        outputs: int,
        config: TransformerConfig,
        ranks: int,
        rank: int,
    ):
        super().__init__()
        plain: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "init_method": nn.init.normal_,
        }
        width, blocks = structure.bottleneck(inputs, outputs), structure.blocks or 1
        first, second = structure.factor_shapes(inputs, outputs).values()
        if len(first) == 2:
            self.first: nn.Module = ColumnParallelLinear(inputs, width, **plain)
        else:
            self.first = BlockColumn(blocks, width // blocks, inputs // blocks, config, ranks, rank)
        if len(second) == 2:
            self.second: nn.Module = RowParallelLinear(width, outputs, input_is_parallel=True, **plain)
        else:
            self.second = BlockRow(blocks, outputs // blocks, width // blocks, config, ranks)

    def forward(self, x: Tensor) -> Tensor:
        """One factor after the other."""
        y: Tensor = self.second(self.first(x)[0])[0]
        return y


class NaiveMLP(nn.Module):
    """The feed-forward layer of two naive linears.

    Returns (y, None) as Megatron's MLP without biases does.
    """

    def __init__(
        self, structure: Structure, h: int, f: int, config: TransformerConfig, ranks: int, rank: int
    ):
        super().__init__()
        self.activation = config.activation_func
        self.fc1 = NaiveLinear(structure, h, f, config, ranks, rank)
        self.fc2 = NaiveLinear(structure, f, h, config, ranks, rank)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x and y (S or S/p, batch, h)."""
        return self.fc2(self.activation(self.fc1(x))), None
