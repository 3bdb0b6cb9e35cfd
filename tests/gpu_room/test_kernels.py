"""On a CUDA device: every kernel in bf16 against float64, the fused layer's memory, decoding within a CUDA
graph.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sffn_kernels import block_diagonal, bottleneck, decode, dispatch, mix
from torch import Tensor

pytestmark = pytest.mark.gpu
TOLERANCE = 5e-3
STRUCTURES = {
    "low_rank": ((2000, 96), (1536, 96), (96, 1536)),
    "long low_rank": ((2000, 768), (1536, 768), (768, 1536)),
    "block_dense": ((2000, 192), (1536, 192), (3, 64, 512)),
    "block_shuffle": ((2000, 4, 96), (4, 384, 96), (4, 96, 384)),
}


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """bf16 on the device, with gradients."""
    torch.manual_seed(0)
    return [
        (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).bfloat16().requires_grad_() for shape in shapes
    ]


def equal(op: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Output and every gradient by kernels in bf16 equal those in float64 by plain torch."""
    high = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with dispatch.using("triton"):
        out = op(*leaves)
    expected = op(*high)
    sent = torch.randn_like(out)
    with dispatch.using("triton"):
        out.backward(sent)
    expected.backward(sent.double())
    pairs = [(out, expected), *((leaf.grad, other.grad) for leaf, other in zip(leaves, high, strict=True))]
    for got, want in pairs:
        assert got is not None
        assert want is not None
        assert (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt() < TOLERANCE


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "swiglu"])
def test_bottleneck(name: str, activation: str) -> None:
    z, second, first = STRUCTURES[name]
    if activation == "swiglu":
        second = (*second[:-2], 2 * second[-2], second[-1])
    rows = (torch.Size(second[:-1]).numel(),)
    equal(lambda *tensors: bottleneck.apply(*tensors, activation), drawn(z, second, rows, first))


@pytest.mark.parametrize("op", [block_diagonal.block_diagonal, block_diagonal.shuffled_block_diagonal])
def test_block_diagonal(op: Callable[..., Tensor]) -> None:
    equal(op, drawn((2000, 3 * 96), (3, 200, 96)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_mix(alpha: float) -> None:
    leaves = drawn((2000, 512), (1500, 512), (2000, 96), (1500, 96), (1500,))
    if alpha in (0.0, 1.0):  # one side's gradients are zero
        with torch.no_grad(), dispatch.using("triton"):
            y = mix.apply(*leaves[:4], alpha, leaves[4])
        read, weight = leaves[:2] if alpha else leaves[2:4]
        want = read.double() @ weight.double().t() + leaves[4].double()
        assert (y.double() - want).square().mean().sqrt() / want.square().mean().sqrt() < TOLERANCE
    else:
        equal(lambda *tensors: mix.apply(*tensors[:4], alpha, tensors[4]), leaves)


@pytest.mark.parametrize("tokens", [1, 5, 16, 64])
@pytest.mark.parametrize("name", ["low_rank", "block_shuffle"])
def test_decode_in_a_cuda_graph(name: str, tokens: int) -> None:
    """Replayed on other inputs: as in float64, and twice the same bits."""
    with torch.no_grad():
        if name == "low_rank":
            weights = drawn((256, 1024), (4096, 256), (4096,), (256, 4096), (1024, 256), (1024,))
        else:
            weights = drawn((4, 256, 256), (4, 1024, 256), (4096,), (4, 256, 1024), (4, 256, 256), (1024,))
        x = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device="cuda")
        with dispatch.using("triton"):
            beside = torch.cuda.Stream()
            with torch.cuda.stream(beside):
                decode.feed_forward(x, *weights, "gelu")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=beside):
                y = decode.feed_forward(x, *weights, "gelu")
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            first = y.clone()
            graph.replay()
            assert torch.equal(first, y)
            want = decode.feed_forward(x.double(), *(weight.double() for weight in weights), "gelu")
            assert (y.double() - want).square().mean().sqrt() / want.square().mean().sqrt() < TOLERANCE


def test_memory_of_a_layer(root: Path) -> None:
    """30,000 tokens at 32%: with the bottlenecks alone kept, forward + backward hold at most a quarter of
    what dense does.
    """
    command = [
        sys.executable,
        "tools/bench.py",
        "ffn",
        "--device",
        "cuda",
        "--width",
        "2048",
        "--shares",
        "32",
        "--repeats",
        "2",
    ]
    result = subprocess.run([*command, "--json"], cwd=root, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    peak = {
        (row["kind"], row["provider"]): row["peak_mb"]
        for row in json.loads(result.stdout)
        if row["mode"] != "forward"
    }
    for kind in ("low_rank", "block_dense"):
        assert peak[kind, "ours_bottleneck"] <= peak["dense", "dense"] / 4
